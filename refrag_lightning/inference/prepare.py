"""From requests to tensors: search, prompt, rows, batch. One request's error is its own.

Requests that come together are searched for with one call, and so are their rows in the index and
in the encoder. Their batches are built apart and joined, so neither a rate nor an error of one
touches another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from refrag_lightning.inference.prompt import Conversation, PlacedDocument, converse, question_of
from refrag_lightning.inference.prompt import write as write_prompt
from refrag_lightning.inference.request import Request
from refrag_lightning.inference.rows import DocumentRows, KnownRows, RowReader
from refrag_lightning.inference.trace import RowOrigin, Seconds, Trace
from refrag_lightning.inference.window import shorten
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.text.packing import as_text_only
from refrag_lightning.text.segments import Segment

if TYPE_CHECKING:
    from refrag_lightning.retrieval.search import Hit, Searcher
    from refrag_lightning.text.tokenizer import RefragTokenizer

T = TypeVar("T")


@dataclass
class Prepared:
    """A request that is ready to be answered.

    Attributes:
        request: The request.
        conversation: Its messages and documents, as they are read.
        batch: Its tensors, with the states of all rows that stand as vectors.
        trace: What became of its documents.
    """

    request: Request
    conversation: Conversation
    batch: RefragBatch
    trace: Trace


@dataclass
class _Work:
    """What is known so far of a request.

    Attributes:
        request: The request.
        tokenizer: The model's, at the request's rate.
        seconds: Where the time went.
        hits: What was searched for.
        rows: Rows of its documents, by text.
        origins: Where they come from.
        actions: What was left out or cut.
    """

    request: Request
    tokenizer: RefragTokenizer
    seconds: Seconds
    hits: Sequence[Hit] = ()
    conversation: Conversation = field(default_factory=lambda: Conversation((), ()))
    rows: dict[str, DocumentRows] = field(default_factory=dict)
    origins: dict[str, RowOrigin] = field(default_factory=dict)
    actions: list[str] = field(default_factory=list)


class Preparation:
    """Prepares requests.

    Args:
        tokenizer: The model's tokenizer.
        rows: Gets rows of documents; None for a model without an encoder.
        searcher: Finds passages; None where there is no index.
        window: Positions that the decoder has; None if that is unknown.
    """

    def __init__(
        self,
        tokenizer: RefragTokenizer,
        *,
        rows: RowReader | None = None,
        searcher: Searcher | None = None,
        window: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self.searcher = searcher
        self.window = window

    def __call__(self, requests: Sequence[Request]) -> list[Prepared | Exception]:
        """Each request prepared, or what is wrong with it."""
        work: list[_Work | Exception] = _each(self._begin, requests)
        work = _together(self._search, work)
        work = _each(self._converse, work)
        work = _together(self._read_rows, work)
        return _each(self._build, work)

    def _begin(self, request: Request) -> _Work:
        tokenizer = self.tokenizer
        if request.rate is not None and self.rows is not None:
            tokenizer = tokenizer.at(request.rate)
        if request.search and self.searcher is None:
            raise ValueError(f"search ({request.search}) needs an index, and none is open")
        return _Work(request, tokenizer, Seconds())

    def _search(self, works: Sequence[_Work]) -> None:
        searching = [work for work in works if work.request.search]
        if not searching:
            return
        assert self.searcher is not None
        started = time.perf_counter()
        queries = [question_of(work.request) for work in searching]
        if "" in queries:
            raise ValueError("the last user's message says nothing that could be searched for")
        most = max(work.request.search for work in searching)
        for work, hits in zip(searching, self.searcher.search(queries, k=most), strict=True):
            work.hits = hits[: work.request.search]
        for work in searching:
            work.seconds.search = time.perf_counter() - started

    def _converse(self, work: _Work) -> _Work:
        started = time.perf_counter()
        passages, scores = [hit.passage for hit in work.hits], [hit.score for hit in work.hits]
        work.conversation = converse(work.request, passages, scores)
        work.seconds.building += time.perf_counter() - started
        return work

    def _read_rows(self, works: Sequence[_Work]) -> None:
        if self.rows is None:
            return
        by_rate: dict[int, list[_Work]] = {}
        for work in works:
            by_rate.setdefault(work.tokenizer.compression, []).append(work)
        for rate, some in by_rate.items():
            wanted = [_compressed(work.conversation) for work in some]
            found = self.rows.read([text for texts in wanted for text in texts], rate)
            for work, texts in zip(some, wanted, strict=True):
                work.rows = {text: found.rows[text] for text in texts}
                work.origins = {text: found.origins[text] for text in texts}
                work.seconds.lookup = found.lookup_seconds
                work.seconds.encoding = found.encoding_seconds

    def _build(self, work: _Work) -> Prepared:
        started = time.perf_counter()
        while True:
            segments, batch = self._assemble(work)
            positions = batch["input_ids"].shape[1]
            excess = self._excess(work.request, positions)
            if excess <= 0:
                break
            shorter = shorten(
                work.conversation, excess, work.request.too_long, work.tokenizer, work.rows
            )
            if not shorter.actions:
                raise ValueError(self._too_long(work.request, positions))
            work.conversation = shorter.conversation
            work.actions += shorter.actions
            work.rows = {**shorter.rows, **work.rows}
            for text, before in shorter.cut.items():
                if before in work.origins:
                    work.origins.setdefault(text, work.origins[before])
        placed = _in_order(work.conversation.documents, segments)
        work.seconds.building += time.perf_counter() - started
        trace = Trace(
            placed=placed,
            origins=[work.origins.get(p.document.text, "text") for p in placed],
            row_traces=batch.trace[0],
            segments=segments,
            tokenizer=work.tokenizer,
            rate=None if self.rows is None else work.tokenizer.compression,
            positions=positions,
            window=self.window,
            actions=tuple(work.actions),
            seconds=work.seconds,
        )
        return Prepared(work.request, work.conversation, batch, trace)

    def _assemble(self, work: _Work) -> tuple[list[Segment], RefragBatch]:
        """The prompt's segments and tensors."""
        segments = write_prompt(work.conversation, work.tokenizer, work.request)
        placed = _in_order(work.conversation.documents, segments)
        rows = work.rows
        packed = {}
        for one in placed:
            text = one.document.text
            packed[text] = rows[text].packed if text in rows else as_text_only(text)
        expanded: list[int] = []
        first = 0
        for one in placed:
            num_rows = packed[one.document.text].num_rows
            expanded += [first + row for row in _expanded_rows(one, num_rows, rows)]
            first += num_rows
        states, mask = _states(packed, rows)
        building = KnownRows(work.tokenizer, packed, context="document")
        batch = building.build(
            [segments], expand=[expanded], row_states=states, row_states_mask=mask
        )
        return segments, batch

    def _excess(self, request: Request, positions: int) -> int:
        """Positions that a prompt and its answer have too many."""
        if self.window is None:
            return 0
        room = self.window - request.sampling.max_new_tokens
        if room < 1 or (positions > room and request.too_long == "error"):
            raise ValueError(self._too_long(request, positions))
        return positions - room

    def _too_long(self, request: Request, positions: int) -> str:
        advice = ""
        if request.too_long == "error" and (request.documents or request.search):
            advice = "; too_long='drop' leaves out documents, 'truncate' cuts them"
        return (
            f"the prompt takes {positions} positions and max_new_tokens "
            f"({request.sampling.max_new_tokens}) more, but the decoder has {self.window}{advice}"
        )


