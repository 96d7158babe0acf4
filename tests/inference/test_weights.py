"""What weights a folder holds, from the headers of its files."""

import torch
from safetensors.torch import save_file

from refrag_lightning.inference.weights import describe_weights


def test_parameters_are_counted_over_all_files(tmp_path):
    (tmp_path / "adapter").mkdir()
    first = {"a": torch.zeros(1000, 3, dtype=torch.bfloat16), "b": torch.zeros(7)}
    save_file(first, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file({"c": torch.zeros(())}, tmp_path / "adapter" / "adapter_model.safetensors")
    # 3000 + 7 + 1; a scalar counts as one.
    assert describe_weights(tmp_path).startswith("3,008 parameters, bfloat16, float32, 0.0 MB")


def test_a_folder_without_weights(tmp_path):
    assert describe_weights(tmp_path) == "0 parameters, nothing, 0.0 MB"
