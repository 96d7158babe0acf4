"""Loading the base encoder or decoder: through `hub`, whole, safetensors only, never their code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from refrag_lightning import hub
from refrag_lightning.model.files import check_finite, check_shards


def build_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """An encoder with random weights, without its pooler."""
    return see_both_ways(hub.build("AutoModel", config, **_encoder_arguments(config)))


def first_layers(config: PretrainedConfig, layers: hub.EncoderLayers) -> PretrainedConfig:
    """The configuration of a causal language model's first layers.

    Raises:
        ValueError: It has fewer layers.
    """
    text = deepcopy(config.get_text_config())
    if not layers.num_layers <= text.num_hidden_layers:
        raise ValueError(
            f"num_layers ({layers.num_layers}) is more than the {text.num_hidden_layers} layers of "
            f"{layers.layers_of}"
        )
    text.num_hidden_layers = layers.num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: layers.num_layers]
    # An encoder keeps nothing for a next token.
    text.use_cache = False
    text.is_causal = layers.causal
    return text


def see_both_ways(encoder: PreTrainedModel) -> PreTrainedModel:
    """Lets attention look ahead where the configuration says `is_causal: false`.

    transformers then builds the mask so; but without padding there is none, and each layer's own
    flag decides.
    """
    if not getattr(encoder.config.get_text_config(), "is_causal", True):
        for module in encoder.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False  # type: ignore[assignment]
    return encoder


def share_weights(encoder: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Puts the decoder's parameters in the place of the encoder's, which are equal.

    Args:
        encoder: The decoder's first layers.
        decoder: The causal language model, without an adapter.
    """
    ours = dict(decoder.base_model.named_parameters())
    for name, parameter in list(encoder.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        assert ours[name].shape == parameter.shape, name
        setattr(encoder.get_submodule(owner), leaf, ours[name])


def separate_weights(encoder: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Gives the encoder copies of the parameters that it shares with the decoder."""
    theirs = {id(parameter) for parameter in decoder.parameters()}
    for name, parameter in list(encoder.named_parameters()):
        if id(parameter) in theirs:
            owner, _, leaf = name.rpartition(".")
            copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(encoder.get_submodule(owner), leaf, copy)


def build_decoder(config: PretrainedConfig) -> PreTrainedModel:
    """A decoder with random weights."""
    model: PreTrainedModel = hub.build("AutoModelForCausalLM", config)
    return model


def load_base(
    part: str,
    name: str | hub.EncoderLayers,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, hub.ModelSource]:
    """Loads a base model in evaluation mode.

    Args:
        part: `encoder` or `decoder`.
        name: Hub name or folder; or the layers of one that are the encoder.
        revision: Hub branch, tag or commit.
        dtype: Of the weights.
        attn_implementation: As transformers takes it; its own choice if None.

    Returns:
        The model, and where it came from.

    Raises:
        ValueError: The model is not of a kind that fits the part, its file lacks weights or holds
            NaN or infinity, or its index of weights leads out of the folder.
    """
    layers = name if isinstance(name, hub.EncoderLayers) else None
    name = hub.encoder_name(name)
    source = hub.resolve(name, revision=revision)
    check_shards(Path(source.path))
    options: dict[str, Any] = {}
    if source.kind == "hub" and source.revision is not None:
        options["revision"] = source.revision
    config = hub.load("AutoConfig", source.path, **options)
    auto = "AutoModelForCausalLM"
    if part == "encoder":
        auto = "AutoModel"
        if config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder-decoder model; the encoder must be one alone")
        if layers is not None:
            config = first_layers(config, layers)
        options.update(_encoder_arguments(config))
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with quiet():
        model, info = hub.load(
            auto,
            source.path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if info["missing_keys"]:
        keys = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"{name} lacks {len(info['missing_keys'])} weights of {type(model).__name__} ({keys}), "
            f"so it cannot be the {part}"
        )
    if part == "encoder":
        see_both_ways(model)
    check_finite(model.named_parameters(), what=name)
    return model.eval(), source


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype from its name; float32 for None."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype ({dtype!r}) must be a floating-point type such as 'bfloat16'")
    return found


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters in place, but no buffers: rotary positions need theirs in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _encoder_arguments(config: PretrainedConfig) -> dict[str, Any]:
    """Leaves the pooler out where the class can: it is never read, so it would never train."""
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, (tuple, list)):
        model_class = model_class[0]
    if model_class is None:
        raise ValueError(f"{config.model_type!r} is no model type that AutoModel knows")
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        return {"add_pooling_layer": False}
    return {}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' bars and reports (the pooler left out is "unexpected")."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
