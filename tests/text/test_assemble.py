from __future__ import annotations

import numpy as np
import pytest
import torch

from refrag_lightning.text.assemble import Assembler, DocumentPiece
from refrag_lightning.text.packing import PackedDocument

CLS, SEP, PAD, DECODER_PAD = 101, 102, 0, 9


def assembler(**settings):
    defaults = {
        "compression": 2,
        "num_slots": 1,
        "context": "row",
        "max_encoder_tokens": 4,
        "encoder_prefix": (CLS,),
        "encoder_suffix": (SEP,),
        "encoder_pad_id": PAD,
        "decoder_pad_id": DECODER_PAD,
    }
    return Assembler(**{**defaults, **settings})


def packed(ids, *, compression=2):
    """A document of one character a token."""
    rows = np.arange(len(ids)) // compression
    bounds = np.asarray([*range(0, len(ids), compression), len(ids)])
    lost = np.zeros(len(bounds) - 1, dtype=np.int64)
    return PackedDocument(np.asarray(ids, dtype=np.int64), rows, bounds, lost)


def piece(index, expanded, tokens=(), rows=()):
    return DocumentPiece(
        index=index,
        id=str(index + 1),
        expanded=np.asarray(expanded, dtype=bool),
        decoder_ids=np.asarray(tokens, dtype=np.int64),
        decoder_rows=np.asarray(rows, dtype=np.int64),
    )


def tokens(*ids):
    return np.asarray(ids, dtype=np.int64)


# Rows (21, 22), (23, 24), (25) and (23, 24), (26): the second document's first row is shared.
DOCUMENTS = [packed([21, 22, 23, 24, 25]), packed([23, 24, 26])]
TEXTS = [
    # Row 1 of the first document stands as its decoder tokens 53, 54 and 55.
    [
        tokens(41, 42),
        piece(0, [False, True, False], (51, 52, 53, 54, 55, 56), (0, 0, 1, 1, 1, 2)),
        tokens(43),
    ],
    [piece(1, [False, False])],
]


def test_hand_worked_batch():
    batch = assembler()(TEXTS, DOCUMENTS, padding_side="left")
    assert batch["input_ids"].tolist() == [
        [41, 42, 9, 53, 54, 55, 9, 43],
        [9, 9, 9, 9, 9, 9, 9, 9],
    ]
    assert batch["slot_ids"].tolist() == [
        [-1, -1, 0, -1, -1, -1, 2, -1],
        [-1, -1, -1, -1, -1, -1, 1, 3],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 8, [0] * 6 + [1] * 2]
    assert batch["position_ids"].tolist() == [list(range(8)), [0, 0, 0, 0, 0, 0, 0, 1]]
    # Four distinct rows; row 1 is wanted by the second text.
    assert batch["encoder_input_ids"].tolist() == [
        [CLS, 21, 22, SEP],
        [CLS, 23, 24, SEP],
        [CLS, 25, SEP, PAD],
        [CLS, 26, SEP, PAD],
    ]
    assert batch["encoder_row_ids"].tolist() == [
        [-1, 0, 0, -1],
        [-1, 1, 1, -1],
        [-1, 2, -1, -1],
        [-1, 3, -1, -1],
    ]
    assert batch["encoder_attention_mask"].tolist() == [
        [1] * 4,
        [1] * 4,
        [1, 1, 1, 0],
        [1, 1, 1, 0],
    ]
    assert batch["row_states_mask"].tolist() == [False] * 4
    assert "row_states" not in batch
    assert batch.num_rows == 4
    assert [[(r.row, r.document_id, r.start, r.end, r.state) for r in t] for t in batch.trace] == [
        [(0, "1", 0, 2, "vector"), (1, "1", 2, 4, "tokens"), (2, "1", 4, 5, "vector")],
        [(1, "2", 0, 2, "vector"), (3, "2", 2, 3, "vector")],
    ]


def test_right_padding_moves_the_real_positions_only():
    left = assembler()(TEXTS, DOCUMENTS, padding_side="left")
    right = assembler()(TEXTS, DOCUMENTS, padding_side="right")
    assert right["attention_mask"].tolist() == [[1] * 8, [1] * 2 + [0] * 6]
    assert right["position_ids"].tolist() == [list(range(8)), [0, 1, 0, 0, 0, 0, 0, 0]]
    assert right["slot_ids"][1].tolist() == [1, 3, -1, -1, -1, -1, -1, -1]
    for key in ("input_ids", "slot_ids", "position_ids"):
        for text in range(2):
            real = [batch[key][text][batch["attention_mask"][text] == 1] for batch in (left, right)]
            assert real[0].tolist() == real[1].tolist()


def test_a_row_that_only_stands_as_tokens_is_not_encoded():
    batch = assembler()(TEXTS[:1], DOCUMENTS[:1], padding_side="left")
    assert batch["encoder_row_ids"].unique().tolist() == [-1, 0, 2]
    assert batch.num_rows == 3


@pytest.mark.parametrize("given", [[0], [1, 3], [0, 1, 2, 3], []])
def test_given_rows_are_not_encoded_again(given):
    mask = torch.zeros(4, dtype=torch.bool)
    mask[given] = True
    states = torch.randn(4, 1, 5)
    batch = assembler()(
        TEXTS, DOCUMENTS, padding_side="left", row_states=states, row_states_mask=mask
    )
    assert set(batch["encoder_row_ids"].unique().tolist()) - {-1} == {0, 1, 2, 3} - set(given)
    assert batch["row_states_mask"].tolist() == mask.tolist()
    assert torch.equal(batch["row_states"], states)
    # What the decoder reads is the same.
    without = assembler()(TEXTS, DOCUMENTS, padding_side="left")
    for key in ("input_ids", "slot_ids", "position_ids", "attention_mask"):
        assert torch.equal(batch[key], without[key])
    if len(given) == 4:
        assert batch["encoder_input_ids"].shape == (0, 0)


