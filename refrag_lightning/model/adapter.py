"""LoRA on the decoder and the encoder, through peft, in peft's own layout on disk."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from refrag_lightning.model.decoder import word_embeddings
from refrag_lightning.model.files import check_finite

ADAPTER = "default"


def add_adapter(decoder: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Puts LoRA layers into a model in place; it stays a plain model of transformers.

    The layers are float32 whatever the model is: small steps would be lost in bfloat16.

    Args:
        decoder: The causal language model, or an encoder.
        lora: `r`, `alpha`, `dropout`, `target_modules`, all given.

    Raises:
        ValueError: peft cannot adapt one of the layers, or the decoder cannot run with it.
    """
    try:
        decoder.add_adapter(_peft_config(decoder, lora), adapter_name=ADAPTER)
        if any(type(layer.base_layer) not in (nn.Linear, Conv1D) for _, layer in _layers(decoder)):
            _try(decoder)
    except Exception as error:
        raise ValueError(
            f"{type(decoder).__name__} cannot have lora with target_modules "
            f"({lora['target_modules']!r}) and dropout ({lora['dropout']}): {error}; name other "
            "target_modules, such as those of its attention"
        ) from error
    for name, parameter in decoder.named_parameters():
        if is_adapter_key(name):
            parameter.data = parameter.data.float()


@contextmanager
def without_adapter(decoder: PreTrainedModel) -> Iterator[None]:
    """The decoder as it was before its adapter, for a teacher; without one nothing changes."""
    if not getattr(decoder, "_hf_peft_config_loaded", False):
        yield
        return
    # peft lets an adapter train when it enables it, whether it did before or not.
    trained = {
        parameter: parameter.requires_grad
        for name, parameter in decoder.named_parameters()
        if is_adapter_key(name)
    }
    decoder.disable_adapters()
    try:
        yield
    finally:
        decoder.enable_adapters()
        for parameter, trains in trained.items():
            parameter.requires_grad_(trains)


def is_adapter_key(name: str) -> bool:
    """Whether a parameter's name belongs to an adapter."""
    return ".lora_" in name


def base_key(name: str) -> str:
    """A parameter's name as the decoder has it without an adapter."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def save_adapter(
    decoder: PreTrainedModel,
    folder: Path,
    *,
    base_name: str | None,
    base_revision: str | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which peft itself loads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    state = _adapter_state(decoder)
    prefixed = {f"base_model.model.{key}": _for_disk(value, dtype) for key, value in state.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # As peft has it, with the layers that "all-linear" stood for, so that it finds the same ones
    # elsewhere.
    config = copy.deepcopy(_adapter_of(decoder))
    config.base_model_name_or_path = base_name
    # peft reads this as a Hub revision; a digest of a local copy is none.
    is_commit = base_revision is not None and not base_revision.startswith("sha256:")
    config.revision = base_revision if is_commit else None
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_adapter(decoder: PreTrainedModel, folder: Path) -> None:
    """Loads an adapter's weights into layers that `add_adapter` made.

    Raises:
        ValueError: The file does not hold exactly these layers, or holds NaN or infinity.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = {
        key.removeprefix("base_model.model."): value
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    check_finite(state.items(), what=f"the adapter in {folder}")
    expected = set(_adapter_state(decoder))
    if wrong := sorted(expected.symmetric_difference(state)):
        raise ValueError(
            f"the adapter in {folder} does not fit the decoder: {len(wrong)} keys differ "
            f"({', '.join(wrong[:3])})"
        )
    set_peft_model_state_dict(decoder, state, adapter_name=ADAPTER)


def merged_state_dict(decoder: PreTrainedModel) -> dict[str, Tensor]:
    """The decoder's weights with its adapter added, by the names that it has without one.

    The decoder itself stays as it is. Sums are made in float32 and rounded once.

    Returns:
        As `state_dict` of the decoder without an adapter. What the adapter changes is on the CPU;
        the rest shares memory with the decoder.

    Raises:
        ValueError: If the adapter changes the word embeddings, or a head that is tied to them.
    """
    state = {
        base_key(name): tensor.detach()
        for name, tensor in decoder.state_dict().items()
        if not is_adapter_key(name)
    }
    embeddings = word_embeddings(decoder).weight
    for name, module in decoder.named_modules():
        if ADAPTER in getattr(module, "lora_embedding_A", ()):
            raise ValueError(f"an adapter on word embeddings ({name}) cannot be merged")
    for name, layer in _layers(decoder):
        # Experts are one parameter of their module, which has a layer around it for each.
        key = base_key(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")
        weight = state[key]
        if weight.data_ptr() == embeddings.data_ptr():
            raise ValueError(
                f"an adapter on a head ({name}) that is tied to the word embeddings cannot be "
                "merged"
            )
        merged = (weight.float() + layer.get_delta_weight(ADAPTER).detach().float()).to(
            weight.dtype
        )
        # Off the device: beside the model there may be no room for a second one.
        state[key] = merged.cpu()
    return state


def _layers(decoder: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The layers that have LoRA, by name."""
    for name, module in decoder.named_modules():
        if ADAPTER in getattr(module, "lora_A", ()):
            yield name, module


@torch.no_grad()
def _try(decoder: PreTrainedModel) -> None:
    """Runs the decoder on a few tokens."""
    decoder(input_ids=torch.arange(2, device=decoder.device)[None])


def _adapter_state(decoder: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's own tensors, by peft's names."""
    from peft import get_peft_model_state_dict

    # Left to itself peft looks for the base model's configuration, on the Hub too, to find out
    # whether the vocabulary has grown since.
    return get_peft_model_state_dict(decoder, adapter_name=ADAPTER, save_embedding_layers=False)


def _adapter_of(decoder: PreTrainedModel) -> Any:
    return decoder.peft_config[ADAPTER]


def _peft_config(model: PreTrainedModel, lora: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        task_type="FEATURE_EXTRACTION" if model.get_output_embeddings() is None else "CAUSAL_LM",
    )


def _for_disk(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()
