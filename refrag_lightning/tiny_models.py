"""Tiny random models with their own tokenizers, for tests and for `configs/tiny/`.

Each has hidden size 64, two layers and a vocabulary of about 2000 tokens. The decoders differ in
what real families differ in: chat template, control tokens, kind of tokenizer, scaling of the
embeddings. The pair for biographies is twice as wide and knows their words: large enough to learn
from nothing to answer questions on them. Importing this module is cheap; torch and transformers
load when a model is built.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAMES = (
    "tiny/encoder",
    "tiny/encoder-cased",
    "tiny/decoder",
    "tiny/gemma",
    "tiny/llama3",
    "tiny/qwen3",
    "tiny/biography-encoder",
    "tiny/biography-decoder",
)

_SEED = 20240
_SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER_SIZES: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def build(name: str, folder: Path) -> None:
    """Write a tiny model and its tokenizer into a folder; the same files every time.

    Args:
        name: one of `NAMES`.
        folder: receives config, weights and tokenizer.

    Raises:
        ValueError: there is no such name.
    """
    if name not in NAMES:
        raise ValueError(f"there is no tiny model {name!r}; there are {', '.join(NAMES)}")
    from refrag_lightning import tiny_tokenizers

    families = {
        "tiny/encoder": (tiny_tokenizers.encoder, _encoder),
        "tiny/encoder-cased": (tiny_tokenizers.encoder_cased, _encoder_cased),
        "tiny/decoder": (tiny_tokenizers.decoder, _decoder),
        "tiny/gemma": (tiny_tokenizers.gemma, _gemma),
        "tiny/llama3": (tiny_tokenizers.llama3, _llama3),
        "tiny/qwen3": (tiny_tokenizers.decoder, _qwen3),
        "tiny/biography-encoder": (tiny_tokenizers.biography_encoder, _biography_encoder),
        "tiny/biography-decoder": (tiny_tokenizers.biography_decoder, _biography_decoder),
    }
    make_tokenizer, make_config = families[name]
    tokenizer = make_tokenizer()
    model = _model(make_config(len(tokenizer)), decoder=tokenizer.chat_template is not None)
    with without_progress_bars():
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars for work that takes a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """A short hash of what the files depend on: this recipe, the corpus and the libraries."""
    libraries = [f"{name}={version(name)}" for name in ("torch", "transformers", "tokenizers")]
    recipe = [
        Path(__file__).with_name(f"{name}.py")
        for name in ("tiny_models", "tiny_tokenizers", "biographies")
    ]
    parts = [*(path.read_text() for path in recipe), sys.version, *libraries]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _encoder(vocab_size: int) -> PretrainedConfig:
    from transformers import BertConfig

    return BertConfig(
        **_SIZES, vocab_size=vocab_size, intermediate_size=128, max_position_embeddings=512
    )


def _encoder_cased(vocab_size: int) -> PretrainedConfig:
    from transformers import RobertaConfig

    # RoBERTa counts positions from the padding id + 1: two more than it can read.
    return RobertaConfig(
        **_SIZES,
        vocab_size=vocab_size,
        intermediate_size=128,
        max_position_embeddings=514,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        type_vocab_size=1,
    )


def _decoder(vocab_size: int) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        **_DECODER_SIZES,
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _llama3(vocab_size: int) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        **_DECODER_SIZES,
        vocab_size=vocab_size,
        bos_token_id=0,
        eos_token_id=[1, 5],
        pad_token_id=2,
    )


def _qwen3(vocab_size: int) -> PretrainedConfig:
    from transformers import Qwen3Config

    return Qwen3Config(
        **_DECODER_SIZES,
        head_dim=16,
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _gemma(vocab_size: int) -> PretrainedConfig:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **_DECODER_SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size=vocab_size,
        pad_token_id=0,
        eos_token_id=[1, 5],
        bos_token_id=2,
    )


def _biography_encoder(vocab_size: int) -> PretrainedConfig:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=384,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _biography_decoder(vocab_size: int) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        vocab_size=vocab_size,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )


def _model(config: PretrainedConfig, *, decoder: bool) -> PreTrainedModel:
    """A randomly initialised model; the caller's random state stays as it is.

    Embeddings have a standard deviation of 0.5 and matrices of 0.05: at this width the usual 0.02
    leaves a model that hardly learns.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        kind = AutoModelForCausalLM if decoder else AutoModel
        model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
    generator = torch.Generator().manual_seed(_SEED)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                std = 0.5 if id(parameter) in embeddings else 0.05
                parameter.normal_(std=std, generator=generator)
    return model.eval()
