"""What a tokenizer and a model's configuration say of sequences: special tokens and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(n for n in range(len(full)) if full[n : n + len(bare)] == bare)
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def num_positions(config: Any) -> int:
    """Positions that an encoder has for tokens; RoBERTa's kin keep the first ones for padding."""
    positions = getattr(config, "max_position_embeddings", None) or int(1e30)
    if "roberta" in config.model_type or config.model_type == "camembert":
        positions -= config.pad_token_id + 1
    return positions
