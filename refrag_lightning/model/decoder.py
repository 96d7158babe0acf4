"""What a causal language model is asked for: embedding outputs, final states, logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def word_embeddings(decoder: PreTrainedModel) -> nn.Embedding:
    """The decoder's embedding module; its output is what the decoder reads."""
    return cast(nn.Embedding, decoder.get_input_embeddings())


def embedding_slices(decoder: PreTrainedModel, *, slice_size: int = 8192) -> Iterator[Tensor]:
    """Yields the embedding outputs of the whole vocabulary, (slice, D) in float32 at a time.

    The module is applied to ids, because some decoders (Gemma) scale inside it: the weight alone
    is not what they read.
    """
    embedding = word_embeddings(decoder)
    with torch.no_grad():
        for ids in torch.arange(vocabulary_size(decoder)).split(slice_size):
            yield embedding(ids.to(embedding.weight.device)).float()


def vocabulary_size(decoder: PreTrainedModel) -> int:
    """V, the rows of the decoder's word embeddings."""
    return word_embeddings(decoder).weight.shape[0]


def embedding_rms(decoder: PreTrainedModel) -> float:
    """Root mean square of the embedding outputs, over the vocabulary and the dimensions."""
    total, count = 0.0, 0
    for rows in embedding_slices(decoder):
        total += rows.square().sum().item()
        count += rows.numel()
    return (total / count) ** 0.5


def takes_position_ids(decoder: PreTrainedModel) -> bool:
    """Whether the decoder reads `position_ids` (one with ALiBi does not)."""
    return "position_ids" in _forward_parameters(type(decoder))  # type: ignore[arg-type]


@lru_cache
def _forward_parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every submodule is in the mode that it was in.

    For a reading that is to be the same each time, in the middle of a training step: a teacher's.
    `module.train()` would not bring the modes back, since frozen parts stay in evaluation mode.

    Args:
        module: Such as a decoder.
    """
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def apply_head(decoder: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The logits that the decoder gives for its final states.

    Includes what some families do behind the linear layer: Cohere multiplies by `logit_scale`,
    Granite and MiniCPM divide by `logits_scaling`, Falcon-H1 multiplies by `lm_head_multiplier`,
    Gemma caps softly at `final_logit_softcapping`, RecurrentGemma at `logits_soft_cap`.
    `check_head` refuses a decoder that does anything else.

    Args:
        decoder: The causal language model.
        hidden: Final states (..., D), as `hidden` of the model gives them.

    Returns:
        Logits (..., V) in float32.
    """
    head = decoder.get_output_embeddings()
    config = decoder.config.get_text_config()
    logits = head(hidden).float()
    for name in ("logit_scale", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if (cap := getattr(config, name, None)) is not None:
            logits = cap * torch.tanh(logits / cap)
    return logits


@torch.no_grad()
def check_head(decoder: PreTrainedModel) -> None:
    """Compares `apply_head` with the decoder's own logits on a few vectors.

    Raises:
        ValueError: They differ: the decoder does something to its logits that is not known here,
            or has no output layer.
    """
    name = type(decoder).__name__
    if decoder.get_output_embeddings() is None or decoder.get_input_embeddings() is None:
        raise ValueError(f"{name} has no output layer or no word embeddings that can be found")
    embedding = word_embeddings(decoder)
    ids = torch.arange(4, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    with evaluation_mode(decoder):
        embeds = embedding(ids)
        expected = decoder(inputs_embeds=embeds, use_cache=False).logits.float()
        hidden = decoder.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = apply_head(decoder, hidden)
    # Rounding in half precision is far below the factors that this is to catch.
    if not torch.allclose(logits, expected, rtol=0.02, atol=0.02 * expected.abs().max().item()):
        raise ValueError(
            f"{name} changes its logits behind the output layer in a way that is not known here, "
            "so losses on its logits would be wrong"
        )
