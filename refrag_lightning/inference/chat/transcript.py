"""A conversation in a file: Markdown to read, JSON with all that is known of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refrag_lightning.cache import write_text
from refrag_lightning.inference.chat.figures import summary
from refrag_lightning.inference.chat.session import Session, Turn


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
        text = json.dumps(as_dict(session), ensure_ascii=False, indent=2) + "\n"
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
    """The conversation as Markdown: questions as headings, sources and figures under answers."""
    parts = [f"# Chat with {session.model_name}"]
    if session.system:
        parts.append(f"System: {session.system}")
    if session.documents:
        parts.append("Documents:\n\n" + "\n".join(f"{d.id}. {d.title}" for d in session.documents))
    for turn in session.turns:
        parts += _turn(turn)
    return "\n\n".join(parts) + "\n"


def _turn(turn: Turn) -> list[str]:
    first, _, further = turn.question.strip().partition("\n")
    parts = [f"## {first}"]
    if further.strip():
        parts.append(further.strip())
    parts.append(turn.text.strip() + (" *(stopped)*" if turn.stopped else ""))
    if turn.citations:
        parts.append("\n".join(f"- [{c.id}] {c.title}" for c in turn.citations))
    if turn.trace is not None:
        parts.append(f"*{summary(turn.trace)}*")
    return parts
