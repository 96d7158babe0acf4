"""AlignmentDataModule: text sources to aligned batches, cached between runs."""

import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset

from refrag_lightning.cache import build_folder, cache_dir
from refrag_lightning.data.alignment_batch import (
    COLUMNS,
    Aligner,
    AlignmentBatch,
    Example,
    NoSpansError,
)
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.data.sources import PydocSource, Split, TextSource
from refrag_lightning.data.stream import IterableStream, MappedStream, ShuffledStream, Stream
from refrag_lightning.text import sentences
from refrag_lightning.text.tokenizer import RefragTokenizer

# Part of the cache's key: raise it when the same text and settings give other examples.
_CACHE_VERSION = 1
_FILE = "examples.arrow"
_SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])


class AlignmentDataModule(ResumableDataModule):
    """Aligned pieces of text for `AlignmentModule`.

    Args:
        source: Where the text comes from; the Python reference by default. See `data.sources`.
        val_source: Validation text; what `source` holds out if None.
        test_source: Text of the report; what `source` holds out for it if None.
        spans: Whether the student reads a vector for each encoder token or for each row.
        max_tokens: Most encoder tokens of a piece of text.
        eval_pieces: Most pieces for validation, and for test.
        streaming: Tokenize the training text while training, instead of once into the cache.
        shuffle_block: With `streaming`, pieces that are shuffled together.
        batch_size: Pieces a batch and device.
        eval_batch_size: Pieces a batch in validation and test; None takes `batch_size`.
        num_workers: Processes that prepare batches; 0 prepares them in the main process.
        shuffle: Shuffle the training pieces anew in each epoch.
        drop_last: Leave out the incomplete batch at the end of an epoch.
        seed: Seed of the order.
        batches_per_epoch: With `streaming`, batches that make an epoch.
        pin_memory: Copy batches to pinned memory, for a faster way to a GPU.
        tokenizer: The model's tokenizer; taken from the trainer's module if None.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        val_source: TextSource | None = None,
        test_source: TextSource | None = None,
        spans: Literal["token", "row"] = "token",
        max_tokens: int = 126,
        eval_pieces: int = 64,
        streaming: bool = False,
        shuffle_block: int = 1000,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        batches_per_epoch: int | None = None,
        pin_memory: bool = False,
        tokenizer: RefragTokenizer | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens ({max_tokens}) must be at least 1")
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            batches_per_epoch=batches_per_epoch,
            pin_memory=pin_memory,
        )
        self.sources: dict[Split, TextSource] = {"train": source or PydocSource()}
        if val_source is not None:
            self.sources["val"] = val_source
        if test_source is not None:
            self.sources["test"] = test_source
        self.spans: Literal["token", "row"] = spans
        self.max_tokens = max_tokens
        self.eval_pieces = eval_pieces
        self.streaming = streaming
        self.shuffle_block = shuffle_block
        self._tokenizer = tokenizer
        self._aligner: Aligner | None = None

    @property
    def aligner(self) -> Aligner:
        """Cuts, aligns and collates, with the tokenizer of the trainer's module."""
        if self._aligner is None:
            tokenizer = self._tokenizer
            if tokenizer is None:
                assert self.trainer is not None
                tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[assignment]
            assert isinstance(tokenizer, RefragTokenizer)
            self._aligner = Aligner(tokenizer, spans=self.spans, max_tokens=self.max_tokens)
        return self._aligner

    def prepare_data(self) -> None:
        """Tokenizes and aligns what is not in the cache yet; once on each node."""
        function = self.trainer.state.fn if self.trainer is not None else None
        stage = "fit" if function is None else function.value
        if stage == "fit" and not self.streaming:
            self.examples("train")
        if stage in ("fit", "validate"):
            self.examples("val")
        if stage == "test":
            self.examples("test")

    def examples(self, split: Split) -> datasets.Dataset:
        """The aligned pieces of a split, from the cache, which is filled where it is empty.

        Raises:
            NoSpansError: If no piece has a span.
        """
        folder = cache_dir() / "data" / f"alignment-{self._cache_key(split)}"
        build_folder(folder, lambda part: self._write(split, part / _FILE))
        # Arrow files are mapped into memory, so a corpus may be larger than it.
        dataset = datasets.Dataset.from_file(str(folder / _FILE))
        return dataset.with_format("numpy", dtype="int64")

    def training_data(self) -> Dataset | Stream:
        """The training pieces: from the cache, or tokenized while reading."""
        if not self.streaming:
            return self.examples("train")  # type: ignore[return-value]
        if self.num_workers:
            # The workers tokenize; forked after threads were used, they would warn and use one.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        source, part = self._source("train")
        stream: Stream = IterableStream(lambda: source.texts(part))
        stream = MappedStream(stream, self.aligner.examples)
        return ShuffledStream(stream, block_size=self.shuffle_block, seed=self.seed)

    def data_key(self) -> Any:
        """The settings and how the data begin; no file's place or time, which a retry changes."""
        begins: Any = ""
        if self.streaming:
            source, part = self._source("train")
            begins = next(iter(source.texts(part)), "")
        else:
            first = self.examples("train")[0]
            begins = [first[name].tolist() for name in COLUMNS]
        digest = hashlib.sha256(json.dumps(begins).encode()).hexdigest()[:20]
        block = self.shuffle_block if self.streaming else None
        return [self.spans, self.max_tokens, block, digest]

    def collate(self, samples: list[Example]) -> AlignmentBatch:
        """See `Aligner.collate`."""
        return self.aligner.collate(samples)

    def val_dataloader(self) -> DataLoader:
        """Held-out pieces."""
        return self.eval_dataloader(self.examples("val"))  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader:
        """Held-out pieces that validation does not see."""
        return self.eval_dataloader(self.examples("test"))  # type: ignore[arg-type]

    def _source(self, split: Split) -> tuple[TextSource, Split]:
        """Where a split's text comes from, and which part of it: a source of its own is whole."""
        if split in self.sources:
            return self.sources[split], "train"
        return self.sources["train"], split

    def _write(self, split: Split, path: Path) -> None:
        source, part = self._source(split)
        limit = None if split == "train" else self.eval_pieces
        texts = 0
        rows = 0
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
            for text in source.texts(part):
                texts += 1
                left = None if limit is None else limit - rows
                if left == 0:
                    break
                examples = list(islice(self.aligner.examples(text), left))
                columns = [
                    pa.array([e[n] for e in examples], pa.list_(pa.int32())) for n in COLUMNS
                ]
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
                rows += len(examples)
        if not rows:
            where = json.dumps(source.key())
            raise NoSpansError(
                f"not one span of the {texts} {split} texts of {where} is common to both tokenizers"
                if texts
                else f"{where} has no text for {split}: give it a {split}_source or held_out"
            )

    def _cache_key(self, split: Split) -> str:
        tokenizer = self.aligner.tokenizer
        source, part = self._source(split)
        parts: dict[str, Any] = {
            "version": _CACHE_VERSION,
            "source": source.key(),
            "split": part,
            "limit": None if split == "train" else self.eval_pieces,
            "spans": self.spans,
            "max_tokens": self.max_tokens,
            "tokenizers": [
                tokenizer.plain_encoder.fingerprint,
                tokenizer.plain_decoder.fingerprint,
            ],
        }
        if self.spans == "row":
            parts["rows"] = [tokenizer.compression, tokenizer.chunk_by, tokenizer.max_sentence]
            if tokenizer.chunk_by == "sentence":
                parts["sentences"] = sentences.VERSION
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]
