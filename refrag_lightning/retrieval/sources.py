"""Documents to be indexed: files, folders, patterns, data sets of the Hub, the Python reference.

A document's default id is the file's path, from the current folder on where it lies in it; of a
line of a JSON lines file, `path#line`. Nothing is left out in silence: what cannot be read is an
error that names the file, and of folders and patterns, where other files may lie too, those of
other kinds and empty ones are counted in a warning.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refrag_lightning.retrieval.parse_html import Parsed, parse_html
from refrag_lightning.retrieval.parse_markdown import parse_markdown

if TYPE_CHECKING:
    from refrag_lightning.data.rows import Row

# `data` imports Lightning, which takes seconds; it is imported where it is needed.
_MARKDOWN, _HTML, _ROWS = (".md", ".markdown"), (".html", ".htm"), (".jsonl", ".jsonl.gz")
SUFFIXES = (".txt", *_MARKDOWN, *_HTML, *_ROWS)
HUB, PYDOC = "hub:", "pydoc"
_HUB_PATH = re.compile(r"hub:(?P<name>[^@#]+)(?:@(?P<config>[^#]+))?(?:#(?P<split>.+))?\Z")


@dataclass(frozen=True)
class SourceDocument:
    """A document as it was read.

    Attributes:
        id: Its name in the index, different from every other document's.
        title: Its title, or "".
        text: Its plain text.
        source: Where it was read: a file or a data set; the line or row too where it has no other
            id than that.
    """

    id: str
    title: str
    text: str
    source: str


@dataclass(frozen=True)
class Fields:
    """Where rows keep what is read of them.

    Attributes:
        text: The field of the text; a dot steps into a nested field. One that holds a list of
            passages (texts, or mappings with `text` and perhaps `id` and `title`) gives a document
            for each, of which those that were there before, word for word, are left out.
        title: The field of the title; rows without it have none.
        id: The field of the id; rows without it are named by their place.
    """

    text: str = "text"
    title: str = "title"
    id: str = "id"


def read_documents(
    paths: Sequence[str],
    *,
    text_field: str = "text",
    title_field: str = "title",
    id_field: str = "id",
) -> Iterator[SourceDocument]:
    """Reads documents one after another.

    Args:
        paths: Any of: files (`.txt`, `.md`, `.html`, `.jsonl`, `.jsonl.gz`); folders, with those
            within them; patterns such as `docs/**/*.md`; `hub:NAME`, `hub:NAME@CONFIG#SPLIT` for a
            data set of the Hugging Face Hub (its split `train` by default); `pydoc` for the Python
            language reference.
        text_field: See `Fields`.
        title_field: See `Fields`.
        id_field: See `Fields`.

    Yields:
        The documents, in the same order every time. One that comes again, word for word and by
        the same id, is left out.

    Raises:
        OSError: Nothing is found by a name.
        ValueError: There is no path; a file is of an unknown kind, is no UTF-8, or is empty; a row
            lacks its text; or two documents that differ have one id.
    """
    if not paths:
        raise ValueError("no paths were given, so there is nothing to read")
    fields = Fields(text_field, title_field, id_field)
    seen: dict[str, tuple[bytes, str]] = {}
    for path in paths:
        found = 0
        for document in _of_path(path, fields):
            found += 1
            _check_characters(document)
            content = f"{document.title}\0{document.text}".encode()
            digest = hashlib.sha256(content).digest()[:16]
            if document.id not in seen:
                seen[document.id] = digest, document.source
                yield document
            elif seen[document.id][0] != digest:
                raise ValueError(
                    f"two documents have the id {document.id!r}: one in "
                    f"{seen[document.id][1]}, another in {document.source}"
                )
        if not found:
            raise ValueError(f"{path!r} holds no document")


def _of_path(path: str, fields: Fields) -> Iterator[SourceDocument]:
    place = Path(path).expanduser()
    if path.startswith(HUB):
        yield from _hub(path, fields)
    elif place.is_file():
        yield from _named_file(place, fields)
    elif place.is_dir():
        yield from _found_files(path, _within(place), fields)
    elif path == PYDOC:
        from refrag_lightning.data.sources import PydocSource

        for number, text in enumerate(PydocSource().read(), start=1):
            yield SourceDocument(f"{PYDOC}#{number}", "", text, PYDOC)
    elif glob.has_magic(path):
        matches = sorted(glob.glob(str(place), recursive=True))
        yield from _found_files(path, filter(Path.is_file, map(Path, matches)), fields)
    else:
        raise FileNotFoundError(f"there is no file or folder {path!r}")


def _within(folder: Path) -> Iterator[Path]:
    """The files in a folder and those in it, in the order of their names; no hidden ones."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def _found_files(path: str, files: Iterable[Path], fields: Fields) -> Iterator[SourceDocument]:
    """Documents of files that nobody named: those that are none are counted."""
    others: Counter[str] = Counter()
    for file in files:
        if _kind(file) is None:
            others[file.suffix or "no suffix"] += 1
            continue
        number = 0
        for document in _file(file, fields):
            number += 1
            yield document
        if not number:
            others["empty"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        warnings.warn(
            f"files of {path!r} that are no documents were left out: {kinds}",
            stacklevel=2,
        )


def _named_file(file: Path, fields: Fields) -> Iterator[SourceDocument]:
    if _kind(file) is None:
        raise ValueError(
            f"{str(file)!r} is of an unknown kind; documents are read from {', '.join(SUFFIXES)}"
        )
    yield from _file(file, fields)


def _kind(file: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)


def _file(file: Path, fields: Fields) -> Iterator[SourceDocument]:
    """The documents of one file; none if it is empty."""
    kind, name = _kind(file), _shown(file)
    if kind in _ROWS:
        rows = ((f"{name}#{number}", where, row) for number, where, row in _lines(file))
        yield from _documents(rows, fields)
        return
    text = _read(file)
    parsed = Parsed("", text)
    if kind in _MARKDOWN:
        parsed = parse_markdown(text)
    elif kind in _HTML:
        parsed = parse_html(text)
    if parsed.text.strip():
        yield SourceDocument(name, parsed.title or file.stem, parsed.text, name)


def _lines(file: Path) -> Iterator[tuple[int, str, Row]]:
    """The number of each row, what to call it in messages, and the row."""
    from refrag_lightning.data.rows import json_rows

    for number, (where, row) in enumerate(json_rows(str(file)), start=1):
        yield number, where, row


def _hub(path: str, fields: Fields) -> Iterator[SourceDocument]:
    from refrag_lightning.data.rows import HubRows

    found = _HUB_PATH.match(path)
    if found is None:
        raise ValueError(f"{path!r} is no data set: hub:NAME, hub:NAME@CONFIG or hub:NAME#SPLIT")
    name, config, split = found["name"], found["config"], found["split"] or "train"
    read = HubRows(name, config, split, revision=None, streaming=True)
    rows = ((f"{path}#{number}", *item) for number, item in enumerate(read, start=1))
    yield from _documents(rows, fields)


def _documents(rows: Iterable[tuple[str, str, Row]], fields: Fields) -> Iterator[SourceDocument]:
    """The documents of rows, each given with its default id and what to call it in messages."""
    from refrag_lightning.data.questions import read_passages
    from refrag_lightning.data.rows import field_of, text_of

    passages: set[bytes] = set()
    num_empty = 0
    for default, where, row in rows:
        own = row.get(fields.id)
        name, source = default, default
        if own not in (None, ""):
            # Its place would change whenever a row before it comes or goes.
            name, source = str(own), default.rpartition("#")[0]
        value = field_of(row, fields.text, where)
        if not isinstance(value, str):
            for number, passage in enumerate(read_passages(value, where), start=1):
                content = hashlib.sha256(f"{passage.title}\0{passage.text}".encode()).digest()
                if passage.text.strip() and content not in passages:
                    passages.add(content)
                    within = f"{name}/{passage.id or number}"
                    yield SourceDocument(within, passage.title, passage.text, source)
            continue
        if not value.strip():
            num_empty += 1
            continue
        title = row.get(fields.title)
        title = "" if title is None else text_of(title, fields.title, where)
        yield SourceDocument(name, title, value, source)
    if num_empty:
        warnings.warn(f"{num_empty} rows without text were left out", stacklevel=2)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{str(file)!r} is no UTF-8 text: byte {error.start} is {byte:#04x}"
        ) from None


def _check_characters(document: SourceDocument) -> None:
    try:
        (document.title + document.text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{document.source} holds {error.object[error.start]!r}, which is no character"
        ) from None


def _shown(file: Path) -> str:
    """A file's path as it names documents: from the current folder on, if it lies in it."""
    absolute = Path(os.path.abspath(file))
    here = Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else file).as_posix()
