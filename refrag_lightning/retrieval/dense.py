"""Texts as single vectors for dense search: the model's own encoder, or another embedding model.

The model's encoder serves as sentence-transformers uses MiniLM: the mean over the states of all
tokens, special ones included, at unit length (Reimers and Gurevych 2019). Where sentence-
transformers cuts a text that is too long for the encoder, here all of it counts: it is read in
windows, and the mean is over the tokens of all of them.

Shape suffixes: N texts, P windows, T tokens of a window, E encoder hidden.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from refrag_lightning import hub
from refrag_lightning.retrieval.keys import text_key

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from refrag_lightning.model.plain import PlainModel
    from refrag_lightning.model.refrag import RefragModel
    from refrag_lightning.retrieval.store import PassageStore
    from refrag_lightning.text.tokenizer import RefragTokenizer

_BATCH_TOKENS = 16_384  # of an encoder call, padding counted
_INSTALL = "pip install 'refrag-lightning[dense]'"


class Embedder(Protocol):
    """Turns texts into vectors."""

    name: str

    def key(self) -> str:
        """What the vectors depend on, in 16 hex digits; vectors of one key can be compared."""
        ...

    def __call__(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        """The texts' vectors.

        Args:
            texts: N texts.
            query: Whether they are what is asked rather than what is searched; some models read
                the two differently.

        Returns:
            (N, E) float32, each of length 1.
        """
        ...


class EncoderEmbedder:
    """The mean over an encoder's token states.

    Args:
        encoder: The encoder, which gives `last_hidden_state`.
        tokenizer: Its tokenizer.
        name: What to call it in messages.
        identity: What its vectors depend on beside the tokenizer and the settings here: its name
            and revision, or a digest of its weights.
        max_length: Most tokens of a window, special tokens counted.
        prompts: Put before a text, by `query` and `document`; none by default.

    Raises:
        ValueError: `max_length` leaves no room beside the special tokens.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        identity: Any,
        max_length: int,
        prompts: dict[str, str] | None = None,
    ) -> None:
        from refrag_lightning.text.limits import special_tokens
        from refrag_lightning.text.plain import PlainTokenizer

        self.encoder = encoder
        self.name = name
        self.prompts = prompts or {}
        self._plain = PlainTokenizer(tokenizer, leading_space=True)
        prefix, suffix = special_tokens(tokenizer)
        self._prefix, self._suffix = np.array(prefix, np.int64), np.array(suffix, np.int64)
        self._max_tokens = max_length - len(prefix) - len(suffix)
        if self._max_tokens < 1:
            raise ValueError(
                f"max_length ({max_length}) leaves no token of a text beside the "
                f"{len(prefix) + len(suffix)} special ones"
            )
        self._pad_id = tokenizer.pad_token_id or 0
        settings = ["mean", identity, max_length, self.prompts, self._plain.fingerprint]
        self._key = _short_digest([*settings, [*prefix], [*suffix]])

    def key(self) -> str:
        """See `Embedder`."""
        return self._key

    def __call__(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        """See `Embedder`.

        Raises:
            ValueError: The encoder gives values that are no numbers.
        """
        prompt = self.prompts.get("query" if query else "document", "")
        windows, owner_P = self._windows([prompt + text for text in texts])
        lengths_P = np.array([len(window) for window in windows])
        sums_NE = np.zeros((len(texts), self._size()), dtype=np.float64)
        for places in _batches(lengths_P):
            sums_PE = self._sums([windows[place] for place in places], lengths_P[places])
            np.add.at(sums_NE, owner_P[places], sums_PE)
        # The length of a sum is that of the mean times a number, and goes away with it.
        norms_N = np.linalg.norm(sums_NE, axis=1, keepdims=True)
        vectors_NE = (sums_NE / np.where(norms_N > 0, norms_N, 1)).astype(np.float32)
        if not np.isfinite(vectors_NE).all():
            raise ValueError(f"the encoder of {self.name} gives values that are no numbers")
        return vectors_NE

    def _windows(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Token ids of windows as equal in length as can be, and which text each is of."""
        windows, owners = [], []
        for owner, encoded in enumerate(self._plain(texts)):
            for part in np.array_split(
                encoded.ids, max(1, math.ceil(len(encoded.ids) / self._max_tokens))
            ):
                windows.append(np.concatenate([self._prefix, part, self._suffix]))
                owners.append(owner)
        return windows, np.array(owners, dtype=np.int64)

    def _sums(self, windows: list[np.ndarray], lengths_P: np.ndarray) -> np.ndarray:
        """Sums of the states of each window's tokens, (P, E)."""
        import torch

        from refrag_lightning.model.encoder import run_encoder

        mask_PT = np.arange(lengths_P.max()) < lengths_P[:, None]
        ids_PT = np.full(mask_PT.shape, self._pad_id, dtype=np.int64)
        ids_PT[mask_PT] = np.concatenate(windows)
        device = next(self.encoder.parameters()).device
        mask = torch.from_numpy(mask_PT).to(device)
        with torch.inference_mode():
            states_PTE = run_encoder(
                self.encoder,  # type: ignore[arg-type]
                torch.from_numpy(ids_PT).to(device),
                mask.long(),
                max_tokens=2048,
            )
            sums_PE = torch.where(mask[..., None], states_PTE.float(), 0.0).sum(dim=1)
        return sums_PE.cpu().numpy()

    def _size(self) -> int:
        return int(self.encoder.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]


class SentenceTransformersEmbedder:
    """An embedding model in sentence-transformers, with its own pooling and prompts.

    A text longer than the model reads is cut, as that library does.

    Args:
        name: Hub name or folder.
        device: Where to run.

    Raises:
        ImportError: sentence-transformers is not installed.
        OSError: There is no such model.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            from sentence_transformers import SentenceTransformer, __version__
        except ImportError as error:
            raise ImportError(
                f"the embedder {name!r} needs sentence-transformers: {_INSTALL}"
            ) from error
        if int(__version__.partition(".")[0]) < 6:
            raise ImportError(
                f"sentence-transformers {__version__} runs Python code from a model's folder "
                "without asking; install version 6 or later"
            )
        from refrag_lightning.model.files import check_finite, check_shards

        source = hub.resolve(name)
        from_hub = source.kind == "hub"
        self.name = name
        check_shards(Path(source.path))
        with hub.refuse_code(name):
            self._model = SentenceTransformer(
                name if from_hub else source.path,
                revision=source.revision if from_hub else None,
                device=device,
                trust_remote_code=False,
                # The model's sentence_bert_config.json could ask for pickled weights otherwise.
                model_kwargs={"use_safetensors": True, "weights_only": True},
            )
        check_finite(self._model.named_parameters(), what=name)
        length = getattr(self._model, "max_seq_length", None)
        self._key = _short_digest(["sentence-transformers", name, source.revision, length])

    def key(self) -> str:
        """See `Embedder`."""
        return self._key

    def __call__(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        """See `Embedder`."""
        # The two that read queries and documents differently are there from version 5 on.
        side = "encode_query" if query else "encode_document"
        encode: Callable[..., Any] = getattr(self._model, side, self._model.encode)
        vectors = encode(
            list(texts),
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float32)


def embedder(
    name: str | None,
    model: RefragModel | PlainModel | None = None,
    tokenizer: RefragTokenizer | None = None,
    *,
    device: str = "cpu",
) -> Embedder:
    """The embedder of a name, or of a model's own encoder.

    Args:
        name: Hub name or folder of an embedding model; None for the encoder of `model`.
            Without sentence-transformers, those that pool by the mean can be used.
        model: The model, where there is no name.
        tokenizer: Its tokenizer.
        device: Where a named model runs; the encoder stays where it is.

    Raises:
        ValueError: No name and no encoder, or a kind of model that needs sentence-transformers.
        OSError: There is no such model.
    """
    if name is None:
        return _own_encoder(model, tokenizer)
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        return _mean_pooled(name, device)
    return SentenceTransformersEmbedder(name, device)


def embed_missing(
    store: PassageStore,
    embedder: Embedder,
    *,
    batch_size: int = 1024,
    on_batch: Callable[[int], None] | None = None,
) -> int:
    """Gives a store the vectors that it lacks; they are of titles and texts together.

    Texts of like length go together. Each batch is written before the next is read, so what was
    done stays done if this is killed.

    Args:
        store: The store.
        embedder: Gives the vectors.
        batch_size: Texts a write.
        on_batch: Told after each write how many texts it had.

    Returns:
        How many texts got a vector.
    """
    key = embedder.key()
    texts = sorted(store.missing_vectors(key), key=len)
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        keys = [text_key(text) for text in batch]
        store.add_vectors(key, keys, embedder(batch), name=embedder.name)
        if on_batch is not None:
            on_batch(len(batch))
    return len(texts)


def _own_encoder(
    model: RefragModel | PlainModel | None, tokenizer: RefragTokenizer | None
) -> EncoderEmbedder:
    encoder = getattr(model, "encoder", None)
    if model is None or tokenizer is None or encoder is None or tokenizer.encoder is None:
        raise ValueError(
            "dense search needs a model with an encoder, or the name of an embedding model"
        )
    from refrag_lightning.retrieval.states import encoder_settings, weights_digest

    assert tokenizer.max_encoder_length is not None
    return EncoderEmbedder(
        encoder,
        tokenizer.encoder,
        name=model.config.encoder_name or "the model's encoder",
        # What was loaded counts, not what the configuration calls it: a folder may move.
        identity=[weights_digest(encoder), encoder_settings(encoder)],
        max_length=tokenizer.max_encoder_length,
    )


def _mean_pooled(name: str, device: str) -> EncoderEmbedder:
    """A sentence-transformers folder that pools by the mean, without that library."""
    from refrag_lightning.model.base import load_base
    from refrag_lightning.retrieval.states import encoder_settings
    from refrag_lightning.text.limits import num_positions

    source = hub.resolve(name)
    _check_modules(source)
    encoder, _ = load_base("encoder", name, revision=source.revision)
    tokenizer = hub.load("AutoTokenizer", source.path)
    lengths = [tokenizer.model_max_length]
    if (positions := num_positions(encoder)) is not None:
        lengths.append(positions)
    settings = _read_json(source, "sentence_bert_config.json") or {}
    if settings.get("max_seq_length"):
        lengths.append(settings["max_seq_length"])
    prompts = (_read_json(source, "config_sentence_transformers.json") or {}).get("prompts") or {}
    sides = {"query": prompts.get("query")}
    # The three names that sentence-transformers takes for what is searched.
    sides["document"] = next(
        (prompts[side] for side in ("document", "passage", "corpus") if prompts.get(side)), None
    )
    return EncoderEmbedder(
        encoder.to(device),  # type: ignore[arg-type]
        tokenizer,
        name=name,
        identity=[name, source.revision, encoder_settings(encoder)],
        max_length=min(lengths),
        prompts={side: prompt for side, prompt in sides.items() if prompt},
    )


def _check_modules(source: hub.ModelSource) -> None:
    """Refuses what is more than an encoder, the mean and unit length.

    Without a list of modules it is the mean, as sentence-transformers itself takes it.
    """
    for module in _read_json(source, "modules.json") or []:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            pooling = _read_json(source, f"{module['path']}/config.json")
            if pooling is not None and not _is_mean(pooling):
                raise ValueError(f"{source.name!r} does not pool by the mean: {_INSTALL}")
        elif kind not in ("Transformer", "Normalize"):
            raise ValueError(f"{source.name!r} has a module {kind!r} that needs more: {_INSTALL}")


def _is_mean(pooling: dict[str, Any]) -> bool:
    if "pooling_mode" in pooling:
        return bool(pooling["pooling_mode"] == "mean")
    modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    return modes == ["pooling_mode_mean_tokens"]


def _read_json(source: hub.ModelSource, path: str) -> Any:
    """A file of a model, None if it has none; files in sub-folders are asked of the Hub."""
    file = Path(source.path) / path
    if not file.is_file() and source.kind == "hub" and "/" in path:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(source.name, path, revision=source.revision))
        except Exception as error:  # httpx, httpx2 or requests, by huggingface_hub's version
            raise OSError(f"{path} of {source.name!r} cannot be had: {error}") from error
    return json.loads(file.read_text()) if file.is_file() else None


def _batches(lengths_P: np.ndarray) -> list[np.ndarray]:
    """Places of windows of like length, the longest first, with few tokens of padding a batch."""
    order = np.argsort(-lengths_P, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, _BATCH_TOKENS // int(lengths_P[order[start]] or 1))
        batches.append(order[start : start + size])
        start += size
    return batches


def _short_digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
