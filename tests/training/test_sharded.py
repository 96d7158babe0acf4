"""Checkpoints in shards, on one process; `test_several_ranks.py` trains with them."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from refrag_lightning.training import ShardedStrategy
from refrag_lightning.training.sharded import META

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "last.ckpt"
    tensors = {"state_dict/a": torch.arange(3.0), "state_dict/b": torch.ones(2, 2).bfloat16()}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    torch.save({"global_step": 1}, folder / META)
    return folder


def test_shards_are_read(checkpoint):
    read = ShardedStrategy().load_checkpoint(checkpoint)
    assert read["global_step"] == 1
    assert read["state_dict"]["a"].tolist() == [0.0, 1.0, 2.0]
    assert read["state_dict"]["b"].dtype == torch.bfloat16


def test_no_code_in_a_checkpoint_runs(checkpoint, tmp_path):
    mark = tmp_path / "the code ran"
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = Evil(mark)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="mkdir, and code is not run") as error:
        ShardedStrategy().load_checkpoint(checkpoint)
    assert "\n" not in str(error.value) and not mark.exists()
    (checkpoint / ".metadata").write_bytes(b"odd")
    with pytest.raises(ValueError, match="is no list of a checkpoint's shards"):
        ShardedStrategy().load_checkpoint(checkpoint)
    torch.save({"global_step": Evil(mark)}, checkpoint / META)
    with pytest.raises(pickle.UnpicklingError):
        ShardedStrategy().load_checkpoint(checkpoint)
    assert not mark.exists()


def test_shards_lie_in_the_checkpoints_own_folder(checkpoint, tmp_path):
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    (shard,) = {entry.relative_path for entry in metadata.storage_data.values()}
    (checkpoint / shard).rename(tmp_path / shard)
    for name in (f"../{shard}", str(tmp_path / shard)):
        for entry in metadata.storage_data.values():
            entry.relative_path = name
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match="a shard lies in the checkpoint itself"):
            ShardedStrategy().load_checkpoint(checkpoint)
