"""What a tokenizer and a model's configuration say of sequences: special tokens and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Under which names configurations say how many positions there are.
_LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len")


def special_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(n for n in range(len(full)) if full[n : n + len(bare)] == bare)
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def num_positions(model: PreTrainedModel) -> int | None:
    """Positions that a model has for a text; None where nothing limits them.

    What a sliding window leaves out of sight is no limit. Scaled rotary positions count as scaled,
    ALiBi has no end, and RoBERTa's kin keep the first positions for padding.

    Args:
        model: An encoder or a decoder; one on the meta device will do.
    """
    config = model.config.get_text_config()
    # XLNet says -1.
    named = (getattr(config, name, None) for name in _LIMITS)
    positions = next((number for number in named if number and number > 0), None)
    if positions is None or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        before = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(before * rope.get("factor", 1.0)))
    for name, module in model.named_modules():
        # A table with a padding entry is read from the entry behind it on.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions -= padding + 1
    return int(positions)


def configured_positions(folder: str) -> int | None:
    """`num_positions` of the encoder whose configuration lies in a folder."""
    import torch

    from refrag_lightning.hub import build, load

    with torch.device("meta"):
        return num_positions(build("AutoModel", load("AutoConfig", folder)))
