"""A trace in words: how much was read as what, and how long it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refrag_lightning.inference.trace import Trace

_PARTS = (
    ("queued", "waiting"),
    ("search", "search"),
    ("lookup", "stored rows"),
    ("encoding", "encoding"),
    ("building", "building the prompt"),
    ("prefill", "reading it"),
)


def summary(trace: Trace) -> str:
    """One line: documents and what they stand as, positions, time to the first token, speed."""
    parts = [
        documents(trace),
        positions(trace),
        f"first token {duration(trace.seconds.first_token)}",
    ]
    if trace.tokens_a_second:
        parts.append(f"{trace.tokens_a_second:.1f} tokens/s")
    return " · ".join(parts)


def documents(trace: Trace) -> str:
    """How many documents, and what their rows stand as."""
    if not trace.documents:
        return "no documents"
    number = count(len(trace.documents), "document")
    vectors = sum(document.states["vector"] for document in trace.documents)
    tokens = sum(document.states["tokens"] for document in trace.documents)
    if not vectors:
        return f"{number} as text"
    as_vectors = f"{count(vectors, 'row')} as {'a vector' if vectors == 1 else 'vectors'}"
    return f"{number}, {as_vectors}" + (f" and {tokens:,} as text" if tokens else "")


def positions(trace: Trace) -> str:
    """The length of the prompt, and without compression if that is another."""
    if trace.positions == trace.positions_as_text:
        return f"{trace.positions:,} positions"
    return f"{trace.positions:,} positions instead of {trace.positions_as_text:,}"


def times(trace: Trace) -> str:
    """The time to the first token and what it went into; parts under a millisecond left out."""
    seconds = trace.seconds
    parts = [
        f"{name} {duration(getattr(seconds, part))}"
        for part, name in _PARTS
        if getattr(seconds, part) >= 0.001
    ]
    return duration(seconds.first_token) + (f" ({', '.join(parts)})" if parts else "")


def duration(seconds: float) -> str:
    """Seconds as they are read: `0.4 ms`, `12 ms`, `0.21 s`, `74 s`."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.00095 else f"{seconds * 1000:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"


def count(number: int, name: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number:,} {name}" + ("s" if number != 1 else "")
