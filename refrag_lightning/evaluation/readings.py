"""Readings: the same question, with its documents read in one way or another.

| name | what the decoder reads of the documents |
|---|---|
| `rows@8` | their rows of 8 tokens |
| `full` | their text |
| `cut@8` | of each document's text as many tokens from its beginning as its rows of 8 take |
| `last@8` | the same from its end |
| `none` | nothing at all, neither text nor header |
| `titles` | the headers alone |
| `other@8` | under their own headers the rows of another question's documents |
| `random@8` | their rows through a projector with random weights |
| `zero@8` | zero vectors in their rows' places |
| `bm25@8+0.1` | their rows of 8, a tenth of a prompt's as their own tokens: the best ones by BM25 |
| `drawn@8+0.1` | the same with as many rows that are drawn: what the choice is worth |

`other`, `random` and `zero` are controls: they show the same positions and headers as `rows`, and
nothing of the documents, so what they score above `titles` (where headers tell nothing, above
`none`) does not come from documents. All of them go through the model's own `embed`: a reading is a
change of the segments, of what is expanded, or of the projector.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from refrag_lightning.model import RefragModel
from refrag_lightning.model.decoder import word_embeddings
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.text.documents import Document
from refrag_lightning.text.expansion import num_expanded
from refrag_lightning.text.plain import After
from refrag_lightning.text.segments import Segment
from refrag_lightning.text.tokenizer import RefragTokenizer

Kind = Literal[
    "rows", "full", "cut", "last", "none", "titles", "other", "random", "zero", "bm25", "drawn"
]
Segments = Sequence[Segment]

KINDS: tuple[Kind, ...] = get_args(Kind)
CONTROLS: tuple[Kind, ...] = ("other", "random", "zero")
WITH_SHARE: tuple[Kind, ...] = ("bm25", "drawn")
WITH_ROWS: tuple[Kind, ...] = ("rows", *CONTROLS, *WITH_SHARE)
WITH_RATE: tuple[Kind, ...] = (*WITH_ROWS, "cut", "last")

_NAME = re.compile(r"([a-z][a-z\d]*)(?:@(\d+))?(?:\+(\d*\.?\d+))?")


@dataclass(frozen=True)
class Reading:
    """One way to read a question's documents; see the module's table.

    Attributes:
        kind: Which.
        rate: Tokens a row, of the kinds that have rows or are as long as them.
        share: Of a prompt's rows, those that stand as their own tokens, of the kinds that choose
            some; rounded as where a share is drawn in training.
    """

    kind: Kind
    rate: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, name: str) -> Reading:
        """The reading of a name such as `full`, `rows@8` or `bm25@8+0.1`.

        Raises:
            ValueError: If there is no such reading.
        """
        found = _NAME.fullmatch(name)
        if found is None or found[1] not in KINDS:
            raise ValueError(f"there is no reading {name!r}; there are {', '.join(KINDS)}")
        kind: Any = found[1]
        given = (found[2] is not None, found[3] is not None)
        if given != (kind in WITH_RATE, kind in WITH_SHARE):
            wanted = f"{kind}@RATE, such as {kind}@8" if kind in WITH_RATE else kind
            if kind in WITH_SHARE:
                wanted = f"{kind}@RATE+SHARE, such as {kind}@8+0.1"
            raise ValueError(f"the reading {name!r} has to be written {wanted}")
        share = float(found[3]) if found[3] else None
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"the reading {name!r} has a share of rows that is not above 0 to 1")
        return cls(kind, int(found[2]) if found[2] else None, share)

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        rate = "" if self.rate is None else f"@{self.rate}"
        return f"{self.kind}{rate}" + ("" if self.share is None else f"+{self.share:g}")

    @property
    def has_rows(self) -> bool:
        """Whether documents stand as vectors."""
        return self.kind in WITH_ROWS


def readings_of(kinds: Sequence[str], rates: Sequence[int]) -> list[Reading]:
    """Readings by name; a kind without its rate stands for that kind at each rate.

    Args:
        kinds: Names such as `full`, `rows@8`, or `rows` and `bm25+0.1` for every rate.
        rates: The rates.

    Returns:
        Each reading once, in order.

    Raises:
        ValueError: If there is no such reading.
    """
    readings: dict[Reading, None] = {}
    for kind in kinds:
        bare, plus, share = kind.partition("+")
        names = [f"{bare}@{rate}{plus}{share}" for rate in rates] if bare in WITH_RATE else [kind]
        readings.update((Reading.parse(name), None) for name in names)
    return list(readings)


def read(
    texts: Sequence[Segments],
    reading: Reading,
    tokenizer: RefragTokenizer,
    *,
    others: Sequence[Sequence[str]] = (),
) -> list[list[Segment]]:
    """The texts as a reading has them.

    Args:
        texts: What the decoder would read with whole documents.
        reading: How to read them.
        tokenizer: The model's tokenizer.
        others: For `other`, for each text the documents whose rows take the place of its own.

    Returns:
        For each text its segments.

    Raises:
        ValueError: If `other` has no documents to take.
    """
    if reading.rate is not None and tokenizer.encoder is not None:
        tokenizer = tokenizer.at(reading.rate)
    if reading.kind == "none":
        return [_without_documents(text) for text in texts]
    if reading.kind == "titles":
        return [_with_documents(text, [""] * len(documents_of(text))) for text in texts]
    if reading.kind in ("cut", "last"):
        cut = _cut_documents(texts, reading, tokenizer)
        # Without a space of their own, which would be a token more than the rows have positions.
        return [_with_documents(t, [cut[d] for d in documents_of(t)], after="text") for t in texts]
    if reading.kind == "other":
        return [
            _with_documents(text, _as_many(strange, len(documents_of(text))))
            for text, strange in zip(texts, others, strict=True)
        ]
    return [list(text) for text in texts]


def documents_of(text: Segments) -> list[str]:
    """The texts of a text's documents, in order."""
    return [segment.text for segment in text if segment.document is not None]


