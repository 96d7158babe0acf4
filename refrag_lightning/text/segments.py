"""Segments: what the decoder reads, as a list of texts that are tokenized apart from each other.

A prompt becomes text outside documents, and for each document a header, its text and a footer; the
tags themselves are dropped. A conversation becomes the same between the pieces of the decoder's
chat template: the template is applied to placeholders and the contents are put in afterwards, so
that a template which trims or rewrites its messages cannot change a document, and nothing that a
document, a title or a user says can become a control token.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from refrag_lightning.text.documents import Document, Part, parse
from refrag_lightning.text.plain import After, PlainTokenizer, control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

# Letters and digits only: templates trim and split at white space and at marks.
_PLACEHOLDER = "REFRAGCONTENT{}X"
_PLACEHOLDERS = re.compile(r"REFRAGCONTENT(\d+)X")
_VALUE = "REFRAGVALUE{}X"
_VALUES = re.compile(r"REFRAGVALUE(\d+)X")
_FIELD = re.compile(r"( *)\{(id|title)\}")
_ROLE = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Segment:
    """One stretch of what the decoder reads.

    Attributes:
        text: Its text.
        kind: `text` outside documents, `header`, `document`, `footer`, or `template`, the only
            kind in which control strings become control tokens.
        document: The document that a `document` segment holds.
        train: Whether the decoder is trained to write its tokens; never those of a document, which
            may stand as vectors.
        after: What stands before it, where that is not the segment before: of a text that was cut,
            say, or one behind a token that stands for its beginning.

    Raises:
        ValueError: If a document is to be trained.
    """

    text: str
    kind: Literal["text", "header", "document", "footer", "template"]
    document: Document | None = None
    train: bool = False
    after: After | None = None

    def __post_init__(self) -> None:
        if self.train and self.document is not None:
            raise ValueError(
                f"a document cannot be what the decoder learns to write; make the text that starts "
                f"with {self.text[:40]!r} a segment of kind 'text'"
            )


def render(
    parts: Iterable[Part],
    *,
    header: str,
    footer: str,
    first_number: int = 1,
    train: bool = False,
) -> list[Segment]:
    """Turns strings and documents into segments; empty texts are left out, documents never.

    Args:
        parts: As `documents.parse` gives them.
        header: Stands before each document, with `{id}` and `{title}` filled in; the spaces before
            an empty title are left out.
        footer: Stands after each document.
        first_number: Position of the first document, for documents without an id.
        train: Whether the texts outside documents are what the decoder learns to write.

    Raises:
        ValueError: If a part is neither a string nor a document.
    """
    segments: list[Segment] = []
    number = first_number
    for part in parts:
        if isinstance(part, str):
            if part:
                segments.append(Segment(part, "text", train=train))
            continue
        if not isinstance(part, Document):
            raise ValueError(f"a text's parts are strings and documents, got {part!r}")
        fields = {"id": part.id or str(number), "title": part.title}
        number += 1
        filled = _fill(header, fields)
        if filled:
            segments.append(Segment(filled, "header"))
        segments.append(Segment(part.text, "document", replace(part, id=fields["id"])))
        if footer:
            segments.append(Segment(footer, "footer"))
    return segments


def _fill(header: str, fields: Mapping[str, str]) -> str:
    # Not str.format: a header may hold other braces, and a title what looks like a field. The
    # spaces before an empty field go with it.
    return _FIELD.sub(lambda match: fields[match[2]] and match[1] + fields[match[2]], header)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    header: str,
    footer: str,
    add_generation_prompt: bool = True,
    strict: bool = True,
    **template_options: Any,
) -> list[Segment]:
    """Turns a conversation into segments with the decoder's chat template.

    What the assistant says is marked as what the decoder learns to write: the texts of its
    messages, and behind each of them the template's piece up to and with its first control token,
    which ends the turn.

    What stands before an answer is the generation prompt, since that is what answers are generated
    from. Where the template writes more between the two, white space belongs to the answer
    (`[/INST] Paris`), and a block such as Qwen3's empty `<think>` is left out before the last
    answer. An earlier answer before which the template writes something else than its generation
    prompt was (a template that drops the reasoning of earlier turns, but opens it in the prompt)
    is not learnt, with a warning; give the conversation up to it as one of its own. An answer that
    opens the conversation stands as the template has it.

    Args:
        tokenizer: The decoder's tokenizer; its chat template is applied.
        messages: Each with `role` and `content`; a content is a text, in which `<doc>` blocks are
            parsed, or a list of strings and documents. An assistant's message with `train` False is
            not learnt. Other fields (`name`, `tool_calls`, ...) are for the template; where it says
            a string of theirs that could become a control token, that stands as ordinary text.
        header: As in `render`.
        footer: As in `render`.
        add_generation_prompt: Whether the template opens an answer at the end. If it knows no
            generation prompt, what it writes before an answer opens one.
        strict: As in `documents.parse`.
        **template_options: Passed to the template (`tools`, ...), strings in them treated alike.

    Raises:
        ValueError: If the tokenizer has no chat template, a message is not of that form, the
            template refuses the conversation, or it leaves a message out.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template")
    contents: list[tuple[list[Part], int]] = []
    num_documents = 0
    placeholders: list[dict[str, Any]] = []
    values: list[str] = []
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"message {index} needs a role and a content, got {dict(message)!r}")
        if not _ROLE.fullmatch(message["role"]) or "REFRAG" in message["role"]:
            # It goes through the template, where a control string would become a control token.
            raise ValueError(f"message {index} has {message['role']!r} as its role, no plain word")
        content = message["content"]
        if isinstance(content, str):
            parts = parse(content, strict=strict, first_number=num_documents + 1)
        elif isinstance(content, Sequence):
            parts = [*content]
        else:
            raise ValueError(f"message {index} needs a text or a list as content, got {content!r}")
        contents.append((parts, num_documents + 1))
        num_documents += sum(isinstance(part, Document) for part in parts)
        fields = {k: v for k, v in message.items() if k not in ("role", "content", "train")}
        placeholders.append(
            {
                "role": message["role"],
                "content": _PLACEHOLDER.format(index),
                **_guarded(fields, tokenizer, values),
            }
        )
    for name in template_options.keys() - {"chat_template"}:
        template_options[name] = _guarded(template_options[name], tokenizer, values)

    def apply(turns: Sequence[Any], opened: bool) -> str:
        try:
            rendered = tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=opened, **template_options
            )
        except Exception as error:  # Jinja's own errors, and whatever a template raises
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return str(rendered)

    if add_generation_prompt:
        rendered = _generation_prompt(apply, placeholders)
    else:
        rendered = apply(placeholders, False)
    answers: dict[int, _Answer] = {}
    for index in reversed(range(1, len(messages))):
        if messages[index]["role"] != "assistant":
            continue
        try:
            prompt = _generation_prompt(apply, placeholders[:index])
        except ValueError:
            continue  # nobody can ask for an answer here, so it stands as the template has it
        before, place, behind = rendered.partition(_PLACEHOLDER.format(index))
        spaces = _spaces_between(prompt, before)
        if place and index == len(messages) - 1 and not add_generation_prompt:
            before = prompt + spaces
            rendered = before + place + behind
        answers[index] = _Answer(spaces, before == prompt + spaces)
    pieces = _PLACEHOLDERS.split(rendered)
    missing = {str(index) for index in range(len(messages))} - set(pieces[1::2])
    if missing:
        raise ValueError(f"the chat template leaves out message {min(missing, key=int)}")
    segments: list[Segment] = []
    train = False
    for position, piece in enumerate(pieces):
        if position % 2:
            index = int(piece)
            message = messages[index]
            answer = answers.get(index, _Answer())
            train = message["role"] == "assistant" and bool(message.get("train", True))
            if train and not answer.is_prompted:
                train = False
                if not add_generation_prompt:
                    warnings.warn(
                        f"the chat template of {tokenizer.name_or_path!r} does not write before "
                        "an earlier answer what its generation prompt was, so such answers are not "
                        "learnt; give each as the last one of a conversation",
                        stacklevel=2,
                    )
            parts, first = contents[index]
            if answer.spaces:
                text = parts[0] if parts and isinstance(parts[0], str) else ""
                parts = [answer.spaces + text, *parts[1 if text else 0 :]]
            segments += render(parts, header=header, footer=footer, first_number=first, train=train)
            continue
        if position + 1 < len(pieces) and int(pieces[position + 1]) in answers:
            piece = piece.removesuffix(answers[int(pieces[position + 1])].spaces)
        cut = _end_of_turn(tokenizer, piece) if train else 0
        if cut:
            segments.append(Segment(piece[:cut], "template", train=True))
        if piece[cut:]:
            segments.append(Segment(piece[cut:], "template"))
    return [part for segment in segments for part in _with_values(segment, values)]


