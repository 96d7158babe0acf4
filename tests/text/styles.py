"""Chat templates in the styles of well-known families, on the tiny decoder's tokenizer."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from tests.text.loading import hugging_face

_MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- '[INST] ' + m['content'] + ' [/INST]' -}}
{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}"""

# Llama 2's markers are plain text, and a space stands before the token that ends a turn.
_LLAMA2 = """\
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' -}}
{%- else -%}{{- ' ' + m['content'] | trim + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}"""

_VICUNA = """\
{{- 'A chat.' -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- ' USER: ' + m['content'] -}}
{%- else -%}{{- ' ASSISTANT: ' + m['content'] + '</s>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"""

# An empty block of reasoning before the last answer only, which the generation prompt lacks.
_QWEN3 = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' -}}
{%- if m['role'] == 'assistant' and loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{{- m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# Reasoning is opened by the generation prompt and dropped from turns that are over.
_REASONING = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"""

# Knows no generation prompt, though an answer is opened by more than the user's turn.
_UNPROMPTED = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}"""

# What is said to the system stands in the last user's turn, as in Mistral's later templates.
_LAST_SYSTEM = """\
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- '[INST] ' -}}
{%- if loop.last and messages[0]['role'] == 'system' -%}{{- messages[0]['content'] -}}{%- endif -%}
{{- m['content'] + '[/INST]' -}}
{%- elif m['role'] == 'assistant' -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}"""

_ENDS = ["<s>", "</s>"]
_INST = ["[INST]", "[/INST]"]
_EDGES: dict[str, str] = {"bos_token": "<s>", "eos_token": "</s>"}
_TEMPLATES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "llama2": (_LLAMA2, _ENDS, _EDGES),
    "mistral": (_MISTRAL, [*_ENDS, *_INST], _EDGES),
    "vicuna": (_VICUNA, _ENDS, _EDGES),
    "qwen3": (_QWEN3, [], {}),
    "reasoning": (_REASONING, [], {}),
    "unprompted": (_UNPROMPTED, [], {}),
    "last_system": (_LAST_SYSTEM, [*_ENDS, *_INST], _EDGES),
}
_OWN = {"chatml": "tiny/decoder", "llama3": "tiny/llama3", "gemma": "tiny/gemma"}

SEVEN = ("chatml", "llama2", "llama3", "mistral", "vicuna", "gemma", "qwen3")
STYLES = (*_OWN, *_TEMPLATES)


def decoder_of(style: str) -> str:
    """The tiny decoder whose tokenizer a style is on."""
    return _OWN.get(style, "tiny/decoder")


@cache
def styled(style: str) -> PreTrainedTokenizerBase:
    """A tokenizer with a style's template and control tokens."""
    tokenizer: Any = hugging_face(decoder_of(style))
    if style in _OWN:
        return tokenizer
    template, control, roles = _TEMPLATES[style]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": control, **roles})
    tokenizer.chat_template = template
    return tokenizer
