"""Time to first token: the pipeline, the bare model, and the same decoder with full text.

Every setup runs once a round, in an order drawn anew, so that whatever slows the machine for a
while slows all of them. What is compared is compared within a round: the ratios' spread is that of
one run. Loading and warming up are left out; search is not part of it.

| setup | what is timed |
|---|---|
| `rows@8` | the pipeline from the call to its first token, rows of 8 tokens |
| `bare rows@8` | the model alone on that request's tensors: `embed`, prefill, the first token |
| `text` | the pipeline with every document as text |
| `bare text` | the decoder alone on that request's tensors |
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.text.documents import Document

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

Source = Literal["store", "memory", "encoded"]
"""Where rows come from: the index, the pipeline's memory, or the encoder at each call."""


@dataclass(frozen=True)
class Spread:
    """Values of several rounds.

    Attributes:
        median: The middle one.
        low: A tenth of them are below.
        high: A tenth of them are above.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of values."""
        low, median, high = np.quantile(np.asarray(values), [0.1, 0.5, 0.9])
        return cls(float(median), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass
class Timing:
    """One setup's times.

    Attributes:
        name: The setup.
        positions: Positions of its prompt.
        seconds: Time to first token in each round.
        parts: Of the pipeline's setups, the parts of `trace.Seconds` in each round.
    """

    name: str
    positions: int = 0
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    @property
    def spread(self) -> Spread:
        """The times' spread."""
        return Spread.of(self.seconds)


@dataclass
class TimingReport:
    """Times to first token, and how they compare.

    Attributes:
        timings: The setups, by name.
        device: Where the model was.
        source: Where rows came from.
        rates: The rates.
        tokens: Positions of the prompt with every document as text.
    """

    timings: dict[str, Timing]
    device: str
    source: Source
    rates: tuple[int, ...]
    tokens: int

    def ratio(self, over: str, under: str) -> Spread:
        """One setup's time over another's, round by round."""
        pairs = zip(self.timings[over].seconds, self.timings[under].seconds, strict=True)
        return Spread.of([a / b for a, b in pairs])

    def overhead(self, name: str) -> Spread:
        """The pipeline's own share: its time over the bare model's, less 1."""
        ratio = self.ratio(name, f"bare {name}")
        return Spread(ratio.median - 1, ratio.low - 1, ratio.high - 1)

    def speedup(self, rate: int) -> Spread:
        """How many times sooner the first token comes than with full text, both by pipeline."""
        return self.ratio("text", f"rows@{rate}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: all times, overheads and speed-ups."""
        named = {name: timing.seconds for name, timing in self.timings.items()}
        has_text = "text" in self.timings
        pipelines = [name for name in self.timings if not name.startswith("bare ")]
        return {
            "device": self.device,
            "source": self.source,
            "tokens": self.tokens,
            "positions": {name: timing.positions for name, timing in self.timings.items()},
            "seconds": named,
            "parts": {name: self.timings[name].parts for name in pipelines},
            "overhead": {name: vars(self.overhead(name)) for name in pipelines},
            "speedup": {k: vars(self.speedup(k)) for k in self.rates} if has_text else {},
        }

    def table(self) -> Table:
        """The report as a table for a terminal."""
        from rich.table import Table

        title = f"time to first token, {self.tokens} tokens as text, {self.device}, {self.source}"
        table = Table("setup", "positions", "seconds", "over bare", "text / this", title=title)
        for name, timing in self.timings.items():
            is_bare = name.startswith("bare ")
            text = "bare text" if is_bare else "text"
            table.add_row(
                name,
                str(timing.positions),
                str(timing.spread),
                "" if is_bare else str(self.ratio(name, f"bare {name}")),
                str(self.ratio(text, name)) if text in self.timings else "",
            )
        return table


def time_to_first_token(
    pipeline: RefragPipeline,
    question: str,
    documents: Sequence[Document | str],
    *,
    rates: Sequence[int] | None = None,
    rounds: int = 10,
    warmup: int = 2,
    source: Source = "store",
    full_text: bool = True,
    seed: int = 0,
    **options: Any,
) -> TimingReport:
    """Measures a request under every setup of the module's table.

    Args:
        pipeline: The pipeline.
        question: The question.
        documents: The documents.
        rates: Tokens a row, of the setups with rows; all rates of the model if None.
        rounds: How often each setup is timed.
        warmup: Rounds before that, which are thrown away.
        source: Where the rows come from. From the index (`store`), nothing is remembered between
            calls.
        full_text: Whether the setups with full text run, which may take long.
        seed: Of the order of the setups.
        **options: Of the request, such as `prompt`.

    Raises:
        ValueError: The model has no encoder, the index lacks rows that should come from it, or an
            argument is out of its range.
    """
    reader = pipeline.rows
    if reader is None:
        raise ValueError("a model without an encoder has no rows to time")
    if source not in get_args(Source):
        raise ValueError(f"source ({source!r}) must be one of {get_args(Source)}")
    if rounds < 1:
        raise ValueError(f"rounds ({rounds}) must be at least 1")
    chosen = tuple(pipeline.tokenizer.rates if rates is None else rates)
    request = {**options, "max_new_tokens": 1}
    setups: dict[str, dict[str, Any]] = {f"rows@{rate}": {"rate": rate} for rate in chosen}
    if full_text:
        setups["text"] = {"expand": "all"}

    timings: dict[str, Timing] = {}
    runs: dict[str, Callable[[], float]] = {}
    tokens = 0
    for name, setup in setups.items():
        if source == "store":
            reader.memory.clear()
        prepared = pipeline.prepare(question, documents, **request, **setup)
        origins = set(prepared.trace.origins)
        if source == "store" and name != "text" and origins != {"store"}:
            raise ValueError(
                f"source ('store'): not all documents have rows at {name} in the index; they came "
                f"from {', '.join(sorted(origins))}"
            )
        tokens = prepared.trace.positions_as_text
        timing = timings[name] = Timing(name, prepared.trace.positions)
        bare = timings[f"bare {name}"] = Timing(f"bare {name}", prepared.trace.positions)
        batch = {key: value.to(pipeline.device) for key, value in prepared.batch.items()}
        run = _PipelineRun(pipeline, question, documents, {**request, **setup}, source, timing)
        runs[name] = run
        runs[bare.name] = _BareRun(pipeline, batch)

    order = random.Random(seed)
    for round_number in range(-warmup, rounds):
        for name in order.sample(sorted(runs), len(runs)):
            seconds = runs[name]()
            if round_number >= 0:
                timings[name].seconds.append(seconds)
    for timing in timings.values():
        timing.parts = timing.parts[warmup:]
    device = pipeline.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return TimingReport(timings, name, source, chosen, tokens)


def take_tokens(texts: Sequence[str], pipeline: RefragPipeline, num_tokens: int) -> list[str]:
    """As many texts as have so many decoder tokens together; the last one is cut.

    Args:
        texts: The texts.
        pipeline: Whose decoder counts.
        num_tokens: How many tokens.

    Raises:
        ValueError: The texts have fewer.
    """
    taken, left = [], num_tokens
    for text, read in zip(texts, pipeline.tokenizer.plain_decoder(texts), strict=True):
        if left <= 0:
            break
        taken.append(text if len(read.ids) <= left else text[: read.ends[left - 1]])
        left -= len(read.ids)
    if left > 0:
        raise ValueError(f"the texts have {num_tokens - left} tokens, fewer than {num_tokens}")
    return taken


@dataclass
class _PipelineRun:
    """A request through the pipeline, streamed as a user's is."""

    pipeline: RefragPipeline
    question: str
    documents: Sequence[Document | str]
    options: Mapping[str, Any]
    source: Source
    timing: Timing

    def __call__(self) -> float:
        with _rows_from(self.pipeline, self.source):
            started = time.perf_counter()
            stream = self.pipeline.stream(self.question, self.documents, **self.options)
            seconds = stream.answer.trace.seconds  # type: ignore[union-attr]
        self.timing.parts.append(dict(vars(seconds)))
        return stream.arrived + seconds.first_token - started


@dataclass
class _BareRun:
    """The model alone, on tensors that are on its device."""

    pipeline: RefragPipeline
    batch: Mapping[str, Tensor]

    @torch.no_grad()
    def __call__(self) -> float:
        model = self.pipeline.model
        # Without padding, as here, transformers' `generate` gives no mask either.
        options: dict[str, Any] = {"attention_mask": None, "use_cache": True}
        if model.decoder._supports_logits_to_keep():
            options["logits_to_keep"] = 1
        started = time.perf_counter()
        logits = model.decoder(inputs_embeds=model.embed(self.batch), **options).logits
        int(logits[0, -1].argmax())  # waits for the device
        return time.perf_counter() - started


@contextmanager
def _rows_from(pipeline: RefragPipeline, source: Source) -> Iterator[None]:
    """Lets rows come from one place alone."""
    reader = pipeline.rows
    assert reader is not None
    store = reader.store
    if source != "memory":
        reader.memory.clear()
    if source == "encoded":
        reader.store = None
    try:
        yield
    finally:
        reader.store = store
