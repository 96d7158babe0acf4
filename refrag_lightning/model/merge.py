"""Merging an adapter: a decoder without it that gives the same logits, up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refrag_lightning.model.adapter import base_key, merged_state_dict
from refrag_lightning.model.base import as_dtype, build_decoder
from refrag_lightning.model.decoder import word_embeddings

if TYPE_CHECKING:
    from refrag_lightning.model.refrag import RefragModel


def merged_decoder(
    decoder: PreTrainedModel, *, dtype: torch.dtype | str | None = None
) -> PreTrainedModel:
    """A model of the decoder's kind without its adapter, on the CPU, that gives the same logits.

    It holds what `merged_state_dict` gives, and shares memory with the decoder where nothing was
    changed. `save_pretrained` of it writes an ordinary Hugging Face folder.

    Args:
        decoder: The causal language model, with an adapter or without one.
        dtype: Of the floating-point weights; as they are if None.

    Raises:
        ValueError: If the adapter changes the word embeddings, or a head that is tied to them.
    """
    return _with_weights(decoder, merged_state_dict(decoder), dtype)


def merge_adapter(model: RefragModel) -> None:
    """Puts the adapter's change into the decoder's own weights, in place.

    Afterwards the decoder counts as a part that differs from its base, so that its weights are
    saved, and there is no adapter. Sums are made in float32 and rounded once.

    Args:
        model: A model with an adapter.

    Raises:
        ValueError: If it has none, or one that cannot be merged.
    """
    config = model.config
    if config.lora is None:
        raise ValueError("the model has no LoRA to merge")
    device = word_embeddings(model.decoder).weight.device
    decoder: Any = merged_decoder(model.decoder)
    model.decoder = decoder.to(device).eval()
    config.lora = None
    config.decoder_config = model.decoder.config
    trained = {*(config.trained or ()), "decoder"}
    model.set_trainable(sorted(trained), train_word_embeddings=config.train_word_embeddings)


def _with_weights(
    decoder: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype | str | None
) -> PreTrainedModel:
    """A model of the decoder's kind without its adapter, on the CPU, that holds these weights.

    transformers itself saves it, because some families are written under other names than they
    have in memory.
    """
    kind = None if dtype is None else as_dtype(dtype)
    ready: dict[str, Tensor] = {}
    placed: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in state.items():
        # What is tied stays tied.
        key = (tensor.data_ptr(), tensor.shape)
        if key not in placed:
            cast = tensor.to("cpu", kind if tensor.is_floating_point() else None)
            placed[key] = cast.contiguous()
        ready[name] = placed[key]
    config = copy.deepcopy(decoder.config)
    with torch.device("meta"):
        model = build_decoder(config)
    model.load_state_dict(ready, assign=True)
    model.tie_weights()
    _place_buffers(model, decoder)
    config.dtype = word_embeddings(model).weight.dtype
    model.generation_config = copy.deepcopy(decoder.generation_config)
    return model


def _place_buffers(model: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Gives a model the buffers that are never saved, such as the frequencies of its positions."""
    known = {base_key(name): buffer for name, buffer in decoder.named_buffers()}
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            place, _, leaf = name.rpartition(".")
            model.get_submodule(place).register_buffer(
                leaf, known[name].detach().cpu().clone(), persistent=False
            )
