import pytest
import torch
from transformers import AutoConfig

from refrag_lightning.model import RefragConfig, RefragModel

TINY_ENCODER = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 63,
}
# The factors are far from 1, so that a head that leaves one out cannot pass.
DECODERS = {
    "llama": {**SMALL, "model_type": "llama"},
    "mistral": {**SMALL, "model_type": "mistral", "sliding_window": 4},
    "qwen2": {**SMALL, "model_type": "qwen2"},
    "qwen3": {**SMALL, "model_type": "qwen3"},
    "phi3": {**SMALL, "model_type": "phi3"},
    "gemma2": {**SMALL, "model_type": "gemma2", "final_logit_softcapping": 3.0},
    "gemma3": {
        **SMALL,
        "model_type": "gemma3_text",
        "final_logit_softcapping": 3.0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {
        **SMALL,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
    },
    "granite": {**SMALL, "model_type": "granite", "logits_scaling": 8.0},
    "cohere": {**SMALL, "model_type": "cohere", "logit_scale": 0.25},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 63,
    },
}


def build(decoder="llama", **options):
    """A random model with weights large enough for differences to show."""
    values = dict(DECODERS[decoder])
    config = RefragConfig(
        encoder_config=TINY_ENCODER,
        decoder_config=AutoConfig.for_model(values.pop("model_type"), **values),
        **{"compression": 4, **options},
    )
    torch.manual_seed(0)
    model = RefragModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name or "wte" in name else 0.2)
    model.set_trainable(["projector"])
    return model


@pytest.fixture
def model():
    return build()


@pytest.fixture
def based():
    """A model made of base models on disk."""
    return RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)
