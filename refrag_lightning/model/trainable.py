"""What trains, and what differs from the base models: flags, checkpoint tensors, saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from refrag_lightning.model.adapter import add_adapter, base_key, is_adapter_key
from refrag_lightning.model.base import separate_weights
from refrag_lightning.model.config import PARTS, complete_lora

# The pooling's learned query trains and is saved with the projector.
PREFIXES: dict[str, tuple[str, ...]] = {
    "projector": ("projector.", "pool."),
    "encoder": ("encoder.",),
    "decoder": ("decoder.",),
}


def part_of(name: str) -> str:
    """The part (`projector`, `encoder`, `decoder`) that a parameter's name belongs to."""
    for part, prefix in PREFIXES.items():
        if name.startswith(prefix):
            return part
    raise ValueError(f"{name!r} belongs to no part of the model")


class TrainingRecord(Protocol):
    """What is known of how a model differs from its bases; `RefragConfig` is one."""

    trained: list[str] | None
    train_word_embeddings: bool
    lora: dict[str, Any] | None

    @property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """The settings of each part's LoRA, by part."""
        raise NotImplementedError


class TrainableParts(nn.Module):
    """The methods of `RefragModel` and `PlainModel` that say what trains."""

    part_names: ClassVar[tuple[str, ...]] = PARTS
    decoder: Any

    @property
    def record(self) -> TrainingRecord:
        """Where it is written what differs from the bases."""
        raise NotImplementedError

    @property
    def base_models(self) -> tuple[Any, ...]:
        """The models of transformers within."""
        raise NotImplementedError

    def set_trainable(
        self,
        parts: Iterable[str],
        *,
        lora: dict[str, Any] | None = None,
        encoder_lora: dict[str, Any] | None = None,
        train_word_embeddings: bool = False,
    ) -> None:
        """Chooses what requires gradients; everything else is frozen.

        Parts that trained earlier still count as different from their bases, and are saved.

        Args:
            parts: Any of `projector`, `encoder`, `decoder` that the model has.
            lora: Adds an adapter to the decoder: any of `r`, `alpha`, `dropout`,
                `target_modules`. Once the decoder has one, `decoder` trains the adapter alone.
            encoder_lora: The same for the encoder.
            train_word_embeddings: Whether the word embeddings of the parts (and a head tied to
                them) train as well.

        Raises:
            ValueError: An unknown part, or an adapter that does not fit.
        """
        parts = list(parts)
        record = self.record
        if unknown := sorted(set(parts).difference(self.part_names)):
            raise ValueError(f"parts ({unknown}) must be among {list(self.part_names)}")
        self._separate(parts, {"encoder": encoder_lora, "decoder": lora})
        for part, setting, wanted in (
            ("encoder", "encoder_lora", encoder_lora),
            ("decoder", "lora", lora),
        ):
            if wanted is not None:
                self._add_adapter(part, setting, parts, complete_lora(wanted))

        adapted = set(record.adapters)
        frozen = set() if train_word_embeddings else _word_embeddings(self)
        for name, parameter in self.named_parameters():
            part = part_of(name)
            trains = part in parts and id(parameter) not in frozen
            if part in adapted:
                trains = part in parts and is_adapter_key(name)
            # A pooler that could not be left out is never read, so it gets no gradient.
            if part == "encoder" and ".pooler." in name:
                trains = False
            parameter.requires_grad_(trains)

        changed = set(parts) - adapted
        record.trained = [part for part in PARTS if part in changed.union(record.trained or ())]
        if train_word_embeddings and changed.difference({"projector"}):
            record.train_word_embeddings = True
        self.train(self.training)

    def _add_adapter(self, part: str, setting: str, parts: list[str], lora: dict[str, Any]) -> None:
        if part not in parts:
            raise ValueError(f"{setting} was given, but parts ({parts}) leave out the {part}")
        present = self.record.adapters.get(part)
        if present is None:
            add_adapter(getattr(self, part), lora)
            setattr(self.record, setting, lora)
        elif present != lora:
            raise ValueError(
                f"the {part} has an adapter ({present}) other than the one asked for ({lora})"
            )

    def _separate(self, parts: list[str], loras: Mapping[str, dict[str, Any] | None]) -> None:
        """Takes shared weights apart where the base of the encoder or the decoder is to move."""
        adapted = {part for part, lora in loras.items() if lora is not None}
        moved = {"encoder", "decoder"}.intersection(parts) - adapted - set(self.record.adapters)
        if moved and len(self.base_models) == 2:
            separate_weights(*self.base_models)

    def parts(self, name: str) -> list[nn.Parameter]:
        """The parameters of `projector`, `encoder` or `decoder` that require gradients."""
        if name not in PREFIXES:
            raise ValueError(f"part ({name!r}) must be one of {', '.join(PREFIXES)}")
        return [
            parameter
            for key, parameter in self.named_parameters()
            if parameter.requires_grad and part_of(key) == name
        ]

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Exactly the tensors that require gradients, by name: what a checkpoint holds."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def load_trained_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies `trained_state_dict` back; names that do not match exactly raise ValueError."""
        parameters = {n: p for n, p in self.named_parameters() if p.requires_grad}
        copy_exactly(parameters, state, what="the checkpoint")

    def train(self, mode: bool = True) -> TrainableParts:
        """Sets training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.base_models:
            if mode and not requires_gradients(part):
                part.eval()
                for layer in _checkpointed(part):
                    # By this flag the layer checkpoints; it runs in evaluation mode all the same.
                    layer.training = True
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recomputes the decoder's activations in the backward pass instead of storing them."""
        arguments = gradient_checkpointing_kwargs or {"use_reentrant": False}
        _renamed(self.decoder, "checkpointing_enable")(arguments, **options)
        for layer in _checkpointed(self.decoder):
            function: Any = layer._gradient_checkpointing_func
            own: Any = partial(_in_its_parts_mode, layer, function)
            layer._gradient_checkpointing_func = own
        self.train(self.training)

    def gradient_checkpointing_disable(self) -> None:
        """Stores the decoder's activations again."""
        _renamed(self.decoder, "checkpointing_disable")()
        self.train(self.training)


