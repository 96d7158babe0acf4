"""Joining the batches of several requests into one, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refrag_lightning.text.batch import RefragBatch


def join(batches: Sequence[RefragBatch], *, padding_id: int) -> dict[str, Tensor]:
    """One batch of several, padded on the left.

    Args:
        batches: Batches whose rows' states are all given.
        padding_id: The decoder's padding token.

    Returns:
        Its tensors.
    """
    assert all(batch["encoder_input_ids"].shape[0] == 0 for batch in batches)
    if len(batches) == 1:
        return dict(batches[0])
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    slots, first = [], 0
    for batch in batches:
        slot_ids = batch["slot_ids"]
        slots.append(torch.where(slot_ids >= 0, slot_ids + first * batch.num_slots, slot_ids))
        first += batch.num_rows

    def padded(tensors: Sequence[Tensor], value: int) -> Tensor:
        return torch.cat([F.pad(t, (longest - t.shape[1], 0), value=value) for t in tensors])

    joined = {
        "input_ids": padded([batch["input_ids"] for batch in batches], padding_id),
        "attention_mask": padded([batch["attention_mask"] for batch in batches], 0),
        "position_ids": padded([batch["position_ids"] for batch in batches], 0),
        "slot_ids": padded(slots, -1),
        "row_states_mask": torch.cat([batch["row_states_mask"] for batch in batches]),
    }
    for key in ("encoder_input_ids", "encoder_attention_mask", "encoder_row_ids"):
        joined[key] = batches[0][key]
    given = [batch["row_states"] for batch in batches if "row_states" in batch]
    if given:
        joined["row_states"] = torch.cat(
            [
                batch["row_states"]
                if "row_states" in batch
                else given[0].new_zeros((batch.num_rows, *given[0].shape[1:]))
                for batch in batches
            ]
        )
    return joined