class _Answer(NamedTuple):
    """An answer in a rendered conversation.

    Attributes:
        spaces: White space that the template writes between generation prompt and answer.
        is_prompted: Whether its generation prompt is what stands before it.
    """

    spaces: str = ""
    is_prompted: bool = True


def _generation_prompt(
    apply: Callable[[Sequence[Any], bool], str], turns: Sequence[Message]
) -> str:
    """The conversation up to where an answer goes."""
    prompt = apply(turns, True)
    if prompt != apply(turns, False):
        return prompt
    # The template knows no generation prompt. Mistral's needs none, as the user's turn ends with
    # what an answer follows; others would leave it to the model to open its own turn.
    place = _PLACEHOLDER.format(len(turns))
    try:
        answered = apply([*turns, {"role": "assistant", "content": place}], False)
    except ValueError:
        return prompt
    before, found, _ = answered.partition(place)
    if found and before.startswith(prompt) and before[len(prompt) :].strip():
        return before.rstrip(" ")
    return prompt


def _spaces_between(prompt: str, before: str) -> str:
    """White space behind a generation prompt, in what a template writes before an answer.

    The last pieces are compared, as the template may have said earlier messages in another way.
    """
    opening, piece = (_PLACEHOLDERS.split(text)[-1] for text in (prompt, before))
    spaces = piece[len(opening) :] if piece.startswith(opening) else ""
    return spaces if spaces.isspace() else ""


