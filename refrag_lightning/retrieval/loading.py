"""The part of a model that an index is made with: its encoder, at some of its rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refrag_lightning.model.refrag import RefragModel
    from refrag_lightning.retrieval.dense import Embedder
    from refrag_lightning.text.tokenizer import RefragTokenizer

NO_EMBEDDER = "none"


@dataclass(frozen=True)
class IndexModels:
    """What computes states and vectors.

    Attributes:
        model: The model, or None for an index without row states.
        tokenizers: Its tokenizer at each rate.
        embedder: What gives vectors for dense search, or None.
    """

    model: RefragModel | None
    tokenizers: Sequence[RefragTokenizer]
    embedder: Embedder | None


def load_models(
    model: str | None,
    *,
    rates: Sequence[int] | None = None,
    embedder: str | None = None,
    device: str = "cpu",
    allow_base_mismatch: bool = False,
) -> IndexModels:
    """Loads a model's encoder and an embedder; the decoder stays on the CPU.

    Args:
        model: A model folder or run folder, or None.
        rates: Compressions; the model's own if None.
        embedder: The name of an embedding model, `none`, or None for the model's encoder.
        device: Where to compute.
        allow_base_mismatch: Warn about an encoder other than the model's instead of refusing it.

    Raises:
        ValueError: The model has no encoder, or does not run at a rate.
        OSError: A model is not found.
    """
    encoding: RefragModel | None = None
    tokenizers = []
    if model is not None:
        from refrag_lightning.model.load import load
        from refrag_lightning.model.plain import PlainModel

        loaded, tokenizer = load(model, allow_base_mismatch=allow_base_mismatch)
        if isinstance(loaded, PlainModel):
            raise ValueError(
                f"{model!r} has no encoder, so it gives no row states; leave the model out for an "
                "index that is only searched"
            )
        tokenizers = [tokenizer.at(rate) for rate in rates or [tokenizer.compression]]
        loaded.encoder.to(device)
        loaded.pool.to(device)
        encoding = loaded
    elif rates:
        raise ValueError(f"rates ({list(rates)}) need a model, for row states")
    found = None
    if embedder != NO_EMBEDDER and (encoding is not None or embedder is not None):
        from refrag_lightning.retrieval.dense import embedder as embedder_of

        first = tokenizers[0] if tokenizers else None
        found = embedder_of(embedder, encoding, first, device=device)
    return IndexModels(encoding, tokenizers, found)
