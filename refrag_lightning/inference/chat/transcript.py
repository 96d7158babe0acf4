"""A conversation in a file: Markdown to read, JSON with all that is known of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from refrag_lightning.cache import write_text
from refrag_lightning.inference.chat.figures import summary
from refrag_lightning.inference.chat.session import Session, Turn
from refrag_lightning.plain_text import as_json, literal_markdown, printable

_ACTIVE = ("html_block", "html_inline", "image")


def save(session: Session, path: Path) -> Path:
    """Writes the conversation, in one step.

    Args:
        session: The conversation.
        path: A file; `.json` has the traces row by row, `.md` and `.txt` are Markdown.

    Returns:
        The file's path.

    Raises:
        ValueError: The name ends in nothing known, or another file has it already.
        OSError: It cannot be written.
    """
    path = path.expanduser()
    if path.suffix not in (".json", ".md", ".txt"):
        raise ValueError(f"{path} ends neither in .md nor in .txt nor in .json")
    if path.exists() and path.resolve() not in session.saved:
        raise ValueError(f"{path} is there already; this chat did not write it")
    if path.suffix == ".json":
        text = as_json(as_dict(session), indent=2) + "\n"
    else:
        text = as_markdown(session)
    write_text(path, text)
    session.saved.add(path.resolve())
    return path


def as_dict(session: Session) -> dict[str, Any]:
    """The conversation as JSON takes it."""
    return {
        "model": session.model_name,
        "system": session.system,
        "options": session.options,
        "documents": [
            {"id": d.id, "title": d.title, "source": d.attributes.get("source"), "text": d.text}
            for d in session.documents
        ],
        "turns": [
            {
                "question": turn.question,
                "answer": turn.text,
                "stopped": turn.stopped,
                "citations": [citation.as_dict() for citation in turn.citations],
                "trace": turn.trace.as_dict() if turn.trace is not None else None,
            }
            for turn in session.turns
        ],
    }


def as_markdown(session: Session) -> str:
    """The conversation as Markdown: questions as headings, sources and figures under answers.

    What was said stands in quotations, which nothing in it can leave; an answer is the Markdown
    that the model wrote. What a terminal would obey or nobody sees is left out.
    """
    parts = [f"# Chat with {literal_markdown(session.model_name)}"]
    if session.system:
        parts.append(f"System:\n\n{_quoted(_literal(session.system))}")
    if session.documents:
        listed = [f"{d.id}. {literal_markdown(d.title)}" for d in session.documents]
        parts.append("Documents:\n\n" + "\n".join(listed))
    for turn in session.turns:
        parts += _turn(turn)
    return "\n\n".join(parts) + "\n"


def _turn(turn: Turn) -> list[str]:
    first, _, further = turn.question.strip().partition("\n")
    parts = [f"## {literal_markdown(first)}"]
    if further.strip():
        parts.append(_quoted(_literal(further.strip())))
    parts.append(_quoted(_harmless(printable(turn.text).strip())))
    if turn.stopped:
        parts.append("*(stopped)*")
    if turn.citations:
        lines = [
            f"- \\[{literal_markdown(c.id)}] {literal_markdown(c.title)}" for c in turn.citations
        ]
        parts.append("\n".join(lines))
    if turn.trace is not None:
        parts.append(f"*{summary(turn.trace)}*")
    return parts


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _literal(text: str) -> str:
    # Two spaces keep the line break.
    return "  \n".join(map(literal_markdown, text.split("\n")))


def _harmless(text: str) -> str:
    """An answer's Markdown, or the same as code where it would load or run something."""
    from markdown_it import MarkdownIt

    class Parser(MarkdownIt):
        """One that shows every address, also those it takes for text and others would follow."""

        def validateLink(self, url: str) -> bool:
            return True

    tokens = Parser("commonmark").enable("table").parse(text)
    inner = [child for token in tokens for child in token.children or ()]
    addresses = [str(token.attrs.get("href", "")) for token in inner]
    if all(token.type not in _ACTIVE for token in (*tokens, *inner)) and all(
        re.match(r"(https?://|mailto:|[^:]*\Z)", address) for address in addresses
    ):
        return text
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks}\n{text}\n{marks}"
