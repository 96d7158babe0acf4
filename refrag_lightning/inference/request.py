"""What a pipeline is asked: a conversation, documents, and how to read and to answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Message

DocumentExpand = Literal["none", "all"] | Sequence[int]
"""For one document: vectors (`none`), its text (`all`), or text for the rows of these indices."""

Expand = Literal["none", "all"] | Sequence[DocumentExpand] | Mapping[str, DocumentExpand]
"""For all documents alike, for each in the prompt's order, or for those of the given ids."""

TooLong = Literal["error", "drop", "truncate"]
"""What happens to a prompt that is too long for the decoder; see `window`."""

PLAIN_PROMPT = "{passages}{question}"


def _whole(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} ({value!r}) must be a whole number of at least {least}")


def _real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} ({value!r}) must be a number")


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Attributes:
        max_new_tokens: Most tokens of the answer.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_p: Draws among the fewest tokens whose probabilities sum up to this.
        top_k: Draws among so many of the most likely tokens; 0 among all.
        repetition_penalty: Above 1, tokens that the answer has already become less likely; the
            prompt is not looked at.
        stop: Texts that end the answer; they are not part of it.
        seed: Of what is drawn; None draws a seed, which the trace tells.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _whole("max_new_tokens", self.max_new_tokens, least=1)
        _whole("top_k", self.top_k, least=0)
        _real("temperature", self.temperature)
        _real("top_p", self.top_p)
        _real("repetition_penalty", self.repetition_penalty)
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty ({self.repetition_penalty}) must be above 0")
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop ({stop!r}) must hold texts that are not empty")
        if self.seed is not None:
            _whole("seed", self.seed, least=0)
            if self.seed >= 1 << 63:
                raise ValueError(f"seed ({self.seed}) must be below 2**63")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """One thing that a pipeline is asked.

    Attributes:
        messages: The conversation, as the tokenizer's `apply_chat` takes it: each with `role` and
            `content`, a text in which `<doc>` blocks are parsed or a list of strings (taken as they
            are) and documents.
        documents: Documents for the last user's message. One without an id is numbered.
        expand: Which documents, or rows of them, the decoder reads as text.
        sampling: How the answer is written.
        rate: Tokens a row, one of the model's rates; its own default if None.
        search: Passages to search for in the index, beside the documents; 0 searches for none.
        too_long: What happens where the prompt and the answer do not fit the decoder: `error`
            refuses, `drop` leaves out the last documents, `truncate` cuts the last one that fits in
            part. Only `documents` and searched passages are shortened, and the trace tells.
        prompt: How the last user's message is put together: `{passages}` stands for the documents,
            `{question}` for what the message says. Best as in the model's training.
        strict: Whether a broken `<doc>` tag in a text is an error; otherwise it is text.
        template_options: Passed to the decoder's chat template.

    Raises:
        ValueError: If a value is out of its range.
    """

    messages: tuple[Message, ...]
    documents: tuple[Document, ...] = ()
    expand: Expand = "none"
    sampling: Sampling = Sampling()
    rate: int | None = None
    search: int = 0
    too_long: TooLong = "error"
    prompt: str = PLAIN_PROMPT
    strict: bool = True
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "documents", tuple(self.documents))
        if not self.messages:
            raise ValueError("messages is empty: there is nothing to answer")
        for number, message in enumerate(self.messages):
            if not isinstance(message, Mapping):
                raise ValueError(f"message {number} needs a role and a content, got {message!r}")
        for number, document in enumerate(self.documents):
            if not isinstance(document, Document):
                raise ValueError(f"documents: entry {number} is no Document, got {document!r}")
        if isinstance(self.expand, str) and self.expand not in ("none", "all"):
            raise ValueError(f"expand ({self.expand!r}) must be 'none', 'all', a list or a mapping")
        if self.too_long not in get_args(TooLong):
            raise ValueError(f"too_long ({self.too_long!r}) must be one of {get_args(TooLong)}")
        if self.prompt.count("{question}") != 1 or self.prompt.count("{passages}") != 1:
            raise ValueError(
                f"prompt ({self.prompt!r}) must have {{passages}} and {{question}} once each"
            )
        _whole("search", self.search, least=0)
        if self.rate is not None:
            _whole("rate", self.rate, least=1)

    @classmethod
    def of(
        cls,
        asked: str | Sequence[Message],
        documents: Sequence[Document | str] | None = None,
        **options: Any,
    ) -> Request:
        """A request from a question or a conversation.

        Args:
            asked: A question, or messages.
            documents: Documents, or their texts.
            **options: The fields of `Request` and of `Sampling`, side by side.

        Raises:
            TypeError: If an option is none of those fields.
            ValueError: As the class.
        """
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        drawn = {f.name: options.pop(f.name) for f in fields(Sampling) if f.name in options}
        if drawn:
            if "sampling" in options:
                raise TypeError(f"sampling and {', '.join(drawn)} cannot be given together")
            options["sampling"] = Sampling(**drawn)
        if unknown := sorted(set(options).difference(f.name for f in fields(cls))):
            raise TypeError(f"a request has no option {', '.join(unknown)}")
        given = [Document(d) if isinstance(d, str) else d for d in documents or ()]
        return cls(messages=tuple(messages), documents=tuple(given), **options)
