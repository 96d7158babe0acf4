"""A corpus: texts with the places where they may be cut, counted in both tokenizers' tokens.

Each text is tokenized once. What is kept of it are its bytes and, for each place before a word, how
many encoder and decoder tokens end before that place; a stretch of any number of tokens is then
found by a search, and cut between words. It is kept in an Arrow file that is mapped into memory, so
a corpus may be larger than it, and a stretch of a whole book is read as fast as one of a line.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from refrag_lightning.cache import build_folder, cache_dir
from refrag_lightning.data.sources import Split, TextSource
from refrag_lightning.text.packing import is_white_space
from refrag_lightning.text.plain import PlainTokenizer
from refrag_lightning.text.tokenizer import RefragTokenizer

Unit = Literal["encoder", "decoder"]

# Part of the cache's key: raise it when the same text gives another file.
_CACHE_VERSION = 1
_FILE = "corpus.arrow"
# A stretch of more tokens without white space (a web address, or Chinese) is also cut inside.
_LONGEST_WORD = 16
# Characters of text that are tokenized and written at once.
_BATCH = 1 << 22
_COUNTS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [("text", pa.large_binary()), ("places", _COUNTS), ("encoder", _COUNTS), ("decoder", _COUNTS)]
)


@dataclass(frozen=True)
class CorpusText:
    """One text and its cuts (N in all, the first at its beginning and the last at its end).

    Attributes:
        data: The text in UTF-8.
        places: (N,) where each cut is, in bytes.
        encoder: (N,) encoder tokens before each cut, more from each cut to the next.
        decoder: (N,) decoder tokens before each cut.
    """

    data: memoryview
    places: np.ndarray
    encoder: np.ndarray
    decoder: np.ndarray

    def between(self, first: int, last: int) -> str:
        """The text from one cut to another. White space before a word is part of it."""
        return bytes(self.data[self.places[first] : self.places[last]]).decode()

    def counts(self, unit: Unit) -> np.ndarray:
        """(N,) tokens before each cut."""
        return self.encoder if unit == "encoder" else self.decoder

    def after(self, first: int, num_tokens: int, unit: Unit) -> int:
        """The last cut at most `num_tokens` tokens after cut `first`, but at least the next one."""
        counts = self.counts(unit)
        cut = bisect_right(counts, counts[first] + num_tokens, lo=first) - 1
        return min(max(cut, first + 1), len(counts) - 1)

    def before(self, last: int, num_tokens: int, unit: Unit) -> int:
        """The first cut at most `num_tokens` tokens before cut `last`, but at least one before."""
        counts = self.counts(unit)
        cut = int(np.searchsorted(counts[: last + 1], counts[last] - num_tokens))
        return max(min(cut, last - 1), 0)


class Corpus:
    """The texts of a file that `write_corpus` wrote.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            self._batches = [_Columns.of(batch) for batch in reader]
        self._firsts = np.cumsum([0, *(len(batch) for batch in self._batches)])
        self._totals = {
            "encoder": _concatenated([batch.totals(batch.encoder) for batch in self._batches]),
            "decoder": _concatenated([batch.totals(batch.decoder) for batch in self._batches]),
        }
        self._rooms: dict[tuple[Unit, int, int], np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the file itself.
        return Corpus, (self.path,)

    def __len__(self) -> int:
        """Number of texts."""
        return int(self._firsts[-1])

    def __getitem__(self, number: int) -> CorpusText:
        batch = bisect_right(self._firsts, number) - 1
        return self._batches[batch].text(number - int(self._firsts[batch]))

    def totals(self, unit: Unit) -> np.ndarray:
        """Tokens of each text."""
        return self._totals[unit]

    def draw(
        self, random: np.random.Generator, *, context: int, continuation: int, unit: Unit
    ) -> tuple[CorpusText, int]:
        """Draws where a context begins, each place of the corpus where it fits as likely as others.

        Args:
            random: Where the random numbers come from.
            context: Tokens of the context.
            continuation: Decoder tokens that shall follow it in the same text.
            unit: Whose tokens `context` counts.

        Returns:
            A text and the number of a cut in it. The text after the context holds about
            `continuation` decoder tokens, and at least one word.

        Raises:
            ValueError: If no text is long enough.
        """
        ends = self._rooms.get((unit, context, continuation))
        if ends is None:
            ends = np.cumsum(np.maximum(self._room(context, continuation, unit), 0))
            self._rooms[unit, context, continuation] = ends
        if not len(ends) or not ends[-1]:
            raise ValueError(
                f"no text has the {context} {unit} tokens of a context and {continuation} decoder "
                f"tokens to follow; the longest has {self._totals[unit].max(initial=0)} {unit} "
                "tokens"
            )
        place = int(random.integers(ends[-1]))
        number = int(np.searchsorted(ends, place, side="right"))
        text = self[number]
        token = place - int(ends[number - 1] if number else 0)
        return text, bisect_right(text.counts(unit), token) - 1

    def _room(self, context: int, continuation: int, unit: Unit) -> np.ndarray:
        """In how many places of each text a context can begin, in tokens."""
        totals = self._totals[unit]
        # The continuation in the context's tokens, at the text's own ratio of the two.
        after = np.ceil(continuation * totals / np.maximum(self._totals["decoder"], 1))
        return totals - context - after.astype(np.int64)


def open_corpus(source: TextSource, split: Split, tokenizer: RefragTokenizer) -> Corpus:
    """The corpus of a source's split, from the cache, which is filled where it is empty.

    Args:
        source: Where the texts come from.
        split: Which of them.
        tokenizer: Whose encoder's and decoder's tokens are counted.

    Raises:
        ValueError: If there is no text.
    """
    parts = {
        "version": _CACHE_VERSION,
        "source": source.key(),
        "split": split,
        "tokenizers": [_encoder(tokenizer).fingerprint, tokenizer.plain_decoder.fingerprint],
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def write(folder: Path) -> None:
        if not write_corpus(source.texts(split), tokenizer, folder / _FILE):
            more = "" if split == "train" else f": give {split}_source, or hold some out (held_out)"
            raise ValueError(f"{json.dumps(source.key())} has no text for {split}{more}")

    folder = cache_dir() / "data" / f"corpus-{key}"
    if not folder.is_dir():
        build_folder(folder, write)
    return Corpus(folder / _FILE)


def write_corpus(texts: Iterable[str], tokenizer: RefragTokenizer, path: Path) -> int:
    """Tokenizes texts and writes them with their cuts.

    Args:
        texts: The texts; white space around them is left out, and so are texts that the encoder
            reads no token of.
        tokenizer: Whose encoder's and decoder's tokens are counted.
        path: The file that is written.

    Returns:
        How many texts were written.
    """
    written = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        waiting: list[str] = []
        size = 0
        for text in texts:
            waiting.append(text.strip())
            size += len(waiting[-1])
            if size >= _BATCH:
                written += _write(waiting, tokenizer, writer)
                waiting, size = [], 0
        written += _write(waiting, tokenizer, writer)
    return written


def _encoder(tokenizer: RefragTokenizer) -> PlainTokenizer:
    # Without an encoder only the decoder's tokens count.
    return tokenizer.plain_decoder if tokenizer.encoder is None else tokenizer.plain_encoder


def _write(texts: list[str], tokenizer: RefragTokenizer, writer: Any) -> int:
    rows = []
    encoded = _encoder(tokenizer)(texts)
    decoded = tokenizer.plain_decoder(texts)
    for text, encoder, decoder in zip(texts, encoded, decoded, strict=True):
        if not encoder.ids.size:
            continue
        characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        cuts = _cuts(characters, encoder.ends)
        encoder_counts = np.searchsorted(encoder.ends, cuts, side="right")
        # A word that the encoder reads nothing of goes with the one before it.
        kept = np.flatnonzero(np.diff(encoder_counts, prepend=-1))
        cuts, encoder_counts = cuts[kept], encoder_counts[kept]
        cuts[-1] = len(text)
        bytes_before = np.cumsum([0, *_utf8_sizes(characters)])
        decoder_counts = np.searchsorted(decoder.ends, cuts, side="right")
        rows.append((text.encode(), bytes_before[cuts], encoder_counts, decoder_counts))
    if rows:
        columns = [
            pa.array([row[place] for row in rows], field.type)
            for place, field in enumerate(_SCHEMA)
        ]
        writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    return len(rows)


def _cuts(characters: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where a text may be cut, in characters: before the white space of each word."""
    is_space = is_white_space(characters)
    words = np.flatnonzero(is_space[1:] & ~is_space[:-1]) + 1
    cuts = np.concatenate([[0], words, [len(characters)]])
    # Tokens of the word that each token lies in.
    word_of_token = np.searchsorted(cuts[1:], ends, side="left")
    long = np.bincount(word_of_token, minlength=len(cuts) - 1)[word_of_token] > _LONGEST_WORD
    inner = ends[long]
    return np.unique(np.concatenate([cuts, inner[~is_space[inner - 1]]]))


def _utf8_sizes(characters: np.ndarray) -> np.ndarray:
    return 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)


@dataclass(frozen=True)
class _Columns:
    """The columns of a record batch, as views of the mapped file."""

    data: memoryview
    text_offsets: np.ndarray
    cut_offsets: np.ndarray
    places: np.ndarray
    encoder: np.ndarray
    decoder: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Columns:
        text, *lists = batch.columns
        offsets = np.frombuffer(text.buffers()[1], dtype=np.int64)[: len(text) + 1]
        values = [column.values.to_numpy(zero_copy_only=True) for column in lists]
        # A text has as many values in each of the lists.
        return cls(memoryview(text.buffers()[2]), offsets, lists[0].offsets.to_numpy(), *values)

    def __len__(self) -> int:
        return len(self.cut_offsets) - 1

    def totals(self, counts: np.ndarray) -> np.ndarray:
        return counts[self.cut_offsets[1:] - 1].astype(np.int64)

    def text(self, number: int) -> CorpusText:
        cuts = slice(self.cut_offsets[number], self.cut_offsets[number + 1])
        return CorpusText(
            self.data[self.text_offsets[number] : self.text_offsets[number + 1]],
            self.places[cuts],
            self.encoder[cuts],
            self.decoder[cuts],
        )


def _concatenated(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])
