"""From a request to what the decoder reads: numbered documents, messages, segments.

The documents of a request stand in the last user's message, where the request's `prompt` says; the
default is before the question. They are numbered so that an answer can cite them: ids that were
given stay, and the others get the lowest numbers that are free, searched passages after documents.

A decoder with a chat template reads the conversation through it. One without reads the contents one
after another: a system's or assistant's text and an empty line, a user's text and a new line, and
`Answer:` where the assistant speaks:

    [1] Rivers
    The Seine flows through Paris.
    Where does the Seine flow?
    Answer:
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from refrag_lightning.inference.request import DocumentExpand, Request
from refrag_lightning.text.documents import Document, Part, parse
from refrag_lightning.text.segments import Segment, render, render_chat

if TYPE_CHECKING:
    from refrag_lightning.retrieval.passages import Passage
    from refrag_lightning.text.tokenizer import RefragTokenizer

Kind = Literal["message", "given", "searched"]

_FIELDS = re.compile(r"(\{passages\}|\{question\})")
_ANSWER = "Answer:"


@dataclass(frozen=True)
class PlacedDocument:
    """A document of a prompt.

    Attributes:
        document: The document, with the id that the decoder reads.
        kind: Whether it stood in a message, was given with the request, or was searched for.
        document_id: Its id in the index, or the one that it was given with.
        passage_id: The passage's id in the index, or "".
        source: Where it was read, or "".
        start: First character of its text in the whole document.
        score: Of the search; None if it was not searched for.
        expand: Which of its rows the decoder reads as text.
    """

    document: Document
    kind: Kind
    document_id: str = ""
    passage_id: str = ""
    source: str = ""
    start: int = 0
    score: float | None = None
    expand: DocumentExpand = "none"

    @property
    def may_go(self) -> bool:
        """Whether it may be left out of a prompt that is too long."""
        return self.kind != "message"

    def cut(self, length: int) -> PlacedDocument:
        """The same with so many of its characters."""
        return replace(self, document=replace(self.document, text=self.document.text[:length]))


Content = list["str | PlacedDocument"]


@dataclass(frozen=True)
class Conversation:
    """Messages whose documents are numbered.

    Attributes:
        messages: The request's messages.
        contents: What each of them says.
    """

    messages: tuple[Any, ...]
    contents: tuple[Content, ...]

    @property
    def documents(self) -> list[PlacedDocument]:
        """All documents, in order."""
        return [p for content in self.contents for p in content if isinstance(p, PlacedDocument)]

    def map(self, changed: dict[int, PlacedDocument | None]) -> Conversation:
        """The same with documents replaced or (None) left out, by their place among all."""
        contents: list[Content] = []
        place = 0
        for content in self.contents:
            kept: Content = []
            for part in content:
                new: str | PlacedDocument | None = part
                if isinstance(part, PlacedDocument):
                    new = changed.get(place, part)
                    place += 1
                if new is not None:
                    kept.append(new)
            contents.append(_joined(kept))
        return replace(self, contents=tuple(contents))

    def as_messages(self) -> list[dict[str, Any]]:
        """Messages as `RefragTokenizer.apply_chat` takes them."""
        return [
            {
                **message,
                "content": [
                    part.document if isinstance(part, PlacedDocument) else part for part in content
                ],
            }
            for message, content in zip(self.messages, self.contents, strict=True)
        ]


def question_of(request: Request) -> str:
    """What the last user's message says, without its documents: what is searched for."""
    content = request.messages[_last_user(request)].get("content")
    parts = parse(content, strict=request.strict) if isinstance(content, str) else content or ()
    return "".join(part for part in parts if isinstance(part, str)).strip()


def converse(
    request: Request, passages: Sequence[Passage] = (), scores: Sequence[float] = ()
) -> Conversation:
    """Puts a request's documents and passages into its conversation, and numbers them.

    Args:
        request: The request.
        passages: What was searched for, the best first.
        scores: Their scores.

    Returns:
        The conversation.

    Raises:
        DocumentSyntaxError: If a `<doc>` tag of a text is broken and the request is strict.
        ValueError: If a message has no content, there is no user's message to put documents in,
            two given documents have the same id, or `expand` names a document that is not there.
    """
    contents = _message_contents(request)
    taken = {p.document.id for content in contents for p in content if not isinstance(p, str)}
    attached = _attached(request, passages, scores, taken)
    place = _last_user(request)
    fields: dict[str, Sequence[str | PlacedDocument]] = {
        "{passages}": attached,
        "{question}": contents[place],
    }
    pieces = [piece for piece in _FIELDS.split(request.prompt) if piece]
    contents[place] = [part for piece in pieces for part in fields.get(piece, [piece])]
    conversation = Conversation(request.messages, tuple(_joined(c) for c in contents))
    return conversation.map(dict(enumerate(_expanded(conversation.documents, request))))


