"""CorpusDataModule: what the data modules share that cut their examples out of a corpus."""

from __future__ import annotations

import json
from typing import Any

from refrag_lightning.data.corpus import Corpus, Unit, open_corpus
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.data.sources import PydocSource, Split, TextSource
from refrag_lightning.text.tokenizer import RefragTokenizer

_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
}


class CorpusDataModule(ResumableDataModule):
    """Base of the data modules over a corpus.

    Args:
        source: Where the text comes from; the Python reference by default.
        val_source: Validation text; what `source` holds out if None.
        test_source: Text of the report; what `source` holds out for it if None.
        tokenizer: The model's tokenizer; taken from the trainer's module if None.
        **options: See `ResumableDataModule`.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        val_source: TextSource | None = None,
        test_source: TextSource | None = None,
        tokenizer: RefragTokenizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.sources: dict[Split, TextSource] = {"train": source or PydocSource()}
        if val_source is not None:
            self.sources["val"] = val_source
        if test_source is not None:
            self.sources["test"] = test_source
        self._tokenizer = tokenizer
        self._corpora: dict[Split, Corpus] = {}

    @property
    def tokenizer(self) -> RefragTokenizer:
        """The model's tokenizer."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            assert self.trainer is not None
            tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[assignment]
        assert isinstance(tokenizer, RefragTokenizer)
        return tokenizer

    @property
    def unit(self) -> Unit:
        """Whose tokens `compression` counts; sentences are counted by the encoder's."""
        tokenizer = self.tokenizer
        by_decoder = tokenizer.chunk_by == "decoder" or tokenizer.encoder is None
        return "decoder" if by_decoder else "encoder"

    @property
    def needs_teacher(self) -> bool:
        """Whether the trainer's module also reads each text with its documents as tokens."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return bool(getattr(module, "needs_teacher", False))

    def prepare_data(self) -> None:
        """Tokenizes what is not in the cache yet; once on each node."""
        function = self.trainer.state.fn if self.trainer is not None else None
        for split in _SPLITS.get("fit" if function is None else function.value, ()):
            self.corpus(split)

    def data_key(self) -> Any:
        """How many texts and tokens there are; no file's place or time, which a retry changes."""
        totals = self.corpus("train").totals(self.unit)
        return [len(totals), int(totals.sum())]

    def corpus(self, split: Split) -> Corpus:
        """The texts of a split.

        Raises:
            ValueError: If it has none, or none that is long enough.
        """
        if split not in self._corpora:
            # A source of its own is whole.
            own = split in self.sources
            source, part = self.sources[split if own else "train"], "train" if own else split
            corpus = open_corpus(source, part, self.tokenizer)
            try:
                self.check(split, corpus)
            except ValueError as error:
                raise ValueError(f"{split}, {json.dumps(source.key())}: {error}") from error
            self._corpora[split] = corpus
        return self._corpora[split]

    def check(self, split: Split, corpus: Corpus) -> None:
        """Raises a ValueError where a split's texts are too short for what is asked of them."""
        raise NotImplementedError
