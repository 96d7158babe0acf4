"""RefragPipeline: a question and documents in, a streamed answer with its sources out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from refrag_lightning.inference.citations import resolve
from refrag_lightning.inference.decoding import Line, decode
from refrag_lightning.inference.joining import join
from refrag_lightning.inference.prepare import Preparation, Prepared
from refrag_lightning.inference.request import Request
from refrag_lightning.inference.rows import MEMORY_BYTES, RowReader, RowStore
from refrag_lightning.inference.sampling import Sampler
from refrag_lightning.inference.stream import Answer, AnswerStream, Cancel, Finish
from refrag_lightning.inference.worker import Worker
from refrag_lightning.inference.writing import TextWriter
from refrag_lightning.model.answering import end_tokens, stop_tokens
from refrag_lightning.model.load import load
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.model.refrag import RefragModel
from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Message
from refrag_lightning.text.tokenizer import RefragTokenizer

if TYPE_CHECKING:
    from refrag_lightning.retrieval.search import Method, Searcher


class RefragPipeline:
    """Answers requests from documents, given or searched for.

    Rows of documents come from the index where it holds them, and are encoded otherwise; those that
    were read last stay in memory. A pipeline answers one call at a time: others wait. Where many
    ask at once, `BatchingQueue` answers them together.

    Args:
        model: A REFRAG model, or a causal language model alone, which reads documents as text.
        tokenizer: Its tokenizer.
        store: The index whose row states are taken, if there is one.
        searcher: What searches it.
        memory_bytes: Most memory for the states of rows that were read last.
        window: Positions that prompt and answer may take; what the decoder's configuration says if
            None.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Gets rows; None for a model without an encoder.
        window: Positions that prompt and answer may take; None if nobody knows.
        end_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        model: RefragModel | PlainModel,
        tokenizer: RefragTokenizer,
        *,
        store: RowStore | None = None,
        searcher: Searcher | None = None,
        memory_bytes: int = MEMORY_BYTES,
        window: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rows: RowReader | None = None
        if isinstance(model, RefragModel):
            self.rows = RowReader(model, tokenizer, store=store, memory_bytes=memory_bytes)
        self.window = window or model.window
        self.end_ids = end_tokens(model, tokenizer)
        self._prepare = Preparation(
            tokenizer, rows=self.rows, searcher=searcher, window=self.window
        )
        self._lock = threading.Lock()
        self._worker = Worker("answers")

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        index: str | os.PathLike[str] | None = None,
        search: Method = "fused",
        embedder: str | None = None,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        allow_base_mismatch: bool = False,
        memory_bytes: int = MEMORY_BYTES,
        window: int | None = None,
    ) -> RefragPipeline:
        """Loads a model and opens an index.

        Args:
            model: A REFRAG folder, a run folder that has one, or the name or folder of any causal
                language model, which reads documents as text.
            index: A folder or address that `index build` wrote.
            search: How passages are searched for: `bm25`, `dense` or `fused`.
            embedder: What the index' vectors were made with; the model's encoder if None.
            device: Where to put the model.
            dtype: Of the base models; float32 if None.
            attn_implementation: As transformers takes it; its own choice if None.
            allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that
                the folder was trained on.
            memory_bytes: As in the class.
            window: As in the class.

        Raises:
            OSError: The model or the index is not found.
            ValueError: They do not fit.
        """
        loaded, tokenizer = load(
            model,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            allow_base_mismatch=allow_base_mismatch,
        )
        store = searcher = None
        if index is not None:
            store, searcher = _open_index(str(index), search, embedder, loaded, tokenizer)
        return cls(
            loaded,
            tokenizer,
            store=store,
            searcher=searcher,
            memory_bytes=memory_bytes,
            window=window,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def __call__(
        self,
        asked: str | Sequence[Message],
        documents: Sequence[Document | str] | None = None,
        *,
        cancel: Cancel | None = None,
        **options: Any,
    ) -> Answer:
        """Answers a question or a conversation.

        Args:
            asked: A question, or messages with `role` and `content`; see `Request.messages`.
            documents: Documents for the last message, or their texts.
            cancel: Asked between tokens whether to stop.
            **options: The fields of `Request` and `Sampling`: `search=5`, `max_new_tokens=64`, ...

        Raises:
            ValueError: Something of the request is wrong, or it is too long for the decoder.
        """
        stream = AnswerStream(Request.of(asked, documents, **options), cancel=cancel)
        self.run([stream])
        return stream.answer

    def stream(
        self,
        asked: str | Sequence[Message],
        documents: Sequence[Document | str] | None = None,
        *,
        cancel: Cancel | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Answers as `__call__` does, piece by piece, from the pipeline's own thread.

        What is wrong with the options is raised here; what goes wrong later, by the stream.
        """
        stream = AnswerStream(Request.of(asked, documents, **options), cancel=cancel)
        self._worker.do(self.run, [stream])
        return stream

    def prepare(
        self,
        asked: str | Sequence[Message],
        documents: Sequence[Document | str] | None = None,
        **options: Any,
    ) -> Prepared:
        """What the decoder would be given: a batch of one text, and the trace of its documents.

        Arguments are those of `__call__`.
        """
        with self._lock, torch.no_grad():
            [prepared] = self._prepare([Request.of(asked, documents, **options)])
        if isinstance(prepared, Exception):
            raise prepared
        return prepared

    def run(self, streams: Sequence[AnswerStream]) -> None:
        """Answers several requests together, each on its stream.

        Where one's prompt and another's answer take more positions than the window has, they are
        answered one after the other. A request that is wrong fails alone. If the model fails, all
        of them do; nothing is raised but what is no `Exception`, such as Ctrl-C.

        Args:
            streams: Streams that nobody answers yet.
        """
        try:
            with self._lock, torch.no_grad():
                self._run(streams)
        except BaseException as error:
            for stream in streams:
                stream.fail(error)
            if not isinstance(error, Exception):
                raise

    def _run(self, streams: Sequence[AnswerStream]) -> None:
        began = time.perf_counter()
        waiting = []
        for stream in streams:
            if stream.is_cancelled:
                stream.finish(Answer("", (), (), "cancelled", 0, None))
            else:
                waiting.append(stream)
        answering: list[tuple[AnswerStream, Prepared]] = []
        prepared = self._prepare([stream.request for stream in waiting])
        for stream, ready in zip(waiting, prepared, strict=True):
            if isinstance(ready, Exception):
                stream.fail(ready)
                continue
            ready.trace.seconds.queued = began - stream.arrived
            answering.append((stream, ready))
        for together in self._that_fit_together(answering):
            self._decode(together)

    def _that_fit_together(
        self, answering: Sequence[tuple[AnswerStream, Prepared]]
    ) -> list[list[tuple[AnswerStream, Prepared]]]:
        """Requests in batches none of whose lines passes the decoder's last position.

        A line takes positions until the batch's longest answer ends, also when its own is over.
        """
        batches: list[list[tuple[AnswerStream, Prepared]]] = []
        for one in answering:
            for batch in batches:
                readies = [ready for _, ready in (*batch, one)]
                longest = max(ready.trace.positions for ready in readies)
                most = max(ready.request.sampling.max_new_tokens for ready in readies)
                if self.window is None or longest + most <= self.window:
                    batch.append(one)
                    break
            else:
                batches.append([one])
        return batches

    def _decode(self, answering: Sequence[tuple[AnswerStream, Prepared]]) -> None:
        reading = time.perf_counter()
        batch = join(
            [ready.batch for _, ready in answering],
            padding_id=self.tokenizer.assembler.decoder_pad_id,
        )
        batch = {key: value.to(self.device) for key, value in batch.items()}
        lines = [self._line(stream, ready) for stream, ready in answering]
        for (_, ready), line in zip(answering, lines, strict=True):
            ready.trace.seed = line.sampler.seed
            ready.trace.batch_size = len(answering)

        def on_prefill() -> None:
            now = time.perf_counter()
            for stream, ready in answering:
                ready.trace.seconds.prefill = now - reading
                stream.begin(ready.trace)

        def on_token(number: int) -> None:
            stream, ready = answering[number]
            if not ready.trace.seconds.first_token:
                ready.trace.seconds.first_token = time.perf_counter() - stream.arrived
            ready.trace.new_tokens += 1

        def on_finish(number: int) -> None:
            stream, ready = answering[number]
            _finish(stream, ready, lines[number].writer)

        decode(
            self.model,
            batch,
            lines,
            max_new_tokens=max(r.request.sampling.max_new_tokens for _, r in answering),
            end_ids=self.end_ids,
            on_prefill=on_prefill,
            on_token=on_token,
            on_finish=on_finish,
        )

    def _line(self, stream: AnswerStream, ready: Prepared) -> Line:
        sampling = ready.request.sampling
        writer = TextWriter(
            self.tokenizer.decoder,
            stream.put,
            end_ids=frozenset({*self.end_ids, *stop_tokens(self.tokenizer, sampling.stop)}),
            max_new_tokens=sampling.max_new_tokens,
            stop=sampling.stop,
        )
        return Line(writer, Sampler(sampling), lambda: stream.is_cancelled)


def _finish(stream: AnswerStream, ready: Prepared, writer: TextWriter) -> None:
    trace = ready.trace
    trace.seconds.total = time.perf_counter() - stream.arrived
    trace.new_tokens = writer.num_tokens
    citations, unknown = resolve(writer.text, trace.placed)
    finish = cast(Finish, writer.finish)
    tokens = writer.num_tokens
    stream.finish(Answer(writer.text, tuple(citations), unknown, finish, tokens, trace))


def _open_index(
    index: str,
    search: Method,
    embedder: str | None,
    model: RefragModel | PlainModel,
    tokenizer: RefragTokenizer,
) -> tuple[Any, Searcher]:
    from refrag_lightning.retrieval import dense
    from refrag_lightning.retrieval.search import Searcher
    from refrag_lightning.retrieval.store import PassageStore

    store = PassageStore.open(index)
    embed = None if search == "bm25" else dense.embedder(embedder, model, tokenizer)
    return store, Searcher(store, search, embed)
