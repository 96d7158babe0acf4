"""A module in shards, one a rank, by FSDP2; `training/sharded.py` is the strategy that uses it.

- The decoder's layers are units of their own, gathered one after another in the forward and the
  backward pass, whether they train or not.
- Everything else that trains (projector, encoder, word embeddings) is one more unit, gathered for
  the length of a step. Its parts may be called any number of times, or not at all on a rank whose
  batch has no documents.
- What is frozen outside of the decoder's layers, and single numbers, are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(module, FSDPModule)


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shards a module in place, as this file's docstring says.

    Args:
        module: A module whose models (its own, and perhaps a teacher) may have a `decoder`, with
            its layers in an `nn.ModuleList`.
        mesh: The ranks, in one dimension.
    """
    for model in module.children():
        decoder = getattr(model, "decoder", None)
        for layer in _layers(decoder) if isinstance(decoder, nn.Module) else ():
            # FSDP2 takes no tensors without a dimension.
            scalars = {p for p in layer.parameters() if not p.ndim}
            fully_shard(layer, mesh=mesh, ignored_params=scalars)
    whole = {p for p in module.parameters() if not p.requires_grad or not p.ndim}
    fully_shard(module, mesh=mesh, ignored_params=whole)
    for unit in _units(module):
        # Whether a parameter trains is settled when it is gathered for the first time, which may
        # be while its adapter is off.
        unit.unshard()
        unit.reshard()
        # FSDP2 makes subclasses named FSDP…; what is printed is to name our own.
        kind = type(unit)
        kind.__name__ = kind.__mro__[kind._orig_cls_mro_index].__name__
    for part in module.modules():
        # By this flag transformers has ranks wait for one another while they generate. Here a rank
        # generates on its own.
        if hasattr(part, "_is_fsdp_managed_module"):
            part._is_fsdp_managed_module = False  # type: ignore[assignment]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from _layers(child)


def _units(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def gather_units(module: nn.Module) -> None:
    """Makes the whole model usable on every rank, without any further word between them."""
    for unit in _units(module):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


def release_units(module: nn.Module) -> None:
    """Goes back to shards, where `gather_units` was called."""
    for unit in _units(module):
        unit.reshard()
        # The outermost unit is kept from a forward pass to its backward pass.
        unit.set_reshard_after_forward(unit is not module, recurse=False)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Puts whole, ordinary parameters into the place of shards on the first rank, to be read.

    All ranks have to enter it. The module cannot be called meanwhile. Without shards it does
    nothing.

    Args:
        module: The module.
    """
    if not is_sharded(module):
        yield
        return
    release_units(module)
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                places.append((part, name, parameter))
                if parameter not in whole:
                    full = parameter.detach().full_tensor()
                    first = torch.distributed.get_rank() == 0
                    # Tied parameters stay tied; the other ranks have no use for them.
                    kept = full if first else full.new_empty(0)
                    whole[parameter] = nn.Parameter(kept, parameter.requires_grad)
    try:
        for part, name, parameter in places:
            part._parameters[name] = whole[parameter]
        yield
    finally:
        for part, name, parameter in places:
            part._parameters[name] = parameter
        torch.distributed.barrier()
