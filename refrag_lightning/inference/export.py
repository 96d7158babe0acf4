"""Exporting a model: a folder for others, with a model card, on disk or on the Hub.

What a training run wrote is copied, made whole (`full`), freed of its adapter (`merge_lora`), or
cut down to its decoder (`decoder_only`). The folder appears in one step and replaces only what an
export wrote: it is marked by `refrag_export.json`, which also keeps the model's history for the
card of an export that is made from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refrag_lightning.cache import beside, cache_dir
from refrag_lightning.inference.mark import (
    CARD,
    FILES,
    FOLDERS,
    TERMS,
    belongs,
    changed_by_hand,
    check_place,
    read_mark,
    replaced,
    write_mark,
)
from refrag_lightning.plain_text import say

if TYPE_CHECKING:
    from refrag_lightning.inference.history import History

SHARD = "5GB"


@dataclass(frozen=True)
class ExportOptions:
    """What becomes of the weights; see `export`."""

    full: bool = False
    merge_lora: bool = False
    decoder_only: bool = False
    dtype: str | None = None
    max_shard_size: str = SHARD
    allow_base_mismatch: bool = False

    def __post_init__(self) -> None:
        if self.decoder_only and self.full:
            raise ValueError("full and decoder_only exclude each other: a decoder alone is whole")

    def rewrites(self, *, is_refrag: bool) -> bool:
        """Whether the weights of such a model have to be loaded and written anew.

        A causal language model alone is whole, and its adapter was merged when it was written.
        """
        changed = is_refrag and (self.full or self.merge_lora or self.decoder_only)
        return changed or self.dtype is not None or self.max_shard_size != SHARD


def export(
    model: str,
    out: str | None = None,
    full: bool = False,
    merge_lora: bool = False,
    decoder_only: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    license: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = SHARD,
    allow_base_mismatch: bool = False,
) -> None:
    """Writes a model as a folder for others, with a model card, and sends it to the Hub.

    Args:
        model: A model folder, or a run folder that has one.
        out: Folder to write; may exist only where an export wrote it.
        full: Write every weight, so that no base models are needed.
        merge_lora: Put the LoRA into the decoder's weights, and write those.
        decoder_only: Write the decoder alone, LoRA merged, as an ordinary Hugging Face folder.
        push_to_hub: Repository of the Hugging Face Hub to send it to, OWNER/NAME.
        private: Whether a new repository is private.
        license: The model's licence for the card, such as apache-2.0.
        dtype: Of the weights, such as bfloat16. None leaves a mere copy as it is, and writes
            float32 where weights are made whole or merged.
        max_shard_size: Largest size of one file of weights.
        allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that the
            folder was trained on.
    """
    from refrag_lightning.inference.push import check_name, push

    if out is None and push_to_hub is None:
        raise ValueError(
            "nowhere to export to: give --out FOLDER, --push_to_hub OWNER/NAME, or both"
        )
    if push_to_hub is not None:
        check_name(push_to_hub)
    options = ExportOptions(
        full, merge_lora, decoder_only, dtype, max_shard_size, allow_base_mismatch
    )
    with _place(out) as folder:
        notes = export_folder(model, folder, options=options, name=push_to_hub, license=license)
        for note in notes:
            say(note)
        if out is not None:
            say(f"folder  {folder}")
        if push_to_hub is not None:
            address = push(folder, push_to_hub, private=private)
            say(f"sent to {address}")


def export_folder(
    model: str,
    out: Path,
    *,
    options: ExportOptions | None = None,
    name: str | None = None,
    license: str | None = None,
) -> list[str]:
    """Writes a model as a folder with its model card, in one step.

    Args:
        model: As in `export`.
        out: The folder to write.
        options: What becomes of the weights; a copy if None.
        name: The model's name in the card; the folder's if None.
        license: As in `export`.

    Returns:
        What whoever gets the folder has to know, each a sentence.

    Raises:
        OSError: If there is no such model, or `out` holds what no export wrote.
        ValueError: If an option does not fit the model.
    """
    from refrag_lightning.inference.card import CardFacts, model_card
    from refrag_lightning.model.base import as_dtype
    from refrag_lightning.model.files import replace_folder

    options = options or ExportOptions()
    as_dtype(options.dtype)
    check_place(out)
    source = _source(model)
    config = _config(source)
    is_refrag = config.get("model_type") == "refrag"
    history = _history(source)
    with replace_folder(out, ours=replaced(out)) as new:
        if options.rewrites(is_refrag=is_refrag):
            _rewrite(source, new, options)
        else:
            _copy(source, new)
        notes = _notes(_config(new), whole=not is_refrag or not options.decoder_only)
        base = config.get("decoder_name") if is_refrag else _base(model, history)
        title = name or out.absolute().name
        card = model_card(CardFacts(new, title, history, license=license, base=base, notes=notes))
        write_mark(new, card=card, history=history.data())
        if changed_by_hand(out):
            notes.append(f"{out / CARD} was changed by hand and stays as it is.")
        else:
            (new / CARD).write_text(card, encoding="utf-8")
    return notes


def _source(model: str) -> Path:
    """The folder of a model: local, a run's, or of the Hub.

    Raises:
        OSError: If there is none.
    """
    from huggingface_hub import snapshot_download

    from refrag_lightning import hub
    from refrag_lightning.model.load import is_refrag, model_folder

    place = model_folder(model)
    if Path(place).is_dir():
        return Path(hub.resolve(place, weights=False).path)
    # A folder with an encoder has folders inside, which other models of the Hub are not read with.
    return Path(snapshot_download(place) if is_refrag(place) else hub.resolve(place).path)


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _base(model: str, history: History) -> str | None:
    """What a causal language model alone was made from, if that is known."""
    if not Path(model).expanduser().is_dir():
        return model
    return history.stages[0].decoder if history.complete else None


def _rewrite(source: Path, new: Path, options: ExportOptions) -> None:
    """Loads the model and writes it as the options say."""
    from refrag_lightning.inference.vllm import vllm_decoder_folder
    from refrag_lightning.model.load import load
    from refrag_lightning.model.merge import merge_adapter
    from refrag_lightning.model.refrag import RefragModel

    model, tokenizer = load(source, allow_base_mismatch=options.allow_base_mismatch)
    saving: dict[str, Any] = {"dtype": options.dtype, "max_shard_size": options.max_shard_size}
    if not isinstance(model, RefragModel):
        # Read as float32, and written as it was unless another type is asked for.
        config = _config(source)
        saving["dtype"] = options.dtype or config.get("dtype") or config.get("torch_dtype")
        model.save_pretrained(new, **saving)
    elif options.decoder_only:
        vllm_decoder_folder(model, tokenizer, new, **saving)
        return
    else:
        if options.merge_lora and model.config.lora is None:
            raise ValueError(f"{source} has no LoRA to merge (--merge_lora)")
        if options.merge_lora:
            merge_adapter(model)
        model.save_pretrained(new, full=options.full or model.config.full, **saving)
    tokenizer.save_pretrained(new)


def _copy(source: Path, new: Path) -> None:
    """Copies what a model and its tokenizer are; links of the Hub's cache become files.

    Raises:
        OSError: If a part of it is missing.
        ValueError: If its index of weights leads out of it.
    """
    from refrag_lightning.model.files import check_shards

    check_shards(source)
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in FOLDERS:
            shutil.copytree(path, new / path.name)
        elif path.is_file() and belongs(path.name, (*FILES, *TERMS)):
            shutil.copyfile(path, new / path.name)
    if not any(new.glob("*.safetensors")):
        raise FileNotFoundError(f"{source} has no *.safetensors weights")
    config = _config(new)
    if config.get("model_type") != "refrag":
        return
    needed = ["refrag_tokenizer.json", "decoder_tokenizer"]
    # An encoder made of the decoder's layers reads with its tokenizer.
    own = not config.get("encoder_layers") or config["encoder_name"] != config["decoder_name"]
    needed += ["encoder_tokenizer"] if own else []
    needed += ["adapter"] if config.get("lora") else []
    needed += ["encoder_adapter"] if config.get("encoder_lora") else []
    if missing := [name for name in needed if not (new / name).exists()]:
        raise FileNotFoundError(f"{source} has no {missing[0]}, so it is no whole model folder")
    for part in ("encoder", "decoder"):
        # Where the base lay on the machine that wrote the folder.
        config[f"{part}_config"]["_name_or_path"] = config.get(f"{part}_name") or ""
    text = json.dumps(config, indent=2, sort_keys=True)
    (new / "config.json").write_text(text + "\n", encoding="utf-8")


def _history(source: Path) -> History:
    """The model's history: that of its run, or what an earlier export kept of it."""
    from refrag_lightning.inference.history import History, read_history, run_of

    run = run_of(source)
    if run is not None:
        return read_history(run)
    mark = read_mark(source)
    return History() if mark is None else History.from_data(mark["history"])


def _notes(config: dict[str, Any], *, whole: bool) -> list[str]:
    """What has to be known of an exported folder before it is given to others."""
    from refrag_lightning.inference.card import is_on_hub

    if not whole:
        return [
            "This is the decoder alone, without what turns documents into vectors. The training "
            "and the results below are those of the whole model."
        ]
    if config.get("model_type") != "refrag" or config.get("full"):
        return []
    notes = []
    for part in ("encoder", "decoder"):
        name, revision = config.get(f"{part}_name"), config.get(f"{part}_revision") or ""
        if not is_on_hub(name, revision or None):
            notes.append(
                f"The base {part} is no model of the Hub: whoever loads this folder needs that "
                "very model. A full export needs none."
            )
        elif revision.startswith("sha256:"):
            notes.append(
                f"The base {part} was the offline copy of {name} that the package makes "
                "(`python -m refrag_lightning fetch`); the one of the Hub is refused in its place. "
                "A full export needs none."
            )
    return notes


@contextmanager
def _place(out: str | None) -> Iterator[Path]:
    """The folder to write: the one asked for, or one that is gone afterwards."""
    if out is not None:
        yield Path(out).expanduser()
        return
    with beside(cache_dir() / "export") as folder:
        yield folder / "model"
