from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from refrag_lightning.text.batch import RefragBatch, RowTrace, TextTrace


def batch():
    return RefragBatch(
        {"input_ids": torch.tensor([[1, 2]]), "row_states_mask": torch.zeros(1, dtype=torch.bool)},
        compression=4,
        num_rows=1,
        num_slots=2,
        trace=[TRACE],
    )


TRACE = TextTrace(
    np.asarray([0, 3, 0]),
    np.asarray([0, 0, 1]),
    np.asarray([[0, 5], [5, 9], [0, 5]]),
    np.asarray([0, 1, 2]),
    np.asarray([0, 0, 4]),
    ["7", "rivers"],
)


def test_it_is_a_mapping_of_its_tensors_alone():
    def keywords(**tensors):
        return tensors

    assert sorted(keywords(**batch())) == ["input_ids", "row_states_mask"]
    assert all(isinstance(value, torch.Tensor) for value in batch().values())
    assert "labels" not in batch()
    assert batch().get("labels") is None
    assert dict(RefragBatch()) == {}


def test_to_moves_every_tensor_in_place():
    moved = batch()
    assert moved.to("meta") is moved
    assert {value.device.type for value in moved.values()} == {"meta"}
    assert (moved.compression, moved.num_rows, moved.num_slots) == (4, 1, 2)
    assert moved.trace == [TRACE]


def test_it_crosses_processes():
    # As a DataLoader's workers send it.
    copy = pickle.loads(pickle.dumps(batch()))
    assert copy["input_ids"].tolist() == [[1, 2]]
    assert (copy.compression, copy.num_rows, copy.num_slots) == (4, 1, 2)
    assert list(copy.trace[0]) == list(TRACE)


def test_a_trace_is_a_sequence_of_rows():
    assert len(TRACE) == 3
    assert TRACE[1] == RowTrace(
        row=3, document=0, document_id="7", start=5, end=9, state="tokens", lost=0
    )
    assert TRACE[-1] == RowTrace(
        row=0, document=1, document_id="rivers", start=0, end=5, state="empty", lost=4
    )
    assert [row.state for row in TRACE] == ["vector", "tokens", "empty"]
    assert TRACE[1:] == [TRACE[1], TRACE[2]]
    with pytest.raises(IndexError):
        TRACE[3]
