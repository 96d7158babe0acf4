"""The model card of an exported folder: `README.md` with the Hub's YAML header.

It says what stands in the folder's configuration and weights, and in the history of its runs
(`history.py`), and nothing else; what is not known stands there as unknown. The header's fields are
those of the Hub's model cards (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from refrag_lightning import offline_models, tiny_models
from refrag_lightning.inference.card_history import results_section, training_section
from refrag_lightning.inference.history import History
from refrag_lightning.inference.weights import describe_weights
from refrag_lightning.plain_text import code_markdown, literal_markdown, printable

_UNITS = {
    "encoder": "the encoder's tokens",
    "decoder": "the decoder's tokens",
    "sentence": "sentences",
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        folder: The exported folder, complete but for the card.
        name: What the model is called: `owner/name` on the Hub, else the folder's name.
        history: How it came about.
        license: Its licence as the Hub names licences, if its owner gave one.
        base: For a plain model, the name of what it was before it trained, if that is known.
        notes: Further facts, each a sentence.
    """

    folder: Path
    name: str
    history: History = field(default_factory=History)
    license: str | None = None
    base: str | None = None
    notes: Sequence[str] = ()

    @property
    def address(self) -> str:
        """What `from_pretrained` takes: the name on the Hub, or a word for the folder's path."""
        return self.name if _HUB_NAME.fullmatch(self.name) else "FOLDER"


def model_card(facts: CardFacts) -> str:
    """Writes the card.

    Args:
        facts: What it is written from.

    Returns:
        The text of `README.md`.
    """
    config = json.loads((facts.folder / "config.json").read_text(encoding="utf-8"))
    is_refrag = config.get("model_type") == "refrag"
    sections = [
        f"# {literal_markdown(facts.name)}",
        _refrag_summary(config) if is_refrag else _plain_summary(config),
        "## Use",
        _refrag_use(facts, config) if is_refrag else _plain_use(facts),
        "## What it is",
        _refrag_table(facts, config) if is_refrag else _plain_table(facts, config),
        *map(literal_markdown, facts.notes),
        "## Training",
        training_section(facts.history),
        "## Results",
        results_section(facts.history),
        "## Licence",
        _licence(facts, config),
    ]
    header = yaml.safe_dump(metadata(facts, config), sort_keys=True, allow_unicode=True)
    # YAML keeps what nobody sees; a path in the code above may hold it too.
    return printable(f"---\n{header}---\n\n" + "\n\n".join(sections) + "\n")


def metadata(facts: CardFacts, config: dict[str, Any]) -> dict[str, Any]:
    """The YAML header: only fields whose value is known.

    Args:
        facts: What the card is written from.
        config: The folder's `config.json`.
    """
    is_refrag = config.get("model_type") == "refrag"
    fields: dict[str, Any] = {
        "library_name": "refrag_lightning" if is_refrag else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["refrag", "retrieval-augmented-generation"] if is_refrag else ["refrag_lightning"],
    }
    if bases := _bases(facts, config):
        fields["base_model"] = bases
    if facts.license is not None:
        fields["license"] = facts.license
    return fields


def is_on_hub(name: str | None, revision: str | None = None) -> bool:
    """Whether a base is a model of the Hub: no local folder, no test model.

    Args:
        name: Its name.
        revision: Its revision, if it is known: a commit for a model of the Hub. The offline copies
            of the default models have a digest, as local folders do.
    """
    if not name or name in offline_models.SOURCES:
        return bool(name)
    if revision is not None:
        return bool(_COMMIT.fullmatch(revision))
    is_local = Path(name).expanduser().exists() or name.startswith(("~", ".", "/"))
    return bool(_HUB_NAME.fullmatch(name)) and name not in tiny_models.NAMES and not is_local


def _bases(facts: CardFacts, config: dict[str, Any]) -> list[str]:
    """The bases that are models of the Hub, the decoder first."""
    if config.get("model_type") != "refrag":
        return [facts.base] if facts.base and is_on_hub(facts.base) else []
    parts = ("decoder", "encoder")
    named = [(config.get(f"{part}_name"), config.get(f"{part}_revision")) for part in parts]
    return [name for name, revision in named if name and is_on_hub(name, revision)]


# ---- a model with an encoder -------------------------------------------------------------------


def _refrag_summary(config: dict[str, Any]) -> str:
    rates = _numbers(config["rates"])
    return (
        "A decoder LLM that reads documents as vectors, in the manner of REFRAG "
        "([arXiv 2509.01092](https://arxiv.org/abs/2509.01092)). Documents stand in the prompt "
        'inside `<doc id="…">…</doc>`; a small encoder reads them, and each row of '
        f"{rates} tokens reaches the decoder as {_vectors(config['num_slots'])}."
    )


