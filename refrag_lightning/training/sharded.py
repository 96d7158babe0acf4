"""FSDP2: what trains, its gradients and the optimiser's state in shards, one a rank.

`trainer.strategy.class_path: refrag_lightning.training.ShardedStrategy` is Lightning's
`ModelParallelStrategy` with a rule for what is sharded (see `shards.py`), so that a module needs no
code for it.

During validation and test every rank holds the whole model (not the optimiser's state): the ranks
may then have different numbers of batches, and write answers of different lengths.

A checkpoint holds what trains, and nothing else: in one file as that of any other run, or with
`save_distributed_checkpoint` a folder to which each rank writes its shards.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from refrag_lightning.training.shards import gather_units, is_sharded, release_units, shard

META = "meta.pt"
"""The file of a checkpoint's folder that holds everything but tensors in shards."""

# What the list of a checkpoint's shards is made of; data types of torch beside them.
_LISTED = {
    *(("torch", "Size"), ("torch.serialization", "_get_layout")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


class ShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks, by FSDP2; see the module's docstring.

    Args:
        save_distributed_checkpoint: Write a checkpoint as a folder, each rank its shards; several
            nodes then need a file system that all of them see. False writes one file, through the
            first rank's memory.
        process_group_backend: Such as nccl or gloo; what suits the devices if None.
    """

    def __init__(
        self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Starts the processes, with a mesh of all of them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def module(self) -> LightningModule:
        """The module that trains."""
        assert self.lightning_module is not None
        return self.lightning_module

    def setup(self, trainer: Trainer) -> None:
        """Shards the module, which its checkpoint was loaded into, and builds the optimisers."""
        if trainer.state.fn == TrainerFn.FITTING and not is_sharded(self.module):
            shard(self.module, self.device_mesh["data_parallel"])
        super().setup(trainer)

    # A step goes through the module's own forward, where the outermost unit is gathered.

    def _redirected(self, step: str, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not is_sharded(module):
            return getattr(module, step)(*args, **kwargs)
        return self._forward_redirection(module, module, step, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's training step."""
        with self.precision_plugin.train_step_context():
            return self._redirected("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's validation step."""
        with self.precision_plugin.val_step_context():
            return self._redirected("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's test step."""
        with self.precision_plugin.test_step_context():
            return self._redirected("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's prediction step."""
        with self.precision_plugin.predict_step_context():
            return self._redirected("predict_step", *args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients of what trains but is whole on every rank."""
        super().post_backward(closure_loss)
        whole = [p for p in self.module.parameters() if p.requires_grad and p.ndim == 0]
        if not whole:
            return
        # A gradient that was averaged before, and then added to, stays right: means are linear.
        sums = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in whole])
        torch.distributed.all_reduce(sums)
        for parameter, total in zip(whole, sums, strict=True):
            parameter.grad = total / self.world_size

    def on_validation_start(self) -> None:
        """Gathers the whole model on every rank."""
        super().on_validation_start()
        gather_units(self.module)

    def on_validation_end(self) -> None:
        """Goes back to shards."""
        super().on_validation_end()
        release_units(self.module)

    def on_test_start(self) -> None:
        """Gathers the whole model on every rank."""
        super().on_test_start()
        gather_units(self.module)

    def on_test_end(self) -> None:
        """Goes back to shards."""
        super().on_test_end()
        release_units(self.module)

    # Checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded into the module before it is sharded."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimisers' state is loaded after the module was sharded, when they exist."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains: shards, or whole tensors on the first rank."""
        release_units(self.module)
        state = self.module.state_dict()
        return state if self._save_distributed_checkpoint else self._on_first_rank(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state: shards, or whole tensors on the first rank."""
        state = optimizer.state_dict()
        if self._save_distributed_checkpoint:
            return state
        entries = {key: self._on_first_rank(entry) for key, entry in state["state"].items()}
        return state | {"state": entries}

    def _on_first_rank(self, state: dict[str, Any]) -> dict[str, Any]:
        whole = {}
        for key, value in state.items():
            # One tensor at a time is whole on the device.
            full = value.full_tensor().cpu() if isinstance(value, DTensor) else value
            if self.is_global_zero:
                whole[key] = full
        return whole

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Writes a file, or a folder of shards; all ranks have to call it."""
        if not self._save_distributed_checkpoint:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        folder = Path(self.broadcast(str(filepath)))
        rest = dict(checkpoint)
        tensors = {f"state_dict/{name}": value for name, value in rest.pop("state_dict").items()}
        rest["optimizer_states"] = optimizers = []
        for number, state in enumerate(checkpoint.get("optimizer_states", [])):
            optimizers.append({"param_groups": state["param_groups"]})
            for index, entries in state["state"].items():
                for key, value in entries.items():
                    tensors[f"optimizer_{number}/{index}/{key}"] = torch.as_tensor(value)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
        if self.is_global_zero:
            torch.save(rest, folder / META)
        self.barrier("checkpoint written")

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a file or a folder, whichever way this run writes its own."""
        path = Path(self.broadcast(str(checkpoint_path)))
        self._shards = path if path.is_dir() else None
        if self._shards is None:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        if not (path / META).is_file():
            raise FileNotFoundError(f"{path} is no checkpoint: it has no {META}")
        checkpoint = torch.load(path / META, map_location="cpu", weights_only=weights_only)
        checkpoint["state_dict"] = _read(path, "state_dict/")
        return checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Loads what trains, before it is sharded."""
        self.module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Loads the optimisers' state, each rank its shards."""
        saved = checkpoint["optimizer_states"]
        for number, (optimizer, state) in enumerate(zip(self.optimizers, saved, strict=True)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if self._shards is not None:
                state = state | {"state": self._read_optimizer(number, parameters)}
            entries = {
                index: {key: _like(value, parameters[index]) for key, value in entry.items()}
                for index, entry in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": entries})

    def _read_optimizer(
        self, number: int, parameters: list[nn.Parameter]
    ) -> dict[int, dict[str, Any]]:
        assert self._shards is not None
        prefix = f"optimizer_{number}/"
        like = {f"{prefix}{index}/": parameter for index, parameter in enumerate(parameters)}
        state: dict[int, dict[str, Any]] = {}
        for name, value in _read(self._shards, prefix, like).items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
        return state


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """A whole tensor of a parameter's shape as this rank's shard of it; all else as it is."""
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    # Every rank has the whole, so nothing need be sent.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _read(
    folder: Path, prefix: str, like: dict[str, nn.Parameter] | None = None
) -> dict[str, Tensor]:
    """The tensors of a folder whose names begin with `prefix`, which is taken off.

    Args:
        folder: The checkpoint.
        prefix: Beginning of their names.
        like: Beginning of a name up to its last `/` -> a parameter in shards. A tensor of the same
            shape is read as such shards; all else is read whole.
    """
    reader = _Reader(folder)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not name.startswith(prefix):
            continue
        assert isinstance(entry, dcp.metadata.TensorStorageMetadata), name
        parameter = (like or {}).get(name.rpartition("/")[0] + "/")
        if isinstance(parameter, DTensor) and entry.size == parameter.shape:
            tensors[name] = torch.zeros_like(parameter, dtype=entry.properties.dtype).detach()
        else:
            tensors[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
    dcp.load(tensors, storage_reader=reader)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


class _Reader(dcp.FileSystemReader):
    """Reads shards without running code: torch's own reader takes any pickle as their list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.metadata.Metadata:
        """Which tensors there are, and in which file of the folder.

        Raises:
            ValueError: If the list is none, holds code, or names a file that is not in the folder.
        """
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            try:
                metadata = _Unpickler(file).load()
                files = {entry.relative_path for entry in metadata.storage_data.values()}
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
                raise ValueError(f"{path} is no list of a checkpoint's shards: {error}") from error
        for name in sorted(files):
            if Path(name).name != name:
                raise ValueError(f"{path} names {name!r}; a shard lies in the checkpoint itself")
        metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _LISTED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, and code is not run")
        return super().find_class(module, name)