def build(
    texts: Sequence[Segments],
    reading: Reading,
    tokenizer: RefragTokenizer,
    *,
    others: Sequence[Sequence[str]] = (),
    questions: Sequence[str] = (),
    padding_side: Literal["left", "right"] = "right",
) -> tuple[RefragBatch, list[list[Segment]]]:
    """The batch of a reading, and the segments that it was built of.

    Args:
        texts: As in `read`, and so are the following arguments.
        reading: How to read them.
        tokenizer: The model's tokenizer.
        others: For `other`.
        questions: For each text what its rows are chosen for, where the reading chooses some.
        padding_side: Where shorter texts are padded.

    Raises:
        ValueError: As in `read`; or rows are to be chosen and a text has no question.
    """
    segments = read(texts, reading, tokenizer, others=others)
    if reading.has_rows:
        assert reading.rate is not None
        tokenizer = tokenizer.at(reading.rate)
    expand: Any = "none"
    if reading.share is not None:
        if len(questions) != len(segments):
            raise ValueError(
                f"the reading {reading.name!r} needs each text's question: "
                f"there are {len(questions)} for {len(segments)} texts"
            )
        expand = _chosen_rows(segments, reading, tokenizer, questions)
    batch = tokenizer.build(
        segments, expand=expand, text_only=not reading.has_rows, padding_side=padding_side
    )
    return batch, segments


def best_rows(texts: Sequence[str], question: str, number: int) -> np.ndarray:
    """The rows that BM25 finds nearest to a question; ties, as of rows without a match, in order.

    The scores are those of `retrieval.bm25` (as Lucene computes it: Kamphuis et al. 2020), with a
    row for a passage: English stems, without stop words.

    Args:
        texts: The characters of each row, of all documents of a prompt.
        question: What is asked.
        number: How many rows.

    Returns:
        (number,) their indices, rising.
    """
    import bm25s
    import Stemmer

    options: dict[str, Any] = {"stopwords": "english", "stemmer": Stemmer.Stemmer("english")}
    options |= {"token_pattern": r"(?u)\b\w+\b", "show_progress": False}
    scores = np.zeros(len(texts), dtype=np.float32)
    words = bm25s.tokenize(list(texts), **options)
    asked = bm25s.tokenize([question], return_ids=False, **options)[0]
    # bm25s can neither index nothing nor look for it.
    if any(word in words.vocab for word in asked):
        index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        index.index(words, show_progress=False)
        scores = index.get_scores_from_ids(index.get_tokens_ids(asked))
    return np.sort(np.argsort(-scores, kind="stable")[:number])


class RowBank:
    """Row states of documents at one rate: encoded once, and read by any number of batches.

    What a row's state is depends on its document alone, so it does not matter in which batch it
    was encoded.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rate: Tokens a row.
        documents: Their texts.
        device: Where the model is.
    """

    def __init__(
        self,
        model: RefragModel,
        tokenizer: RefragTokenizer,
        *,
        rate: int,
        documents: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> None:
        unique = list(dict.fromkeys(documents))
        text = [Segment(document, "document", Document(document)) for document in unique]
        batch = tokenizer.at(rate).build([text])
        trace: Any = batch.trace[0]
        self._rows = {
            document: trace.rows[trace.documents == number]
            for number, document in enumerate(unique)
        }
        self._states = model.encode(batch.to(device))

    def fill(self, batch: RefragBatch, texts: Sequence[Segments]) -> RefragBatch:
        """Gives a batch the states of its rows in place, and takes its encoder's tokens away.

        Args:
            batch: Built at the same rate; of a row that stands as tokens the state is not read.
            texts: The segments that it was built of.

        Raises:
            KeyError: If it holds a document that the bank does not.
        """
        places = np.zeros(batch.num_rows, dtype=np.int64)
        for text, trace in zip(texts, batch.trace, strict=True):
            rows: Any = trace
            for number, document in enumerate(documents_of(text)):
                places[rows.rows[rows.documents == number]] = self._rows[document]
        index = torch.from_numpy(places).to(self._states.device)
        batch["row_states"] = self._states.index_select(0, index)
        batch["row_states_mask"] = torch.ones_like(batch["row_states_mask"])
        for key in ("encoder_input_ids", "encoder_attention_mask", "encoder_row_ids"):
            batch[key] = batch[key][:0]
        return batch


class ZeroProjector(nn.Module):
    """A projector that gives zeros.

    Args:
        output_size: D.
    """

    def __init__(self, output_size: int) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, states: Tensor) -> Tensor:
        """Zeros (..., D) for states (..., E_row)."""
        return states.new_zeros((*states.shape[:-1], self.output_size))