def _compressed(conversation: Conversation) -> list[str]:
    """The texts of the documents that do not stand wholly as text."""
    return [p.document.text for p in conversation.documents if p.expand != "all"]


def _in_order(
    documents: Sequence[PlacedDocument], segments: Sequence[Segment]
) -> list[PlacedDocument]:
    """The documents in the order in which the decoder reads them; a template may change it."""
    by_content = {(p.document.id, p.document.title, p.document.text): p for p in documents}
    found = [segment.document for segment in segments if segment.document is not None]
    return [by_content[document.id, document.title, document.text] for document in found]


def _expanded_rows(
    placed: PlacedDocument, num_rows: int, rows: dict[str, DocumentRows]
) -> Sequence[int]:
    """Which rows of a document stand as text."""
    if placed.expand == "all" or placed.document.text not in rows:
        return range(num_rows)
    if placed.expand == "none":
        return ()
    chosen = sorted({int(row) for row in placed.expand})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < num_rows:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise ValueError(
            f"expand: document {placed.document.id!r} has {num_rows} rows, no row {wrong}"
        )
    return chosen


def _states(
    packed: dict[str, Any], rows: dict[str, DocumentRows]
) -> tuple[Tensor | None, Tensor | None]:
    """The states of all rows in the documents' order, and which of them are known."""
    known = [rows[text].states for text in packed if text in rows]
    if not known:
        return None, None
    states = [
        rows[text].states
        if text in rows
        else known[0].new_zeros((document.num_rows, *known[0].shape[1:]))
        for text, document in packed.items()
    ]
    counts = [document.num_rows for document in packed.values()]
    mask = np.repeat([text in rows for text in packed], counts)
    return torch.cat(states), torch.from_numpy(mask)


def _each(function: Callable[[Any], T], items: Sequence[Any]) -> list[T | Exception]:
    """What a function makes of each item, or what it raises; exceptions stay as they are."""
    made: list[T | Exception] = []
    for item in items:
        if isinstance(item, Exception):
            made.append(item)
            continue
        try:
            made.append(function(item))
        except Exception as error:
            made.append(error)
    return made


def _together(
    function: Callable[[Sequence[Any]], None], items: Sequence[Any]
) -> list[Any | Exception]:
    """Lets a function work on all items at once, and on each alone where that fails."""
    good = [item for item in items if not isinstance(item, Exception)]
    try:
        function(good)
    except Exception:

        def alone(item: Any) -> Any:
            function([item])
            return item

        return _each(alone, items)
    return list(items)
