"""Conversations from JSON lines files and the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from refrag_lightning.data.conversations import (
    Content,
    Conversation,
    ConversationSource,
    Place,
    Turn,
)
from refrag_lightning.data.questions import read_passages
from refrag_lightning.data.rows import (
    MAX_MB,
    HubRows,
    JsonRows,
    Row,
    RowSource,
    field_of,
    text_of,
)
from refrag_lightning.text.documents import Document, parse

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names of the roles in public data sets that chat templates do not know."""


class _ConversationRows(RowSource, ConversationSource):
    def item(self, row: Row, where: str) -> Conversation:
        """The conversation of a row."""
        return _conversation(row, self.fields, where)


class JsonLinesConversations(_ConversationRows):
    """JSON lines files, gzipped or not, each line with its `messages`.

    A message has a `role` and a `content`, in which `<doc>` blocks are documents, and perhaps
    `"train": false`. A line may also have `id`, `passages` (read before the first user message),
    `references` and `kind`.

    Args:
        paths: Files or patterns such as `data/*.jsonl.gz`, or one of them.
        messages: The field of the messages.
        role: The field of a message's role.
        content: The field of a message's text.
        held_out: Share of the conversations for validation, and the same again for test.
        limit: Most conversations that are read.
        max_mb: Most millions of characters of a line; see `rows.json_rows`.

    Raises:
        FileNotFoundError: If a path or pattern matches no file.
    """

    def __init__(
        self,
        paths: str | list[str],
        messages: str = "messages",
        role: str = "role",
        content: str = "content",
        held_out: float = 0.0,
        limit: int | None = None,
        max_mb: float = MAX_MB,
    ) -> None:
        super().__init__(JsonRows(paths, max_mb), (messages, role, content), held_out, limit)


class HubConversations(_ConversationRows):
    """A data set of the Hugging Face Hub.

    Args:
        name: The data set's name.
        config: Its configuration, where it has several.
        split: The split that is read, whatever it is used for here.
        messages: The column of the messages (`conversations` in ShareGPT's form).
        role: The field of a message's role (`from` there).
        content: The field of a message's text (`value` there).
        revision: A commit or tag; the newest one if None.
        streaming: Read over the network as needed, instead of downloading everything first.
        held_out: Share of the conversations for validation, and the same again for test.
        limit: Most conversations that are read.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        messages: str = "messages",
        role: str = "role",
        content: str = "content",
        revision: str | None = None,
        streaming: bool = True,
        held_out: float = 0.0,
        limit: int | None = None,
    ) -> None:
        rows = HubRows(name, config, split, revision, streaming)
        super().__init__(rows, (messages, role, content), held_out, limit)


def _conversation(row: Row, fields: tuple[str, str, str], where: str) -> Conversation:
    messages, role, content = fields
    rows = field_of(row, messages, where)
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ValueError(f"{messages!r} in {where} is no list of messages: {rows!r}")
    turns: list[Turn] = []
    num_documents = 0
    for message in rows:
        if not isinstance(message, Mapping):
            raise ValueError(f"a message in {where} is no mapping: {message!r}")
        name = text_of(field_of(message, role, where), role, where)
        name = ROLES.get(name, name)
        text = _plain_text(field_of(message, content, where), content, where)
        parts: Content = (text,)
        # What the assistant writes is text, whatever it looks like.
        if name != "assistant":
            parts = tuple(parse(text, strict=False, first_number=num_documents + 1))
            num_documents += sum(isinstance(part, Document) for part in parts)
        turns.append(Turn(name, parts, train=message.get("train") is not False))
    passages = read_passages(row.get("passages") or [], where)
    if passages:
        turns = _with_passages(turns, where)
    references = row.get("references") or ()
    return Conversation(
        id=str(row.get("id") or where),
        turns=tuple(turns),
        passages=passages,
        references=(references,) if isinstance(references, str) else tuple(references),
        kind=str(row.get("kind") or ""),
    )


def _plain_text(value: Any, name: str, where: str) -> str:
    """A message's text, also where it is a list of `{type: text, text: …}`."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "".join(text_of(field_of(part, "text", where), "text", where) for part in value)
    return text_of(value, name, where)


def _with_passages(turns: list[Turn], where: str) -> list[Turn]:
    """Puts the place of the passages before what the user says first."""
    for number, turn in enumerate(turns):
        if turn.role == "user":
            first = replace(turn, content=(Place.PASSAGES, *turn.content))
            return [*turns[:number], first, *turns[number + 1 :]]
    raise ValueError(f"{where} has passages, but no user's message to put them in")
