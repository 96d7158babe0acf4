"""Batches built by hand, so that the model's tests need no tokenizer."""

import torch

CLS, SEP = 2, 3


def make_batch(texts, rows, *, side="left", width=None):
    """Builds a batch of one slot a row and one row a sequence.

    Args:
        texts: Lists of decoder ids; a negative entry -(r + 1) is the slot of row r.
        rows: Lists of encoder ids, without special tokens.
        side: Where the padding goes.
        width: S; the longest text's length if None.
    """
    width = width or max(len(text) for text in texts)
    shape = (len(texts), width)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "slot_ids": torch.full(shape, -1),
    }
    for line, text in enumerate(texts):
        start = width - len(text) if side == "left" else 0
        for offset, entry in enumerate(text):
            column = start + offset
            batch["attention_mask"][line, column] = 1
            batch["position_ids"][line, column] = offset
            if entry < 0:
                batch["slot_ids"][line, column] = -entry - 1
            else:
                batch["input_ids"][line, column] = entry
    length = max((len(row) for row in rows), default=-2) + 2
    encoder = torch.zeros((len(rows), length), dtype=torch.long)
    mask, row_ids = encoder.clone(), torch.full_like(encoder, -1)
    for index, row in enumerate(rows):
        encoder[index, : len(row) + 2] = torch.tensor([CLS, *row, SEP])
        mask[index, : len(row) + 2] = 1
        row_ids[index, 1 : len(row) + 1] = index
    return {
        **batch,
        "encoder_input_ids": encoder,
        "encoder_attention_mask": mask,
        "encoder_row_ids": row_ids,
        "row_states_mask": torch.zeros(len(rows), dtype=torch.bool),
    }


TEXTS = [[5, 6, -1, -2, 9, 10], [7, 8, -3], [11, -2, 12, 13]]
ROWS = [[20, 21, 22, 23], [24, 25], [26, 27, 28]]


def real(batch, values):
    """What stands at the real positions of each text, as a list of tensors."""
    return [line[mask.bool()] for line, mask in zip(values, batch["attention_mask"], strict=True)]
