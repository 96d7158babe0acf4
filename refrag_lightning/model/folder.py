"""Loading and saving: base models plus what differs from them, in one folder.

The folder holds `config.json`, `model.safetensors` with what differs from the bases (`projector.*`
always, `encoder.*` and `decoder.*` where they trained), and in peft's own layout `adapter/` where
the decoder has a LoRA and `encoder_adapter/` where the encoder has one. A full folder holds every
weight and the decoder's `generation_config.json`, which otherwise come from the bases. Loading
refuses bases that are not the ones it was trained on, and a file that does not hold exactly what
differs: transformers itself would leave random weights, with a warning.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from refrag_lightning.cache import take_away_leftovers
from refrag_lightning.hub import EncoderLayers
from refrag_lightning.model.adapter import add_adapter, load_adapter, save_adapter
from refrag_lightning.model.base import (
    as_dtype,
    build_decoder,
    build_encoder,
    cast_weights,
    load_base,
)
from refrag_lightning.model.config import RefragConfig
from refrag_lightning.model.decoder import check_head, embedding_rms
from refrag_lightning.model.files import read_tensors, replace_folder, write_tensors
from refrag_lightning.model.trainable import TrainableParts, copy_exactly, saved_tensors

if TYPE_CHECKING:
    from refrag_lightning.model.refrag import RefragModel

# What AutoModel.from_pretrained adds on its own account; none of it says anything about a folder.
AUTO_OPTIONS = (
    "_from_auto",
    "adapter_kwargs",
    "trust_remote_code",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "subfolder",
    "token",
    "code_revision",
)
ADAPTERS = {"encoder": "encoder_adapter", "decoder": "adapter"}
"""The folder of each part's LoRA."""


class BaseMismatchError(ValueError):
    """The base model that was found is not the one that the folder was made with."""


