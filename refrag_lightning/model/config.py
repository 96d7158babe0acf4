"""RefragConfig: what decides the shape of a RefragModel, and the bases it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

POOLINGS = ("mean", "cls", "last", "attention", "concat")
CONTEXTS = ("row", "document")
CHUNK_UNITS = ("encoder", "decoder", "sentence")
PROJECTORS = ("mlp", "linear")
PARTS = ("projector", "encoder", "decoder")


class RefragConfig(PretrainedConfig):
    """Configuration of an encoder, a projector and a decoder.

    The full configurations of both models stand inside it, so the model can be built without
    reading their folders.

    Args:
        encoder_config: The encoder's configuration (an object or its dictionary).
        decoder_config: The decoder's configuration (an object or its dictionary).
        encoder_name: Hub name or folder that the encoder's weights came from.
        encoder_revision: Hub commit, or `sha256:` digest of those weights.
        encoder_layers: How many first layers of the causal language model `encoder_name` the
            encoder is; None for a whole model. Where that model is the decoder's base, both share
            their weights.
        decoder_name: Hub name or folder that the decoder's weights came from.
        decoder_revision: Hub commit, or `sha256:` digest of those weights.
        compression: Tokens a row (k in the paper).
        rates: Every compression that the model runs at, `compression` among them; it alone by
            default.
        row_tokens: With `concat`, how many states stand side by side in a row's vector, with zeros
            where a row is shorter; with `row_order`, how many places have a map. The largest rate
            by default.
        pooling: How a row's states become one vector a slot: `mean`, `cls`, `last`, `attention`
            (softmax with a learned query) or `concat`.
        row_order: Adds to `mean` a linear map of each state for its place in the row, zero at the
            start: the mean alone knows the order of a row's tokens only as far as the encoder
            writes it into their states.
        context: What the encoder sees around a row: `row` (the row alone) or `document`.
        chunk_by: Whose units a row counts: `encoder`, `decoder` or `sentence`.
        num_slots: Vectors a row (m).
        projector: `mlp` (2 layers, hidden size D, the paper's) or `linear`.
        projector_scale: Initial standard deviation a dimension of the projector's output; the root
            mean square of the decoder's embedding outputs.
        trained: Parts whose own weights differ from their base, a subset of `projector`,
            `encoder`, `decoder`; `projector` is always among them. An adapter does not count:
            see `lora`.
        train_word_embeddings: Whether the word embeddings (and a head tied to them) of the parts
            in `trained` differ from their base too.
        lora: None, or the adapter on the decoder: `r`, `alpha`, `dropout`, `target_modules`.
        encoder_lora: The same on the encoder.
        full: True for a folder that holds every weight and needs no base models.

    Raises:
        ValueError: A value is out of range, or two values do not fit each other.
    """

    model_type = "refrag"
    sub_configs: ClassVar[dict[str, Any]] = {
        "encoder_config": AutoConfig,
        "decoder_config": AutoConfig,
    }

    encoder_config: Any = None
    decoder_config: Any = None
    encoder_name: str | None = None
    encoder_revision: str | None = None
    encoder_layers: int | None = None
    decoder_name: str | None = None
    decoder_revision: str | None = None
    compression: int = 8
    rates: list[int] | None = None
    row_tokens: int | None = None
    pooling: str = "mean"
    row_order: bool = False
    context: str = "row"
    chunk_by: str = "encoder"
    num_slots: int = 1
    projector: str = "mlp"
    projector_scale: float = 1.0
    trained: list[str] | None = None
    train_word_embeddings: bool = False
    lora: dict[str, Any] | None = None
    encoder_lora: dict[str, Any] | None = None
    full: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the two configurations from dictionaries and checks the values."""
        self.encoder_config = _as_config(self.encoder_config, "encoder_config")
        self.decoder_config = _as_config(self.decoder_config, "decoder_config")
        trained = {"projector", *(self.trained or ())}
        if unknown := sorted(trained.difference(PARTS)):
            raise ValueError(f"trained ({unknown}) must be among {list(PARTS)}")
        self.trained = [part for part in PARTS if part in trained]
        if self.lora is not None:
            self.lora = complete_lora(self.lora)
        if self.encoder_lora is not None:
            self.encoder_lora = complete_lora(self.encoder_lora)
        self.rates = sorted({self.compression} if self.rates is None else set(self.rates))
        if self.pooling == "concat" or self.row_order:
            self.row_tokens = self.row_tokens or self.rates[-1]
        self._check()
        parts = [part for part in (self.encoder_config, self.decoder_config) if part is not None]
        chosen = [part._attn_implementation for part in parts]
        super().__post_init__(**kwargs)
        # The base class resets the attention of configurations inside it, which may be those of
        # models that exist already: theirs would go on without a causal mask.
        for part, implementation in zip(parts, chosen, strict=True):
            part._attn_implementation = implementation

    def _check(self) -> None:
        for name, allowed in (
            ("pooling", POOLINGS),
            ("context", CONTEXTS),
            ("chunk_by", CHUNK_UNITS),
            ("projector", PROJECTORS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} ({value!r}) must be one of {', '.join(allowed)}")
        if self.compression < 1:
            raise ValueError(f"compression ({self.compression}) must be at least 1")
        assert self.rates is not None
        if self.compression not in self.rates:
            raise ValueError(
                f"compression ({self.compression}) must be one of rates ({self.rates})"
            )
        if self.rates[0] < 1:
            raise ValueError(f"compression ({self.rates[0]}) must be at least 1")
        if self.num_slots > 1 and len(self.rates) > 1:
            raise ValueError(
                f"num_slots ({self.num_slots}) must be 1 with several rates ({self.rates})"
            )
        if self.row_order and (self.pooling != "mean" or self.num_slots > 1):
            raise ValueError(
                f"row_order (true) needs pooling 'mean' and one slot a row, not "
                f"{self.pooling!r} and {self.num_slots}"
            )
        if self.row_order and self.chunk_by != "encoder":
            raise ValueError(
                f"row_order (true) needs rows of at most compression encoder tokens, which "
                f"chunk_by ({self.chunk_by!r}) does not give; use 'encoder'"
            )
        places = self.row_tokens or 0
        if (self.pooling == "concat" or self.row_order) and places < self.rates[-1]:
            what = "row_order" if self.row_order else "pooling ('concat')"
            raise ValueError(
                f"{what} has room for {self.row_tokens} tokens a row, so it does not "
                f"run at the rate {self.rates[-1]}"
            )
        if not 1 <= self.num_slots <= self.compression:
            raise ValueError(
                f"num_slots ({self.num_slots}) must be between 1 and compression "
                f"({self.compression})"
            )
        if self.projector_scale <= 0:
            raise ValueError(f"projector_scale ({self.projector_scale}) must be positive")
        if self.pooling == "cls" and self.context == "document":
            raise ValueError(
                "pooling ('cls') does not fit context ('document'): the rows of a document share "
                "one sequence, which has one first token"
            )
        if self.pooling in ("cls", "concat") and self.num_slots > 1:
            raise ValueError(
                f"pooling ({self.pooling!r}) gives one vector a row, so num_slots "
                f"({self.num_slots}) must be 1"
            )
        if self.pooling == "concat" and self.chunk_by != "encoder":
            raise ValueError(
                f"pooling ('concat') needs rows of at most compression encoder tokens, which "
                f"chunk_by ({self.chunk_by!r}) does not give; use 'encoder'"
            )

    @property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """The settings of each part's LoRA, by part."""
        loras = {"encoder": self.encoder_lora, "decoder": self.lora}
        return {part: lora for part, lora in loras.items() if lora is not None}

    @property
    def shares_weights(self) -> bool:
        """Whether the encoder's weights are the decoder's: layers of the same base, both frozen.

        A LoRA on either leaves the base as it is.
        """
        same = (self.encoder_name, self.encoder_revision) == (
            self.decoder_name,
            self.decoder_revision,
        )
        moved = {"encoder", "decoder"}.intersection(self.trained or ())
        return self.encoder_layers is not None and same and not moved

    @property
    def encoder_hidden_size(self) -> int:
        """E, the width of the encoder's states."""
        return self.encoder_config.get_text_config().hidden_size

    @property
    def row_size(self) -> int:
        """E_row, the width of one pooled vector: E, or row_tokens * E for `concat`."""
        factor = self.row_tokens if self.pooling == "concat" else 1
        assert factor is not None
        return factor * self.encoder_hidden_size

    def set_rates(self, rates: Iterable[int], compression: int | None = None) -> None:
        """Sets the rates; see `RefragModel.set_rates`."""
        given = list(rates)
        if not given:
            raise ValueError("rates is empty: a model runs at one rate at least")
        before = self.rates, self.compression
        self.rates = sorted(set(given))
        self.compression = given[0] if compression is None else compression
        try:
            self._check()
        except ValueError:
            self.rates, self.compression = before
            raise

    @property
    def largest_row(self) -> int:
        """Most tokens that pooling tells apart in a row."""
        assert self.rates is not None
        return self.row_tokens or self.rates[-1]

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The decoder's text configuration: what vocabulary-minded code asks for."""
        if self.decoder_config is None:
            return self
        return self.decoder_config.get_text_config(*args, **kwargs)


def complete_lora(lora: dict[str, Any]) -> dict[str, Any]:
    """Fills in the defaults of an adapter's settings.

    Args:
        lora: Any of `r` (8), `alpha` (2 * r), `dropout` (0.0), `target_modules` ("all-linear").

    Raises:
        ValueError: An unknown setting, or a rank below 1.
    """
    known = ("r", "alpha", "dropout", "target_modules")
    if unknown := sorted(set(lora).difference(known)):
        raise ValueError(f"lora has no setting {unknown}; it takes {', '.join(known)}")
    rank = lora.get("r", 8)
    if rank < 1:
        raise ValueError(f"lora r ({rank}) must be at least 1")
    return {
        "r": rank,
        "alpha": lora.get("alpha", 2 * rank),
        "dropout": lora.get("dropout", 0.0),
        "target_modules": lora.get("target_modules", "all-linear"),
    }


def _as_config(value: Any, name: str) -> PretrainedConfig | None:
    if value is None or isinstance(value, PretrainedConfig):
        return value
    values = dict(value)
    model_type = values.pop("model_type", None)
    if not model_type:
        raise ValueError(f"{name} names no model_type, so its class is unknown")
    return AutoConfig.for_model(model_type, **values)