def write(
    conversation: Conversation, tokenizer: RefragTokenizer, request: Request
) -> list[Segment]:
    """The segments of a conversation, up to the place where the answer goes.

    They are those of `RefragTokenizer.apply_chat` on `conversation.as_messages()`.

    Raises:
        ValueError: If the chat template refuses the conversation.
    """
    messages = conversation.as_messages()
    style: dict[str, Any] = {"header": tokenizer.header, "footer": tokenizer.footer}
    if not tokenizer.decoder.chat_template:
        return _plain(messages, style)
    segments = render_chat(tokenizer.decoder, messages, **style, **request.template_options)
    # Nothing of a prompt is learnt; labels would only be carried along.
    return [replace(s, train=False) if s.train else s for s in segments]


def _plain(messages: Sequence[dict[str, Any]], style: dict[str, Any]) -> list[Segment]:
    parts: list[Part] = []
    for message in messages:
        role = message.get("role")
        if role == "assistant":
            parts.append(_ANSWER + " ")
        parts += message["content"]
        parts.append("\n" if role == "user" else "\n\n")
    parts.append(_ANSWER)
    return render(_joined(parts), **style)


def _message_contents(request: Request) -> list[Content]:
    """What the messages say, their documents numbered by position as `render_chat` does."""
    contents: list[Content] = []
    number = 0
    for index, message in enumerate(request.messages):
        content = message.get("content")
        if isinstance(content, str):
            parts = parse(content, strict=request.strict, first_number=number + 1)
        elif isinstance(content, Sequence):
            parts = [*content]
        else:
            raise ValueError(f"message {index} needs a text or a list as content, got {content!r}")
        placed: Content = []
        for part in parts:
            if isinstance(part, str):
                placed.append(part)
                continue
            if not isinstance(part, Document):
                raise ValueError(f"message {index} holds {part!r}, no text and no Document")
            number += 1
            placed.append(_given(part, part.id or str(number), "message"))
        contents.append(placed)
    return contents


def _attached(
    request: Request, passages: Sequence[Passage], scores: Sequence[float], taken: set[str]
) -> list[PlacedDocument]:
    given = [document.id for document in request.documents if document.id]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"documents: two have the id {twice[0]!r}, so an answer cannot cite one")
    free = _free_numbers(taken.union(given))
    attached = [_given(d, d.id or next(free), "given") for d in request.documents]
    for number, passage in enumerate(passages):
        attached.append(
            PlacedDocument(
                Document(passage.text, next(free), passage.title),
                "searched",
                document_id=passage.document_id,
                passage_id=passage.id,
                source=passage.source,
                start=passage.start,
                score=scores[number] if scores else None,
            )
        )
    return attached


def _given(document: Document, name: str, kind: Kind) -> PlacedDocument:
    return PlacedDocument(
        replace(document, id=name),
        kind,
        document_id=document.id or name,
        source=document.attributes.get("source", ""),
    )


def _free_numbers(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        if str(number) not in taken:
            yield str(number)


def _expanded(documents: Sequence[PlacedDocument], request: Request) -> list[PlacedDocument]:
    """The documents, each with what the request's `expand` says of it."""
    expand = request.expand
    if isinstance(expand, str):
        return [replace(placed, expand=expand) for placed in documents]
    if isinstance(expand, Mapping):
        chosen = {str(name): one for name, one in expand.items()}
        ids = {placed.document.id for placed in documents}
        if unknown := sorted(set(chosen) - ids):
            raise ValueError(f"expand: there is no document {unknown[0]!r} in the prompt")
        return [replace(p, expand=chosen.get(p.document.id, "none")) for p in documents]
    if len(expand) != len(documents):
        raise ValueError(f"expand holds {len(expand)} entries for {len(documents)} documents")
    return [replace(p, expand=e) for p, e in zip(documents, expand, strict=True)]


def _last_user(request: Request) -> int:
    for place in reversed(range(len(request.messages))):
        if request.messages[place].get("role") == "user":
            return place
    raise ValueError("messages hold none of the user's, so there is no question to answer")


def _joined(parts: Sequence[Any]) -> list[Any]:
    """The same with texts that follow each other as one: parts are tokenized apart."""
    joined: list[Any] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
