"""The tokenizers of the tiny models.

Most are trained on the Python language reference, which lies in every CPython (`pydoc_data.topics`,
about 460 kB of English); two have the words of invented biographies. The chat templates follow the
formats that the families document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from refrag_lightning.biographies import Biographies

_VOCAB_SIZE = 2000

_CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a tiny assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""

_SHORT_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""

# Words of chat templates and of instructions on documents, beside those of biographies.
_INSTRUCTION_WORDS = (
    "system user assistant Repeat Write Continue the text texts document documents above below "
    "word for it exactly again Answer question Question only from What follows next in"
)

_GEMMA = """\
{{- bos_token -}}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant must take turns, the user first') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' -}}
{{- (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""


def encoder() -> PreTrainedTokenizerFast:
    """Uncased WordPiece in the manner of BERT: accents are dropped."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    tokens, _ = _train_bpe(pre_tokenizers.BertPreTokenizer(), normalizer=normalizer, prefix="##")
    return _bert(tokens, normalizer)


def biography_encoder() -> PreTrainedTokenizerFast:
    """Uncased WordPiece with the words of the biographies of seed 0."""
    words = [word.lower() for word in _biography_words()]
    return _bert(words, normalizers.BertNormalizer(lowercase=True))


def biography_decoder() -> PreTrainedTokenizerFast:
    """WordPiece with the words of the biographies of seed 0, and ChatML.

    A word is the same token wherever it stands, which spares a tiny model from learning that
    "Paris" and " Paris" are one; but white space is lost, so a decoded text has single spaces.
    """
    special = ["<|endoftext|>", "<|unknown|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = _number([*dict.fromkeys([*special, *_biography_words()])])
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    roles = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|unknown|>",
    }
    return _wrap(tokenizer, special, roles, model_max_length=4096, template=_SHORT_CHATML)


def encoder_cased() -> PreTrainedTokenizerFast:
    """Cased byte-level BPE in the manner of RoBERTa: decoding is exact."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = _byte_level(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    roles = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return _wrap(tokenizer, special, roles, model_max_length=512)


def decoder() -> PreTrainedTokenizerFast:
    """Byte-level BPE and ChatML, as SmolLM2 and Qwen: nothing is put before a text."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(special)
    roles = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    return _wrap(tokenizer, special, roles, model_max_length=4096, template=_CHATML)


def llama3() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's control tokens; one is put before every text."""
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    tokenizer = _byte_level(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B:1",
        special_tokens=[("<|begin_of_text|>", 0)],
    )
    roles = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }
    return _wrap(tokenizer, special, roles, model_max_length=4096, template=_LLAMA3)


def gemma() -> PreTrainedTokenizerFast:
    """BPE on spaces written as `▁`, with raw bytes; Gemma puts `<bos>` before every text."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    normalizer = normalizers.Replace(" ", "▁")
    pre_tokenizer = pre_tokenizers.Split(Regex("▁+"), "merged_with_next")
    tokens, merges = _train_bpe(pre_tokenizer, normalizer=normalizer)
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = _number([*special, *raw_bytes, *tokens])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B:1", special_tokens=[("<bos>", 2)]
    )
    roles = {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
    }
    return _wrap(tokenizer, special, roles, model_max_length=4096, template=_GEMMA)


def _bert(tokens: list[str], normalizer: Any) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = _number([*dict.fromkeys([*special, *tokens])])
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    roles = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return _wrap(tokenizer, special, roles, model_max_length=512)


def _biography_words() -> list[str]:
    """The words of biographies and instructions, and every printable ASCII character.

    The characters stand for themselves and, after `##`, inside a word that is not among them.
    """
    characters = [chr(code) for code in range(33, 127)]
    words = [*Biographies(seed=0).words(), *_INSTRUCTION_WORDS.split()]
    inside = [f"##{character}" for character in characters if character.isalnum()]
    return [*words, *characters, *inside]


def _byte_level(special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer: every text comes back from its tokens exactly."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = _train_bpe(pre_tokenizer, alphabet=alphabet)
    tokenizer = Tokenizer(models.BPE(vocab=_number([*special, *tokens]), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_bpe(
    pre_tokenizer: Any, *, normalizer: Any = None, alphabet: Iterable[str] = (), prefix: str = ""
) -> tuple[list[str], list[tuple[str, str]]]:
    """Train BPE on the language reference.

    Returns:
        The tokens, single characters first and then in the order of the merges; and the merges.
    """

    def train(vocab_size: int, single: list[str]) -> dict[str, Any]:
        tokenizer = Tokenizer(models.BPE(continuing_subword_prefix=prefix))
        tokenizer.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=single,
            initial_alphabet=list(alphabet),
            continuing_subword_prefix=prefix,
            show_progress=False,
        )
        tokenizer.train_from_iterator(topics.values(), trainer)
        return json.loads(tokenizer.to_str())["model"]

    # The library numbers characters in a random order, and numbers decide between merges of equal
    # count: a first pass finds the characters, the second is given them in a fixed order.
    single = sorted(train(0, [])["vocab"])
    merges = [(left, right) for left, right in train(_VOCAB_SIZE, single)["merges"]]
    merged = [left + right.removeprefix(prefix) for left, right in merges]
    return list(dict.fromkeys([*single, *merged])), merges


def _number(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _wrap(
    tokenizer: Tokenizer,
    special: list[str],
    roles: dict[str, str],
    *,
    model_max_length: int,
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Make the special tokens special, and a transformers tokenizer of it."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=template,
        **roles,
    )
