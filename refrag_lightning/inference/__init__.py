"""Using a trained folder: documents and a question in, a streamed answer with its sources out.

`RefragPipeline` is the way in; `BatchingQueue` puts requests that come together into one batch.
Names are imported when they are used, so that commands which only look start fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refrag_lightning.inference.citations import Citation
    from refrag_lightning.inference.pipeline import RefragPipeline
    from refrag_lightning.inference.queue import BatchingQueue
    from refrag_lightning.inference.request import Request, Sampling
    from refrag_lightning.inference.stream import Answer, AnswerStream
    from refrag_lightning.inference.trace import Trace

_MODULES = {
    "Answer": "stream",
    "AnswerStream": "stream",
    "BatchingQueue": "queue",
    "Citation": "citations",
    "RefragPipeline": "pipeline",
    "Request": "request",
    "Sampling": "request",
    "Trace": "trace",
}
__all__ = [
    "Answer",
    "AnswerStream",
    "BatchingQueue",
    "Citation",
    "RefragPipeline",
    "Request",
    "Sampling",
    "Trace",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
