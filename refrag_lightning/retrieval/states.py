"""Row states of passages before the projector, and the key of everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from refrag_lightning.retrieval.keys import state_key, text_key
from refrag_lightning.retrieval.stored_rows import StoredRows
from refrag_lightning.text import sentences
from refrag_lightning.text.assemble import DocumentPiece
from refrag_lightning.text.batch import TextTrace

__all__ = [
    "StoredRows",
    "encode_documents",
    "encode_passages",
    "encoder_settings",
    "state_key",
    "state_settings",
    "text_key",
    "weights_digest",
]

# Of a configuration: names, versions and precision, labels, what is given out, initial values.
_OTHER_SETTINGS = frozenset(
    {
        "architectures",
        "dtype",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refrag_lightning.model.refrag import RefragModel
    from refrag_lightning.text.packing import PackedDocument
    from refrag_lightning.text.tokenizer import RefragTokenizer


def state_settings(model: RefragModel, tokenizer: RefragTokenizer) -> dict[str, Any]:
    """Everything that the states of a passage's rows depend on, beside the passage's text.

    Of the encoder that is its configuration and its weights' digest, rounded to bfloat16: what was
    loaded counts, and not what it is called, while an encoder in float32 and the same one in
    bfloat16 share their states, which differ by rounding alone. Training moves many weights by
    more.

    Args:
        model: The model.
        tokenizer: Its tokenizer, at the rate that is asked about.

    Returns:
        Plain data, to be written as JSON.
    """
    config = model.config
    assembler = tokenizer.assembler
    settings: dict[str, Any] = {
        "encoder": config.encoder_name,
        "encoder_revision": config.encoder_revision,
        "encoder_type": config.encoder_config.model_type,
        "encoder_config": encoder_settings(model.encoder),
        "encoder_weights": weights_digest(model.encoder),
        "tokenizer": tokenizer.plain_encoder.fingerprint,
        "special_tokens": [list(assembler.encoder_prefix), list(assembler.encoder_suffix)],
        "pooling": config.pooling,
        "compression": tokenizer.compression,
        "chunk_by": tokenizer.chunk_by,
        "context": tokenizer.context,
        "max_encoder_length": tokenizer.max_encoder_length,
        "num_slots": tokenizer.num_slots,
        "row_size": config.row_size,
    }
    if tokenizer.chunk_by == "sentence":
        settings["max_sentence"] = tokenizer.max_sentence
        settings["sentences"] = sentences.VERSION
    if tokenizer.chunk_by == "decoder":
        settings["decoder_tokenizer"] = tokenizer.plain_decoder.fingerprint
    if "encoder" in config.adapters:
        settings["encoder_lora"] = config.adapters["encoder"]
    if any(True for _ in model.pool.parameters()):
        settings["pooling_weights"] = weights_digest(model.pool)
    return settings


def encoder_settings(encoder: PreTrainedModel) -> dict[str, Any]:
    """What an encoder's states depend on, beside what it reads and its weights.

    What differs from its family's defaults, without what a model is called and what only training
    reads.
    """
    settings = {
        name: value
        for name, value in encoder.config.to_diff_dict().items()
        if name not in _OTHER_SETTINGS and "dropout" not in name and not name.startswith("_")
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


@torch.no_grad()
def encode_documents(
    model: RefragModel, tokenizer: RefragTokenizer, texts: Sequence[str]
) -> tuple[list[PackedDocument], Tensor, list[np.ndarray]]:
    """Encodes texts in one encoder call.

    Args:
        model: The model.
        tokenizer: Its tokenizer, at the rate that is wanted.
        texts: The texts.

    Returns:
        Each text as `tokenizer.pack` cuts it, the states of all rows (C, m, E_row) on the encoder's
        device, and for each text which of the C rows are its own, in order.
    """
    documents = tokenizer.pack(texts)
    none = np.zeros(0, dtype=np.int64)
    pieces = [
        DocumentPiece(
            index=number,
            id="",
            expanded=np.zeros(document.num_rows, dtype=bool),
            decoder_ids=none,
            decoder_rows=none,
        )
        for number, document in enumerate(documents)
    ]
    # Texts of one document each, without anything for the decoder around it.
    batch = tokenizer.assembler([[piece] for piece in pieces], documents, padding_side="right")
    states = model.encode(batch.to(next(model.encoder.parameters()).device))
    rows = []
    for trace in batch.trace:
        assert isinstance(trace, TextTrace)
        rows.append(trace.rows)
    return documents, states, rows


def encode_passages(
    model: RefragModel, tokenizer: RefragTokenizer, texts: Sequence[str]
) -> list[StoredRows]:
    """Computes the rows of texts in one encoder call, as they are stored.

    Args:
        model: The model.
        tokenizer: Its tokenizer, at the rate that is wanted.
        texts: The passages.

    Returns:
        The rows of each text, in the order of `tokenizer.pack`.

    Raises:
        ValueError: If a state is not finite, or too large for float16.
    """
    documents, states, rows = encode_documents(model, tokenizer, texts)
    stored = states.to(torch.float16).cpu().numpy()
    finite = np.isfinite(stored).all(axis=(1, 2))
    encoded = []
    for text, document, own in zip(texts, documents, rows, strict=True):
        if not finite[own].all():
            raise ValueError(
                f"a row of the passage that starts with {text[:40]!r} has a state that is not "
                "finite in float16, in which states are stored"
            )
        encoded.append(
            StoredRows(
                states=stored[own],
                ends=document.bounds[1:].astype(np.int32),
                sizes=document.row_sizes.astype(np.int32),
                lost=document.lost.astype(np.int32),
            )
        )
    return encoded


def weights_digest(module: torch.nn.Module) -> str:
    """Hex SHA-256 of a module's parameters and buffers: names, shapes and values in bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        value = tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