def test_states_without_a_mask_are_given_for_all_rows():
    batch = assembler()(TEXTS, DOCUMENTS, padding_side="left", row_states=torch.zeros(4, 1, 5))
    assert batch["row_states_mask"].tolist() == [True] * 4
    assert batch["encoder_input_ids"].shape == (0, 0)


@pytest.mark.parametrize(
    ("states", "mask", "message"),
    [
        (None, torch.zeros(4, dtype=torch.bool), "row_states_mask was given without row_states"),
        (torch.zeros(5, 1, 2), None, "row_states holds 5 rows, but the texts have 4"),
        (
            torch.zeros(4, 1, 2),
            torch.zeros(3),
            "row_states_mask holds 3 rows, but the texts have 4",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused(states, mask, message):
    with pytest.raises(ValueError, match=message):
        assembler()(TEXTS, DOCUMENTS, padding_side="left", row_states=states, row_states_mask=mask)


def test_windows_hold_whole_rows_and_are_cut_at_row_edges():
    document = packed([21, 22, 23, 24, 25, 26, 27])
    texts = [[piece(0, [False] * 4)]]
    batch = assembler(context="document", max_encoder_tokens=5)(
        texts, [document], padding_side="left"
    )
    # A window of five tokens takes two rows of two.
    assert batch["encoder_input_ids"].tolist() == [
        [CLS, 21, 22, 23, 24, SEP],
        [CLS, 25, 26, 27, SEP, PAD],
    ]
    assert batch["encoder_row_ids"].tolist() == [[-1, 0, 0, 1, 1, -1], [-1, 2, 2, 3, -1, -1]]


def test_a_window_is_read_whole_or_not_at_all():
    document = packed([21, 22, 23, 24, 25, 26, 27])
    expanded = piece(0, [True, False, True, True], (1, 2, 3), (0, 2, 3))
    windows = assembler(context="document")
    batch = windows([[expanded]], [document], padding_side="left")
    assert batch["encoder_input_ids"].tolist() == [[CLS, 21, 22, 23, 24, SEP]]
    mask = torch.tensor([False, True, False, False])
    batch = windows(
        [[expanded]],
        [document],
        padding_side="left",
        row_states=torch.zeros(4, 1, 2),
        row_states_mask=mask,
    )
    assert batch["encoder_input_ids"].shape == (0, 0)


def test_rows_are_shared_between_texts_but_not_between_windows():
    texts = [[piece(0, [False] * 3)], [piece(1, [False] * 2)]]
    assert assembler()(texts, DOCUMENTS, padding_side="left").num_rows == 4
    batch = assembler(context="document")(texts, DOCUMENTS, padding_side="left")
    assert batch.num_rows == 5
    assert batch["slot_ids"].tolist() == [[0, 1, 2], [-1, 3, 4]]


def test_several_slots_a_row():
    # Of rows of four tokens with two slots, a short row has ceil(n * 2 / 4) of them.
    for size, slots in ((4, 2), (3, 2), (2, 1), (1, 1)):
        document = packed(list(range(20, 24 + size)), compression=4)
        batch = assembler(compression=4, num_slots=2)(
            [[piece(0, [False, False])]], [document], padding_side="left"
        )
        assert batch["slot_ids"].tolist() == [[0, 1, 2, 3][: 2 + slots]]
        assert batch.num_slots == 2


def test_rows_of_different_length_are_not_the_same_row():
    documents = [packed([21, 22, 21]), packed([21])]
    texts = [[piece(0, [False] * 2), piece(1, [False])]]
    batch = assembler()(texts, documents, padding_side="left")
    assert batch["slot_ids"].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("context", ["row", "document"])
def test_texts_without_documents_and_no_text_at_all(context):
    batch = assembler(context=context)([[tokens(41)], [], [tokens()]], [], padding_side="left")
    assert batch["input_ids"].tolist() == [[41], [9], [9]]
    assert batch["attention_mask"].tolist() == [[1], [0], [0]]
    for key in ("encoder_input_ids", "encoder_attention_mask", "encoder_row_ids"):
        assert batch[key].shape == (0, 0)
        assert batch[key].dtype == torch.int64
    assert batch["row_states_mask"].shape == (0,)
    assert batch.num_rows == 0
    assert [len(trace) for trace in batch.trace] == [0, 0, 0]
    assert assembler(context=context)([], [], padding_side="left")["input_ids"].shape == (0, 0)


@pytest.mark.parametrize("context", ["row", "document"])
def test_a_row_without_encoder_tokens_has_no_slot(context):
    empty = PackedDocument(tokens(), tokens(), np.asarray([0, 2]), np.asarray([2]))
    texts = [[tokens(41), piece(0, [False]), piece(1, [False, False])]]
    batch = assembler(context=context)(texts, [empty, packed([21, 22, 23])], padding_side="left")
    assert batch["slot_ids"].tolist() == [[-1, 1, 2]]
    assert [(row.state, row.lost) for row in batch.trace[0]] == [
        ("empty", 2),
        ("vector", 0),
        ("vector", 0),
    ]
    assert set(batch["encoder_row_ids"].unique().tolist()) == {-1, 1, 2}
