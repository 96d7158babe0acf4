"""Documents to be indexed: files, folders, patterns, data sets of the Hub, the Python reference.

A document's default id is the file's path, from the current folder on where it lies in it; of a
line of a JSON lines file, `path#line`. Nothing is left out in silence: what cannot be read is an
error that names the file, and of folders and patterns, where other files may lie too, those of
other kinds and empty ones are counted in a warning.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import stat
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
_LINK = "link out of it (--follow_links reads what is there)"
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
class Reading:
    """What is read, and where rows keep it.

    Attributes:
        text: The field of the text; a dot steps into a nested field. One that holds a list of
            passages (texts, or mappings with `text` and perhaps `id` and `title`) gives a document
            for each, of which those that were there before, word for word, are left out.
        title: The field of the title; rows without it have none.
        id: The field of the id; rows without it are named by their place.
        follow_links: Whether to read what links of a folder or pattern point to outside of it.
        max_mb: Most MB of a file that is one document, and most millions of characters of a row.
    """

    text: str = "text"
    title: str = "title"
    id: str = "id"
    follow_links: bool = False
    max_mb: float = 64


def read_documents(
    paths: Sequence[str],
    *,
    text_field: str = "text",
    title_field: str = "title",
    id_field: str = "id",
    follow_links: bool = False,
    max_mb: float = 64,
) -> Iterator[SourceDocument]:
    """Reads documents one after another.

    Args:
        paths: Any of: files (`.txt`, `.md`, `.html`, `.jsonl`, `.jsonl.gz`); folders, with those
            within them; patterns such as `docs/**/*.md`; `hub:NAME`, `hub:NAME@CONFIG#SPLIT` for a
            data set of the Hugging Face Hub (its split `train` by default); `pydoc` for the Python
            language reference.
        text_field: See `Reading`.
        title_field: See `Reading`.
        id_field: See `Reading`.
        follow_links: See `Reading`.
        max_mb: See `Reading`.

    Yields:
        The documents, in the same order every time. One that comes again, word for word and by
        the same id, is left out.

    Raises:
        OSError: Nothing is found by a name.
        ValueError: There is no path; a file is of an unknown kind, is no UTF-8, is too large or is
            empty; a row lacks its text; or two documents that differ have one id.
    """
    if not paths:
        raise ValueError("no paths were given, so there is nothing to read")
    reading = Reading(text_field, title_field, id_field, follow_links, max_mb)
    seen: dict[str, tuple[bytes, str]] = {}
    for path in paths:
        found = 0
        for document in _of_path(path, reading):
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


def _of_path(path: str, reading: Reading) -> Iterator[SourceDocument]:
    place = Path(path).expanduser()
    if path.startswith(HUB):
        yield from _hub(path, reading)
    elif place.is_file():
        yield from _named_file(place, reading)
    elif place.is_dir():
        yield from _found_files(path, place, ["**"], reading)
    elif path == PYDOC:
        from refrag_lightning.data.sources import PydocSource

        for number, text in enumerate(PydocSource().read(), start=1):
            yield SourceDocument(f"{PYDOC}#{number}", "", text, PYDOC)
    elif glob.has_magic(path):
        names = place.parts
        fixed = next(number for number, name in enumerate(names) if glob.has_magic(name))
        yield from _found_files(path, Path(*names[:fixed]), names[fixed:], reading)
    elif place.exists():
        from refrag_lightning.data.rows import check_regular

        check_regular(place)
    else:
        raise FileNotFoundError(f"there is no file or folder {path!r}")


def _found_files(
    path: str, folder: Path, pattern: Sequence[str], reading: Reading
) -> Iterator[SourceDocument]:
    """Documents of files that nobody named: those that are none are counted.

    Args:
        path: What was given.
        folder: Where to look.
        pattern: What the parts of a file's path in it have to match; `**` stands for any folders.
        reading: How to read them.
    """
    others: Counter[str] = Counter()
    # Of a file with several names one is taken, its own rather than a link's.
    found: dict[Path, Path] = {}
    root = folder.resolve()
    for file in _within(folder, pattern, reading, others):
        real = file.resolve()
        if real == root / file.relative_to(folder) or real not in found:
            found[real] = file
    for file in found.values():
        if _kind(file) is None:
            others[file.suffix or "no suffix"] += 1
            continue
        number = 0
        for document in _file(file, reading):
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


def _within(
    folder: Path, pattern: Sequence[str], reading: Reading, others: Counter[str]
) -> Iterator[Path]:
    """Regular files in a folder and those in it, in the order of their names; no hidden ones.

    No folder is entered twice, whatever links there are. What is no regular file, and links that
    lead out of the folder unless they are followed, are counted in `others`.
    """
    root = folder.resolve()
    entered = {root}
    for parent, folders, files in os.walk(folder, followlinks=True):
        names = Path(parent).relative_to(folder).parts
        kept = []
        for name in sorted(folders):
            real = Path(parent, name).resolve()
            if not _leads((*names, name), pattern):
                continue
            if not (reading.follow_links or real.is_relative_to(root)):
                others[_LINK] += 1
            elif real not in entered:
                entered.add(real)
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            file = Path(parent, name)
            if not _matches((*names, name), pattern):
                continue
            try:
                mode = file.stat().st_mode
            except OSError:
                others["link to nothing"] += 1
                continue
            if not stat.S_ISREG(mode):
                from refrag_lightning.data.rows import kind_of

                others[kind_of(mode)] += 1
            elif reading.follow_links or file.resolve().is_relative_to(root):
                yield file
            else:
                others[_LINK] += 1


def _leads(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether files in the folder of this path can match a pattern."""
    for place, (name, part) in enumerate(zip(names, pattern, strict=False)):
        if part == "**":
            shown = any(later.startswith(".") for later in pattern[place:])
            return shown or not any(later.startswith(".") for later in names[place:])
        if not _matches([name], [part]):
            return False
    return len(names) < len(pattern)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, as in a shell."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return _matches(names, rest) or (
            not names[0].startswith(".") and _matches(names[1:], pattern)
        )
    if names[0].startswith(".") and not first.startswith("."):
        return False
    return fnmatch.fnmatchcase(names[0], first) and _matches(names[1:], rest)


