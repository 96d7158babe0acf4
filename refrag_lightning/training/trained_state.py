"""Which entries of a state dict belong to what trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def frozen_keys(module: nn.Module) -> list[str]:
    """Keys of `module.state_dict()` that a checkpoint of what trains leaves out.

    Frozen parameters (under every name, where weights are tied), and buffers of a module whose
    parameters are all frozen. A buffer of a module without parameters goes by the module around
    it.
    """
    modules = dict(module.named_modules())

    def all_frozen(name: str) -> bool:
        while True:
            parameters = list(modules[name].parameters())
            if parameters or not name:
                return bool(parameters) and not any(p.requires_grad for p in parameters)
            name = name.rpartition(".")[0]

    keys = [
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    ]
    verdicts: dict[str, bool] = {}
    for key, _ in module.named_buffers(remove_duplicate=False):
        owner = key.rpartition(".")[0]
        if owner not in verdicts:
            verdicts[owner] = all_frozen(owner)
        if verdicts[owner]:
            keys.append(key)
    return keys


def check_trained_state(*, expected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises unless `given` has exactly the keys and shapes of `expected`.

    Raises:
        ValueError: Naming what is missing, unexpected or of another shape.
    """
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    if missing or unexpected:
        raise ValueError(
            "the checkpoint is not one of what trains in this run"
            + (f"; it lacks {_some(missing)}" if missing else "")
            + (f"; it has {_some(unexpected)}, frozen or absent here" if unexpected else "")
            + " (were the same parts trained, with the same LoRA?)"
        )
    for key, value in expected.items():
        if hasattr(value, "shape") and value.shape != given[key].shape:
            raise ValueError(
                f"the checkpoint's {key} has the shape {tuple(given[key].shape)}, this run's model "
                f"{tuple(value.shape)}"
            )


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