def _checkpointed(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers whose activations are computed again in the backward pass."""
    layers = (part for part in model.modules() if isinstance(part, GradientCheckpointingLayer))
    return [layer for layer in layers if layer.gradient_checkpointing]


def _in_its_parts_mode(
    layer: nn.Module, checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoints a layer whose own dropout is on only where that of its parts is.

    Some layers (OPT's) have dropout of their own, which goes by the flag that turns checkpointing
    on; a frozen layer would then have dropout.
    """

    def in_mode(*args: Any) -> Any:
        before = layer.training
        layer.training = any(part.training for part in layer.children())
        try:
            return run(*args)
        finally:
            layer.training = before

    return checkpoint(in_mode, *args)


def _renamed(decoder: Any, name: str) -> Any:
    """A method that is `gradient_...` up to some release of transformers 5, then `activation_...`.

    Where both exist, the old name warns.
    """
    new = getattr(decoder, f"activation_{name}", None)
    return getattr(decoder, f"gradient_{name}") if new is None else new


def requires_gradients(module: nn.Module) -> bool:
    """Whether any parameter of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


@torch.no_grad()
def copy_exactly(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], *, what: str) -> None:
    """Copies tensors by name, in place.

    Args:
        targets: Where to.
        state: Where from.
        what: What `state` is, for the message.

    Raises:
        ValueError: The names are not the same on both sides, or a shape differs.
    """
    missing = sorted(set(targets).difference(state))
    unexpected = sorted(set(state).difference(targets))
    if missing or unexpected:
        raise ValueError(
            f"{what} does not fit the model: {_some('missing', missing)}, "
            f"{_some('unexpected', unexpected)}"
        )
    for name, target in targets.items():
        if target.shape != state[name].shape:
            raise ValueError(
                f"{what} does not fit the model: {name} has shape {tuple(state[name].shape)}, "
                f"the model's {tuple(target.shape)}"
            )
        target.copy_(state[name])


def saved_tensors(model: TrainableParts, *, full: bool) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`: what differs from the bases, or everything.

    Each tensor stands once (a tied head is left out), under the name that it has without an
    adapter; the adapter's own are not among them.
    """
    config = model.record
    frozen = set() if config.train_word_embeddings or full else _word_embeddings(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        differs = part_of(name) in (config.trained or ()) and id(tensor) not in frozen
        if (full or differs) and not is_adapter_key(name):
            tensors[base_key(name)] = tensor
    return tensors


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    stored = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def _word_embeddings(model: TrainableParts) -> set[int]:
    """Identities of both models' word embeddings; a head tied to them has the same."""
    return {
        id(parameter)
        for part in model.base_models
        for parameter in part.get_input_embeddings().parameters()
    }


def _some(what: str, names: list[str]) -> str:
    if not names:
        return f"nothing {what}"
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {what} ({shown})"