def control_projectors(model: RefragModel, *, seed: int = 0) -> dict[Kind, nn.Module]:
    """The projectors of the controls.

    Args:
        model: The model; it keeps its own projector.
        seed: Of the random weights.

    Returns:
        `random`: with weights as training would start from, but the trained scale. `zero`: zeros.
    """
    device = model.projector.scale.device
    drawn = deepcopy(model.projector).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn.reset_parameters(scale=float(drawn.scale.detach()))
    size = word_embeddings(model.decoder).weight.shape[1]
    return {"random": drawn.to(device).eval(), "zero": ZeroProjector(size)}


@contextmanager
def projector_of(
    model: RefragModel, reading: Reading, controls: dict[Kind, nn.Module]
) -> Iterator[None]:
    """Lets the model read rows through a control's projector, where the reading is a control.

    Args:
        model: The model; has its own projector again afterwards.
        reading: What is read.
        controls: What `control_projectors` gave.
    """
    own = model.projector
    if reading.kind in controls:
        model.projector = controls[reading.kind]  # type: ignore[assignment]
    try:
        yield
    finally:
        model.projector = own


def _chosen_rows(
    texts: Sequence[Segments],
    reading: Reading,
    tokenizer: RefragTokenizer,
    questions: Sequence[str],
) -> list[np.ndarray]:
    """For each text the rows that stand as tokens, its documents' rows one behind the other."""
    unique = list(dict.fromkeys(d for text in texts for d in documents_of(text)))
    rows_of = {
        document: [document[start:end] for start, end in pairwise(packed.bounds)]
        for document, packed in zip(unique, tokenizer.pack(unique), strict=True)
    }
    chosen = []
    for text, question in zip(texts, questions, strict=True):
        rows = [row for document in documents_of(text) for row in rows_of[document]]
        number = num_expanded(len(rows), reading.share or 0.0)
        if reading.kind == "bm25":
            chosen.append(best_rows(rows, question, number))
        else:
            # The same for a question whatever it stands beside, and whoever reads it.
            rng = np.random.default_rng(zlib.crc32(question.encode()))
            chosen.append(np.sort(rng.permutation(len(rows))[:number]))
    return chosen


def _without_documents(text: Segments) -> list[Segment]:
    """A text without its documents, headers and footers; what stood around them is one text."""
    segments: list[Segment] = []
    for segment in text:
        if segment.kind in ("header", "document", "footer"):
            continue
        last = segments[-1] if segments else None
        # Tokenized as one, as in a training without documents.
        if last is not None and segment.kind == last.kind == "text" and last.train == segment.train:
            segments[-1] = replace(last, text=last.text + segment.text)
        elif last is None and segment.train and segment is not text[0]:
            # The same targets with and without documents before them.
            segments.append(replace(segment, after="text"))
        else:
            segments.append(segment)
    return segments


def _with_documents(
    text: Segments, documents: Sequence[str], after: After | None = None
) -> list[Segment]:
    """A text with its documents' texts replaced, headers and footers as they were."""
    left = iter(documents)
    segments = []
    for segment in text:
        if segment.document is not None:
            new = next(left)
            segment = replace(
                segment,
                text=new,
                document=replace(segment.document, text=new),
                after=after or segment.after,
            )
        segments.append(segment)
    return segments


def _as_many(documents: Sequence[str], number: int) -> list[str]:
    if number and not documents:
        raise ValueError("the reading 'other' needs another question that has documents")
    return [documents[place % len(documents)] for place in range(number)]


def _cut_documents(
    texts: Sequence[Segments], reading: Reading, tokenizer: RefragTokenizer
) -> dict[str, str]:
    """Each document cut to as many decoder tokens as its rows take positions.

    A model without an encoder has no rows; its documents keep one of `rate` tokens.
    """
    documents = list(dict.fromkeys(d for text in texts for d in documents_of(text)))
    decoder = tokenizer.plain_decoder
    if tokenizer.encoder is None:
        assert reading.rate is not None
        room = [-(-len(tokens.ids) // reading.rate) for tokens in decoder(documents)]
    else:
        packed = tokenizer.pack(documents)
        slots = tokenizer.assembler.slots_of_rows
        room = [int(slots(document.row_sizes).sum()) for document in packed]
    return {
        document: decoder.cut(document, num_tokens, from_end=reading.kind == "last")
        for document, num_tokens in zip(documents, room, strict=True)
    }