def end_ids(texts: Iterable[Iterable[Segment]], template: PlainTokenizer) -> list[int]:
    """The control tokens that end the turns which are trained in texts, such as `<|im_end|>`.

    Base models do not stop at them by themselves.

    Args:
        texts: The segments of each text.
        template: What reads the chat template's pieces (`RefragTokenizer.plain_template`).
    """
    ends = {s.text: None for text in texts for s in text if s.train and s.kind == "template"}
    return sorted({int(read.ids[-1]) for read in template([*ends]) if len(read.ids)})


def _guarded(value: Any, tokenizer: PreTrainedTokenizerBase, values: list[str]) -> Any:
    """What a template is given of a field, or of an option.

    Args:
        value: The field: anything that JSON has, or another object.
        tokenizer: The decoder's tokenizer.
        values: Takes the strings that are replaced by placeholders: those that hold a control
            string, or begin or end with a part of one, which the template may complete.
    """
    if isinstance(value, Mapping):
        return {
            _guarded(k, tokenizer, values): _guarded(v, tokenizer, values) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_guarded(item, tokenizer, values) for item in value]
    if value is None or callable(value) or isinstance(value, bool | int | float):
        return value
    text = unicodedata.normalize("NFKC", str(value)).casefold().strip()
    tokens, beginnings, ends = _control_parts(tokenizer, str(tokenizer.chat_template))
    sizes = range(1, min(len(text), max(map(len, tokens))) + 1)
    is_part = any(text[-size:] in beginnings or text[:size] in ends for size in sizes)
    if not is_part and not any(token in text for token in tokens):
        # As it is: templates compare strings, count them, write them as JSON.
        return value
    values.append(str(value))
    return _VALUE.format(len(values) - 1)


@lru_cache(maxsize=16)
def _control_parts(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[str], set[str], set[str]]:
    """Control strings and placeholders in lower case, and the beginnings and ends of them.

    Parts of letters and digits alone are none: almost any word begins or ends with one.
    """
    found = {token.content for token in control_tokens(tokenizer).values()}
    found |= {*map(str, tokenizer.all_special_tokens), "REFRAGCONTENT", "REFRAGVALUE"}
    tokens = [folded for token in found if (folded := token.strip().casefold())]
    places = [(token, place) for token in tokens for place in range(1, len(token))]
    beginnings = {token[:place] for token, place in places if not token[:place].isalnum()}
    return tokens, beginnings, {token[at:] for token, at in places if not token[at:].isalnum()}


def _with_values(segment: Segment, values: Sequence[str]) -> list[Segment]:
    """A template's piece with the strings that placeholders stand for, as ordinary text.

    Of a piece that is learnt, the last part is, which ends the turn.
    """
    if segment.kind != "template" or not values:
        return [segment]
    pieces = _VALUES.split(segment.text)
    parts = [
        replace(segment, text=values[int(piece)], kind="text", train=False)
        if place % 2
        else replace(segment, text=piece, train=segment.train and place == len(pieces) - 1)
        for place, piece in enumerate(pieces)
    ]
    return [part for part in parts if part.text]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, piece: str) -> int:
    """Characters of a template's piece up to and with its first control token; 0 without one."""
    found = _control_pattern(tokenizer, str(tokenizer.chat_template)).search(piece)
    return found.end() if found else 0


@lru_cache(maxsize=16)
def _control_pattern(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """What finds a control token; `template` is there to notice that another one was set."""
    strips = {token.content: token.rstrip for token in control_tokens(tokenizer).values()}
    if tokenizer.eos_token:  # some families name it as their unknown token too
        strips.setdefault(tokenizer.eos_token, False)
    # The longest first, as one may start with another. A token that strips takes the white space
    # behind it: a cut between them would make a token of that.
    choices = sorted(strips, key=len, reverse=True)
    return re.compile(
        "|".join(re.escape(text) + (r"\s*" if strips[text] else "") for text in choices) or "(?!)"
    )