class FolderMethods(TrainableParts):
    """The methods of `RefragModel` that load and save."""

    config: RefragConfig
    encoder: Any

    @property
    def record(self) -> RefragConfig:
        """The configuration says what differs from the bases."""
        return self.config

    @property
    def base_models(self) -> tuple[Any, ...]:
        """The encoder and the decoder."""
        return self.encoder, self.decoder

    @classmethod
    def from_encoder_decoder(
        cls,
        encoder: str | EncoderLayers | Mapping[str, Any],
        decoder: str,
        *,
        compression: int,
        rates: Sequence[int] | None = None,
        pooling: str = "mean",
        row_order: bool = False,
        context: str = "row",
        chunk_by: str = "encoder",
        num_slots: int = 1,
        projector: str = "mlp",
        dtype: torch.dtype | str | None = None,
        decoder_dtype: torch.dtype | str | None = None,
        lora: dict[str, Any] | None = None,
        encoder_lora: dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        encoder_revision: str | None = None,
        decoder_revision: str | None = None,
    ) -> RefragModel:
        """Joins two base models with a new projector.

        The projector starts with outputs as large as the decoder's embedding outputs. Only the
        projector (and the adapter, with `lora`) requires gradients; see `set_trainable`.

        Args:
            encoder: Hub name or folder of an encoder; or the first layers of a causal language
                model, as `EncoderLayers` or a mapping of its attributes.
            decoder: Hub name or folder of a causal language model.
            compression: Tokens a row.
            rates: Every compression that it shall run at; `compression` alone if None.
            pooling: See `RefragConfig`.
            row_order: See `RefragConfig`.
            context: See `RefragConfig`.
            chunk_by: See `RefragConfig`.
            num_slots: Vectors a row.
            projector: `mlp` or `linear`.
            dtype: Of both base models; float32 if None. The projector is
                float32 whatever it is.
            decoder_dtype: Of the decoder, where it differs.
            lora: An adapter on the decoder: any of `r`, `alpha`, `dropout`, `target_modules`.
            encoder_lora: The same on the encoder.
            attn_implementation: Of both models; transformers' choice if None.
            encoder_revision: Hub branch, tag or commit.
            decoder_revision: Hub branch, tag or commit.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: A value is out of range, or a model is of a kind that does not fit.
            OSError: A model is not found.
        """
        # Fails on a bad value before anything is loaded.
        shape: dict[str, Any] = {
            "compression": compression,
            "rates": None if rates is None else list(rates),
            "pooling": pooling,
            "row_order": row_order,
            "context": context,
            "chunk_by": chunk_by,
            "num_slots": num_slots,
            "projector": projector,
        }
        RefragConfig(**shape)
        encoder = EncoderLayers.parse(encoder)
        dtype = as_dtype(dtype)
        encoder_model, encoder_source = load_base(
            "encoder",
            encoder,
            revision=encoder_revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
        decoder_model, decoder_source = load_base(
            "decoder",
            decoder,
            revision=decoder_revision,
            dtype=dtype if decoder_dtype is None else as_dtype(decoder_dtype),
            attn_implementation=attn_implementation,
        )
        check_head(decoder_model)
        config = RefragConfig(
            encoder_config=encoder_model.config,
            decoder_config=decoder_model.config,
            encoder_name=encoder_source.name,
            encoder_revision=encoder_source.revision,
            encoder_layers=encoder.num_layers if isinstance(encoder, EncoderLayers) else None,
            decoder_name=decoder_source.name,
            decoder_revision=decoder_source.revision,
            projector_scale=embedding_rms(decoder_model),
            **shape,
        )
        model: Any = cls(config, encoder=encoder_model, decoder=decoder_model).eval()
        adapted = [
            part for part, its in (("encoder", encoder_lora), ("decoder", lora)) if its is not None
        ]
        model.set_trainable(["projector", *adapted], lora=lora, encoder_lora=encoder_lora)
        return model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        config: RefragConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        encoder: str | None = None,
        decoder: str | None = None,
        allow_base_mismatch: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> RefragModel:
        """Loads a folder that `save_pretrained` wrote: the base models, then what differs.

        What requires gradients is what differs from the bases; see `set_trainable`.

        Args:
            folder: The folder, or a Hub name of one.
            config: The folder's configuration, if it was read already.
            dtype: Of both models; float32 if None. The projector is float32 whatever it is.
            device: Where to put the model.
            encoder: Where the base encoder is now, if it moved.
            decoder: Where the base decoder is now, if it moved.
            allow_base_mismatch: Warn about a base with other weights instead of refusing it.
            attn_implementation: Of both models; transformers' choice if None.
            revision: Hub branch, tag or commit of the folder.
            options: Only what `AutoModel.from_pretrained` adds.

        Returns:
            The model, in evaluation mode.

        Raises:
            BaseMismatchError: A base has other weights than the one that the folder names.
            ValueError: The folder's tensors are not exactly those that differ from the bases.
            TypeError: An unknown option.
            OSError: The folder or a base is not found.
        """
        if dtype is None:
            dtype = options.pop("torch_dtype", None)
        if unknown := sorted(set(options).difference(AUTO_OPTIONS)):
            raise TypeError(f"RefragModel.from_pretrained takes no option {', '.join(unknown)}")
        path = _find(os.fspath(folder), revision)
        if config is None:
            config = RefragConfig.from_pretrained(path)
        dtype = as_dtype(dtype)
        model: Any
        if config.full:
            model = cls(
                config,
                build_encoder(config.encoder_config),
                build_decoder(config.decoder_config),
            )
            for part in (model.encoder, model.decoder):
                cast_weights(part, dtype)
                if attn_implementation is not None:
                    part.set_attn_implementation(attn_implementation)
            if (path / "generation_config.json").is_file():
                model.decoder.generation_config = GenerationConfig.from_pretrained(path)
        else:
            parts = {
                part: _base(
                    path,
                    part,
                    override,
                    config=config,
                    dtype=dtype,
                    attn_implementation=attn_implementation,
                    allow_mismatch=allow_base_mismatch,
                )
                for part, override in (("encoder", encoder), ("decoder", decoder))
            }
            model = cls(config, parts["encoder"], parts["decoder"])
        copy_exactly(
            saved_tensors(model, full=config.full),
            read_tensors(path),
            what=f"the weights in {path}",
        )
        check_head(model.decoder)
        trained = list(config.trained or ())
        for part, lora in config.adapters.items():
            add_adapter(getattr(model, part), lora)
            load_adapter(getattr(model, part), path / ADAPTERS[part])
            trained.append(part)
        model.set_trainable(trained, train_word_embeddings=config.train_word_embeddings)
        return model.eval().to(device) if device is not None else model.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        full: bool = False,
        max_shard_size: str | int = "5GB",
    ) -> None:
        """Writes the configuration and what differs from the base models.

        The folder holds `config.json`, `model.safetensors` (the projector, and the encoder's and
        decoder's weights where they were trained) and, with LoRA, `adapter/` in peft's layout; a
        full one the decoder's generation settings too. Files of other kinds in the folder stay.
        It is written beside its place and renamed, so an interrupted call leaves what was there
        before.

        Args:
            folder: Where to.
            dtype: Of the saved floating-point tensors; as they are if None.
            full: Write every weight, so that loading needs no base models.
            max_shard_size: Largest size of one file.
        """
        kind = None if dtype is None else as_dtype(dtype)
        config = RefragConfig.from_dict({**self.config.to_dict(), "full": full})
        config.architectures = [type(self).__name__]
        # In place of the folder of this machine that they were loaded from.
        config.encoder_config._name_or_path = config.encoder_name or ""
        config.decoder_config._name_or_path = config.decoder_name or ""
        with replace_folder(Path(folder)) as new:
            write_tensors(
                saved_tensors(self, full=full), new, dtype=kind, max_shard_size=max_shard_size
            )
            for part in config.adapters:
                save_adapter(
                    getattr(self, part),
                    new / ADAPTERS[part],
                    base_name=getattr(config, f"{part}_name"),
                    base_revision=getattr(config, f"{part}_revision"),
                    dtype=kind,
                )
            if full:
                # Without the checks of its `save_pretrained`: some base models come with settings
                # that those refuse.
                self.decoder.generation_config.to_json_file(new / "generation_config.json")
            config.save_pretrained(new)


