"""PretrainModule: teaches the decoder to read rows, by reconstruction and continuation.

REFRAG (arXiv 2509.01092) first trains encoder and projector to have the frozen decoder write a
context again from its rows (`reconstruct`), over a curriculum that moves from few rows to many,
and then trains everything to continue a text from the rows of its beginning (`continue`). Which
task comes how often is the data's matter; here is what trains: for reconstruction
`train: [projector, encoder]`, for continuation the decoder beside them, with or without `lora`.
"""

from typing import ClassVar

from refrag_lightning.training.language import LanguageModule


class PretrainModule(LanguageModule):
    """Trains encoder and projector, and the decoder where asked to, on text read as rows."""

    usually_trains: ClassVar[tuple[str, ...]] = ("projector", "encoder")