def _refrag_use(facts: CardFacts, config: dict[str, Any]) -> str:
    call = "tokenizer(text)"
    if _has_chat_template(facts.folder / "decoder_tokenizer"):
        call = 'tokenizer.apply_chat([{"role": "user", "content": text}])'
    code = [
        "from refrag_lightning.model.load import load",
        "",
        f'model, tokenizer = load("{facts.address}")',
        'text = \'Where? <doc id="1" title="Rivers">The Seine flows through Paris.</doc>\'',
        f"batch = {call}",
        "tokens = model.generate(**batch, max_new_tokens=64)",
        "print(tokenizer.decode(tokens[0]))",
    ]
    where = (
        "The folder holds every weight; no other model is needed."
        if config.get("full")
        else "The base models below are loaded beside it, and have to be the same ones."
    )
    return "\n".join(
        [
            f"Needs the package `refrag_lightning`. {where}",
            "",
            "```python",
            *code,
            "```",
            "",
            "In a terminal: `python -m refrag_lightning chat --model FOLDER`.",
        ]
    )


def _refrag_table(facts: CardFacts, config: dict[str, Any]) -> str:
    lora = config.get("lora")
    adapter = f"rank {lora['r']}, alpha {lora['alpha']}" if lora else "none"
    rows = [
        ("encoder", _base(config, "encoder")),
        ("decoder", _base(config, "decoder")),
        ("tokens a row", f"{_numbers(config['rates'])}; {config['compression']} by default"),
        ("vectors a row", str(config["num_slots"])),
        ("rows are cut by", _UNITS[config["chunk_by"]]),
        ("pooling", literal_markdown(config["pooling"])),
        ("the encoder reads", f"a {config['context']} at a time"),
        ("projector", literal_markdown(config["projector"])),
        ("differs from the bases", _names(config.get("trained") or ["projector"])),
        ("LoRA on the decoder", adapter),
        ("in this folder", describe_weights(facts.folder)),
        ("needs the base models", "no" if config.get("full") else "yes"),
    ]
    return _table(rows)


def _base(config: dict[str, Any], part: str) -> str:
    """A base's name, revision and kind; of a local folder its last part."""
    name, revision = config.get(f"{part}_name"), config.get(f"{part}_revision")
    kind = (config.get(f"{part}_config") or {}).get("model_type", "unknown kind")
    commit = f", {code_markdown(revision[:19])}" if revision else ""
    return f"{_shown(name, revision)}, {literal_markdown(kind)}{commit}"


def _shown(name: str | None, revision: str | None = None) -> str:
    if not name:
        return "unknown"
    if is_on_hub(name, revision) or name in tiny_models.NAMES:
        return code_markdown(name)
    return f"a local folder, {code_markdown(Path(name).name)}"


def _vectors(num_slots: int) -> str:
    return "one vector" if num_slots == 1 else f"{num_slots} vectors"


# ---- a causal language model alone --------------------------------------------------------------


def _plain_summary(config: dict[str, Any]) -> str:
    kind = config.get("model_type", "unknown kind")
    return (
        f"A causal language model ({literal_markdown(kind)}), as an ordinary "
        "Hugging Face folder. It reads documents as text, without an encoder."
    )


def _plain_use(facts: CardFacts) -> str:
    name = f'"{facts.address}"'
    return "\n".join(
        [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name})",
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
            "```",
        ]
    )


def _plain_table(facts: CardFacts, config: dict[str, Any]) -> str:
    architecture = ", ".join(config.get("architectures") or ["unknown"])
    rows = [
        ("architecture", literal_markdown(architecture)),
        ("in this folder", describe_weights(facts.folder)),
    ]
    if facts.base:
        rows.insert(1, ("began as", _shown(facts.base)))
    return _table(rows)


# ---- licence and tables ----------------------------------------------------------------------


def _licence(facts: CardFacts, config: dict[str, Any]) -> str:
    if facts.license is not None:
        return f"{code_markdown(facts.license)}, as given by whoever exported it."
    bases = [*map(code_markdown, _bases(facts, config))]
    other = f" The licences of {' and '.join(bases)} apply to what was taken from there."
    return "Not stated." + (other if bases else "")


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {name} | {_escaped(value)} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _escaped(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\|", text)


def _names(names: Sequence[str]) -> str:
    return literal_markdown(", ".join(names))


def _numbers(values: Sequence[int]) -> str:
    """`4`, `4 or 8`, `4, 8 or 16`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text("utf-8")).get("chat_template"))