def _find(name: str, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        take_away_leftovers(folder)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, revision=revision))
        except Exception as error:
            raise OSError(f"there is no folder {name!r}, nor such a model on the Hub") from error
    if not (folder / "config.json").is_file():
        raise OSError(f"{folder} has no config.json, so it is not a model's folder")
    return folder


def _base(
    path: Path,
    part: str,
    override: str | None,
    *,
    config: RefragConfig,
    dtype: torch.dtype,
    attn_implementation: str | None,
    allow_mismatch: bool,
) -> PreTrainedModel:
    """Loads a base model and compares its revision with the one that the folder names."""
    name = override or getattr(config, f"{part}_name")
    if name is None:
        raise ValueError(f"{path} names no base {part}; give {part}=... to from_pretrained")
    base: str | EncoderLayers = name
    if part == "encoder" and config.encoder_layers is not None:
        causal = getattr(config.encoder_config, "is_causal", True)
        base = EncoderLayers(name, config.encoder_layers, causal)
    wanted = getattr(config, f"{part}_revision")
    try:
        model, source = load_base(
            part, base, revision=wanted, dtype=dtype, attn_implementation=attn_implementation
        )
    except OSError as error:
        raise OSError(
            f"the base {part} of {path} was not found ({error}); if it moved, give {part}=... "
            "to from_pretrained"
        ) from error
    if wanted is not None and source.revision != wanted:
        message = (
            f"{path} was made with the {part} {getattr(config, f'{part}_name')} at {wanted}, "
            f"but {source.path} holds {source.revision}"
        )
        if not allow_mismatch:
            raise BaseMismatchError(message)
        warnings.warn(message, stacklevel=3)
        # What is saved from here on is made with this one.
        setattr(config, f"{part}_revision", source.revision)
    return model
