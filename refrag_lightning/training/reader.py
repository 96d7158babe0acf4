"""ReaderModule: what the modules share that train a model which reads compressed documents.

Where the model comes from (two base models, or the folder of an earlier run), its tokenizer, what
trains, and the folder that comes out. A subclass adds the steps and their losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from refrag_lightning.hub import EncoderLayers
from refrag_lightning.model import RefragModel
from refrag_lightning.model.adapter import is_adapter_key
from refrag_lightning.model.base import as_dtype
from refrag_lightning.model.config import RefragConfig
from refrag_lightning.model.files import replace_folder
from refrag_lightning.model.load import is_refrag, model_folder
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.text.saving import SETTINGS_FILE
from refrag_lightning.text.tokenizer import RefragTokenizer
from refrag_lightning.training.base import RefragLightningModule

DEFAULT_COMPRESSION = 8


class ReaderModule(RefragLightningModule):
    """Base of the modules that train a `RefragModel`, or the causal language model alone.

    Args:
        encoder: Name or folder of an encoder; `{layers_of: NAME, num_layers: 8, causal: true}` for
            the first layers of a causal language model, such as the decoder; null for the decoder
            alone, where that is possible.
        decoder: Name or folder of a causal language model.
        compression: Tokens a row; or a list of all rates that the model runs at, the first being
            the default one. If None, 8, or those of `init_from`.
        pooling: How a row's states become one vector a slot: mean, cls, last, attention, concat.
        row_order: Adds to the mean a linear map of each state for its place in its row.
        context: Whether the encoder reads a row alone or a window of its document.
        chunk_by: What a row counts: encoder tokens, decoder tokens, or one sentence.
        num_slots: Vectors a row.
        projector: `mlp` (2 layers, as in the paper) or `linear`.
        init_from: Folder of a model to start from, or a run folder that has one, in place of
            the two base models and the shape of rows and projector.
        train: What moves: any of projector, encoder, decoder. If None, the projector for
            alignment, projector and encoder for pre-training, all three for fine-tuning; the
            decoder where there is no encoder.
        lora: Adapter on the decoder (r, alpha, dropout, target_modules).
        encoder_lora: Adapter on the encoder.
        train_word_embeddings: Whether the word embeddings of what trains move too.
        tokenizer_options: Further settings of `RefragTokenizer`: header, footer,
            max_encoder_length, max_sentence, chat_template.
        decoder_dtype: Weights of a frozen decoder, such as bfloat16; float32 if None. An adapter's
            own weights are float32 in any case.
        attn_implementation: Of the decoder, as transformers takes it; its own choice if None. On a
            CPU a decoder in bfloat16 is faster with eager where texts are short (128 positions, not
            512).
        activation_checkpointing: Compute the decoder's activations again in the backward pass
            instead of keeping them: less memory, about a third more time.
        export_dtype: Of the exported weights, such as bfloat16; as they are if None.
        export_shard_size: Largest file of an exported model.
        **kwargs: The optimiser's settings; see `RefragLightningModule`.

    Raises:
        ValueError: If a setting is out of range, or does not fit another.
    """

    takes_plain: ClassVar[bool] = False
    """Whether the decoder alone, without encoder and projector, can be trained."""
    usually_trains: ClassVar[tuple[str, ...]] = ("projector",)
    """What moves where `train` is None."""

    model: RefragModel | PlainModel | None  # type: ignore[assignment]

    def __init__(
        self,
        encoder: str | EncoderLayers | None = "sentence-transformers/all-MiniLM-L6-v2",
        decoder: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        *,
        compression: int | list[int] | None = None,
        pooling: Literal["mean", "cls", "last", "attention", "concat"] = "mean",
        row_order: bool = False,
        context: Literal["row", "document"] = "row",
        chunk_by: Literal["encoder", "decoder", "sentence"] = "encoder",
        num_slots: int = 1,
        projector: Literal["mlp", "linear"] = "mlp",
        init_from: str | None = None,
        train: list[Literal["projector", "encoder", "decoder"]] | None = None,
        lora: dict[str, Any] | None = None,
        encoder_lora: dict[str, Any] | None = None,
        train_word_embeddings: bool = False,
        # Not Any: a header such as "[{id}] " would be read as YAML once more.
        tokenizer_options: dict[str, int | str] | None = None,
        decoder_dtype: str | None = None,
        attn_implementation: str | None = None,
        activation_checkpointing: bool = False,
        export_dtype: str | None = None,
        export_shard_size: str = "5GB",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for dtype in (decoder_dtype, export_dtype):
            as_dtype(dtype)
        if as_dtype(decoder_dtype) is torch.float16:
            raise ValueError(
                f"decoder_dtype ({decoder_dtype}) overflows where vectors are handed to the "
                "decoder; use bfloat16"
            )
        self.names = (None if encoder is None else EncoderLayers.parse(encoder), decoder)
        self.folder = None if init_from is None else model_folder(init_from)
        self.plain = encoder is None if self.folder is None else not is_refrag(self.folder)
        if self.plain and not self.takes_plain:
            what = "encoder (null)" if self.folder is None else f"init_from ({init_from!r})"
            raise ValueError(
                f"{what} leaves a causal language model alone, which {type(self).__name__} cannot "
                "train: it needs an encoder"
            )
        # A causal language model alone has no rows.
        self.rates = [] if self.plain else _rates(compression)
        self.shape: dict[str, Any] = {
            "context": context,
            "chunk_by": chunk_by,
            "num_slots": num_slots,
        }
        self.build: dict[str, Any] = {
            "pooling": pooling,
            "row_order": row_order,
            "projector": projector,
        }
        self.decoder_dtype = decoder_dtype
        self.attn_implementation = attn_implementation
        usual = ["decoder"] if self.plain else list(self.usually_trains)
        self.trained: dict[str, Any] = {
            "parts": usual if train is None else train,
            "lora": lora,
            **({} if encoder_lora is None else {"encoder_lora": encoder_lora}),
            "train_word_embeddings": train_word_embeddings,
        }
        self.activation_checkpointing = activation_checkpointing
        self.export_options: dict[str, Any] = {
            "dtype": export_dtype,
            "max_shard_size": export_shard_size,
        }
        self.tokenizer_options: dict[str, Any] = dict(tokenizer_options or {})
        self._tokenizer: RefragTokenizer | None = None
        if self.folder is None and not self.plain:
            # Fails on a bad value before anything is loaded.
            RefragConfig(**self.shape, **self.build, **self._compression())

    @property
    def tokenizer(self) -> RefragTokenizer:  # type: ignore[override]
        """The model's tokenizer; the data module takes it from here."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def _load_tokenizer(self) -> RefragTokenizer:
        encoder, decoder = self.names
        if self.folder is not None and (Path(self.folder) / SETTINGS_FILE).is_file():
            given: dict[str, Any] = {}
            if self.rates:
                given = {"compression": self.rates[0], "rates": self.rates}
            return RefragTokenizer.from_pretrained(self.folder, **given, **self.tokenizer_options)
        if self.plain:
            # There are no rows, so the rate says nothing.
            return RefragTokenizer.from_encoder_decoder(
                None, self.folder or decoder, compression=1, **self.tokenizer_options
            )
        return RefragTokenizer.from_encoder_decoder(
            encoder, decoder, **self._compression(), **self.shape, **self.tokenizer_options
        )

    def _compression(self) -> dict[str, Any]:
        """The rates as the constructors of model and tokenizer take them."""
        rates = self.rates or [DEFAULT_COMPRESSION]
        return {"compression": rates[0], "rates": rates}

    def configure_model(self) -> None:
        """Loads the models, or the folder to start from, and freezes what does not move.

        Raises:
            ValueError: If the whole decoder is to train in another type than float32.
        """
        if self.model is not None:
            return
        model = self._load_model()
        if self.attn_implementation is not None:
            model.decoder.set_attn_implementation(self.attn_implementation)
        model.set_trainable(**self.trained)
        if self.decoder_dtype is not None:
            self._cast_decoder(model)
        if self.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self.model = model

    def _load_model(self) -> RefragModel | PlainModel:
        encoder, decoder = self.names
        if self.plain:
            return PlainModel.from_pretrained(self.folder or decoder)
        if self.folder is None:
            assert encoder is not None
            return RefragModel.from_encoder_decoder(
                encoder,
                decoder,
                decoder_dtype=self.decoder_dtype,
                **self._compression(),
                **self.shape,
                **self.build,
            )
        model = RefragModel.from_pretrained(self.folder)
        if self.rates:
            model.set_rates(self.rates, self.rates[0])
        return model

    def _cast_decoder(self, model: RefragModel | PlainModel) -> None:
        """Casts the decoder's frozen weights; not its buffers, which rotary positions need whole.

        Small steps would be lost in bfloat16, so what trains has to stay in float32.
        """
        dtype = as_dtype(self.decoder_dtype)
        for name, parameter in model.decoder.named_parameters():
            if is_adapter_key(name):
                continue
            if parameter.requires_grad and dtype.itemsize < 4:
                raise ValueError(
                    f"decoder_dtype ({self.decoder_dtype}) is for a frozen decoder or one with "
                    "lora, but the decoder's own weights train"
                )
            parameter.data = parameter.data.to(dtype)

    @property
    def reader(self) -> RefragModel:
        """The model, where it has an encoder."""
        assert isinstance(self.model, RefragModel)
        return self.model

    def export(self, folder: Path) -> None:
        """Writes the model and its tokenizer as one folder.

        A causal language model alone becomes an ordinary Hugging Face folder, with its tokenizer
        and any adapter merged into the weights.

        Args:
            folder: Where to; may exist.
        """
        assert self.model is not None
        with replace_folder(folder) as new:
            self.model.save_pretrained(new, **self.export_options)
            self.tokenizer.save_pretrained(new)

    def usage(self, folder: Path) -> str:
        """The lines of Python that use an exported `folder`, printed at the end of a run."""
        if not self.plain:
            return super().usage(folder)
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
        )


def _rates(compression: int | list[int] | None) -> list[int]:
    """The rates that were given, the default one first; none if there are none."""
    if compression is None:
        return []
    rates = [compression] if isinstance(compression, int) else list(compression)
    if not rates or len(set(rates)) < len(rates) or min(rates) < 1:
        raise ValueError(
            f"compression ({compression}) must be a whole number above 0, or a list of different "
            "ones"
        )
    return rates
