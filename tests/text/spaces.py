"""Small tokenizers that put an artificial space before a text, each in the way of a family."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Llama 2 and Mistral (Prepend, or Metaspace in later files), T5 (Unigram), RoBERTa (ByteLevel).
WAYS = ("always", "first", "never", "prepend", "whole", "byte")
KINDS = [(m, w) for m in ("bpe", "unigram") for w in WAYS if (m, w) != ("unigram", "byte")]

_TEXT = ["the river flows through the town", "a town by the old river", "user\nassistant\n"]
# What is said stands between control tokens, so that no token can straddle its edges.
TEMPLATE = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<turn>' + m['role'] + '<text>' + m['content'] + '</s>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<turn>assistant<text>' -}}{%- endif -%}"""


@cache
def spaced(model: str, way: str, *, opens: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer of a kind.

    Args:
        model: `bpe` or `unigram`.
        way: How the space is put: one of `WAYS`.
        opens: Whether texts are opened with `<s>`.
    """
    trainer: Any
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"])
    else:
        tokenizer = Tokenizer(models.Unigram())
        # `</s>` is a piece too, as in vocabularies that hold their control strings.
        trainer = trainers.UnigramTrainer(
            vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
        )
    metaspace = (
        pre_tokenizers.Metaspace(
            prepend_scheme={"prepend": "never", "whole": "first"}.get(way, way),
            split=way != "whole",
        )
        if way != "byte"
        else pre_tokenizers.ByteLevel(add_prefix_space=True)
    )
    tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.ByteLevel() if way == "byte" else decoders.Metaspace()
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    if way == "prepend":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    # Added tokens that are not special stand in texts too.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<turn>", "<text>", "<br>")])
    if opens:
        start = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def said(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """What tokens say, with every space that they have."""
    tokens = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    return "".join(tokens).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