def _named_file(file: Path, reading: Reading) -> Iterator[SourceDocument]:
    if _kind(file) is None:
        raise ValueError(
            f"{str(file)!r} is of an unknown kind; documents are read from {', '.join(SUFFIXES)}"
        )
    yield from _file(file, reading)


def _kind(file: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)


def _file(file: Path, reading: Reading) -> Iterator[SourceDocument]:
    """The documents of one file; none if it is empty."""
    kind, name = _kind(file), _shown(file)
    if kind in _ROWS:
        rows = ((f"{name}#{number}", where, row) for number, where, row in _lines(file, reading))
        yield from _documents(rows, reading)
        return
    text = _read(file, reading.max_mb)
    parsed = Parsed("", text)
    if kind in _MARKDOWN:
        parsed = parse_markdown(text)
    elif kind in _HTML:
        parsed = parse_html(text)
    if parsed.text.strip():
        yield SourceDocument(name, parsed.title or file.stem, parsed.text, name)


def _lines(file: Path, reading: Reading) -> Iterator[tuple[int, str, Row]]:
    """The number of each row, what to call it in messages, and the row."""
    from refrag_lightning.data.rows import json_rows

    for number, (where, row) in enumerate(json_rows(str(file), max_mb=reading.max_mb), start=1):
        yield number, where, row


def _hub(path: str, reading: Reading) -> Iterator[SourceDocument]:
    from refrag_lightning.data.rows import HubRows

    found = _HUB_PATH.match(path)
    if found is None:
        raise ValueError(f"{path!r} is no data set: hub:NAME, hub:NAME@CONFIG or hub:NAME#SPLIT")
    name, config, split = found["name"], found["config"], found["split"] or "train"
    read = HubRows(name, config, split, revision=None, streaming=True)
    rows = ((f"{path}#{number}", *item) for number, item in enumerate(read, start=1))
    yield from _documents(rows, reading)


def _documents(rows: Iterable[tuple[str, str, Row]], reading: Reading) -> Iterator[SourceDocument]:
    """The documents of rows, each given with its default id and what to call it in messages."""
    from refrag_lightning.data.questions import read_passages
    from refrag_lightning.data.rows import field_of, text_of

    passages: set[bytes] = set()
    num_empty = 0
    for default, where, row in rows:
        own = row.get(reading.id)
        name, source = default, default
        if own not in (None, ""):
            # Its place would change whenever a row before it comes or goes.
            name, source = str(own), default.rpartition("#")[0]
        value = field_of(row, reading.text, where)
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
        title = row.get(reading.title)
        title = "" if title is None else text_of(title, reading.title, where)
        yield SourceDocument(name, title, value, source)
    if num_empty:
        warnings.warn(f"{num_empty} rows without text were left out", stacklevel=2)


def _read(file: Path, max_mb: float) -> str:
    largest = int(max_mb * 1e6)
    with file.open("rb") as content:
        # Not by the file's size, which some files of the system do not have.
        read = content.read(largest + 1)
    if len(read) > largest:
        raise ValueError(
            f"{str(file)!r} is larger than {max_mb:g} MB, too large for one document; if that is "
            "meant, raise max_mb"
        )
    try:
        text = read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{str(file)!r} is no UTF-8 text: byte {error.start} is {byte:#04x}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_characters(document: SourceDocument) -> None:
    try:
        (document.id + document.title + document.text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{document.source!r} holds {error.object[error.start]!r}, which is no character"
        ) from None


def _shown(file: Path) -> str:
    """A file's path as it names documents: from the current folder on, if it lies in it."""
    absolute = Path(os.path.abspath(file))
    here = Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else file).as_posix()
