"""How a model came about: what its run folder, and those that it began from, say of themselves.

Nothing is guessed: a stage is what stands in a run's `config.yaml` and `metrics.csv`, a result what
stands in a `report.json` that names the run. Of paths only what identifies them to somebody else is
kept: a history goes into a model card.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

# Of a report's settings, those that say on what and how it was measured; others name folders.
REPORT_SETTINGS = (
    "questions",
    "data",
    "split",
    "passages",
    "order",
    "rates",
    "max_new_tokens",
    "precision",
    "seed",
    "bootstrap draws",
)
# Of a module's and a data module's options.
_MODULE_OPTIONS = ("train", "lora", "train_word_embeddings", "lr", "teacher")
_DATA_OPTIONS = ("batch_size", "tokens_per_batch", "read")


@dataclass(frozen=True)
class Stage:
    """A run of training.

    Attributes:
        name: Its run's name.
        module: The class that trained.
        data: The classes of its data and sources, with their files' and data sets' names.
        began_from: The run or model that it began from, or None for base models.
        encoder: The encoder that it put before a decoder, or None.
        decoder: The decoder that it took, or None where it began from a whole model.
        steps: Optimiser steps, or None where it logged none.
        tokens: Tokens trained on, all ranks together, or None.
        options: Settings that say how it was trained, by name.
        figures: The last value of each validation and test metric that it logged.
    """

    name: str
    module: str
    data: str
    began_from: str | None = None
    encoder: str | None = None
    decoder: str | None = None
    steps: int | None = None
    tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """How a model came about.

    Attributes:
        stages: Its runs, the first one first; empty where no run is known.
        reports: Title, settings and tables of each evaluation, as in its `report.json`.
        complete: Whether `stages` go back to base models.
    """

    stages: list[Stage] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    def data(self) -> dict[str, Any]:
        """As plain data, for a JSON file."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> History:
        """What `data` gave."""
        return cls(
            stages=[Stage(**stage) for stage in data["stages"]],
            reports=list(data["reports"]),
            complete=data["complete"],
        )


def run_of(folder: Path) -> Path | None:
    """The run folder that a model folder lies in as `model/`, or None."""
    parent = folder.absolute().parent
    return parent if folder.name == "model" and (parent / "config.yaml").is_file() else None


def read_history(run: Path) -> History:
    """Reads a run, the runs that it began from, and the reports that name it.

    The run that its decoder comes from, where that was trained first, is one that it began from.
    Runs are looked for where the settings say, and otherwise among the folders beside the run, as
    `<name>/<time>`: run folders may have been moved together.

    Args:
        run: The run folder.

    Raises:
        ValueError: If a settings file or a report cannot be read.
    """
    stages: list[Stage] = []
    seen: set[Path] = set()
    place: Path | None = run
    while place is not None and place.resolve() not in seen:
        seen.add(place.resolve())
        stage, before = _stage(place)
        stages.insert(0, stage)
        place = None if before is None else _find_run(before, near=place)
    return History(
        stages=stages,
        reports=[_report(path) for path in _reports_on(run)],
        complete=stages[0].began_from is None,
    )


def _stage(run: Path) -> tuple[Stage, str | None]:
    """A run's stage, and the path of the model or decoder that it took, as its settings have it."""
    settings = _settings(run / "config.yaml")
    module = _options(settings.get("model"))
    data = _options(settings.get("data"))
    began_from = module.get("init_from")
    steps, tokens, figures = _metrics(run / "metrics.csv")
    options = {name: module[name] for name in _MODULE_OPTIONS if module.get(name) is not None}
    options |= {name: data[name] for name in _DATA_OPTIONS if data.get(name) is not None}
    options |= {"precision": (settings.get("trainer") or {}).get("precision") or "32-true"}
    if settings.get("seed_everything") is not None:
        options["seed"] = settings["seed_everything"]
    stage = Stage(
        name=str(settings.get("name") or run.absolute().parent.name),
        module=_class_name(settings.get("model")),
        data=describe(settings.get("data")),
        began_from=None if began_from is None else short_name(str(began_from)),
        encoder=None if began_from else _name_of(module.get("encoder")),
        decoder=None if began_from else _name_of(module.get("decoder")),
        steps=steps,
        tokens=tokens,
        options=options,
        figures=figures,
    )
    before = began_from or module.get("decoder")
    return stage, None if before is None else str(before)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a run's settings: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings of a run")
    return settings


def _options(spec: Any) -> dict[str, Any]:
    return dict((spec or {}).get("init_args") or {}) if isinstance(spec, dict) else {}


def _class_name(spec: Any) -> str:
    path = spec.get("class_path", "") if isinstance(spec, dict) else ""
    return str(path).rpartition(".")[2] or "unknown"


def describe(spec: Any) -> str:
    """A class of the settings and the classes inside it, as `SFTDataModule (HubQuestions squad)`.

    Args:
        spec: The setting: a mapping with `class_path` and `init_args`.
    """
    if not isinstance(spec, dict) or "class_path" not in spec:
        return "unknown"
    options = _options(spec)
    inner = [_source_name(options)] if _source_name(options) else []
    for value in options.values():
        inner += [describe(part) for part in _classes(value)]
    name = _class_name(spec)
    return f"{name} ({', '.join(inner)})" if inner else name


def _classes(value: Any) -> Iterator[Any]:
    """The classes that an option holds, itself or in a list or in mappings."""
    if isinstance(value, dict) and "class_path" in value:
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _classes(part)


def _source_name(options: Mapping[str, Any]) -> str:
    """The files or the data set that a source reads; of files the last part of their paths."""
    if paths := options.get("paths"):
        names = paths if isinstance(paths, list) else [paths]
        return ", ".join(Path(str(name)).name for name in names)
    if isinstance(options.get("name"), str):
        words = (options["name"], options.get("config"), options.get("revision"))
        return " ".join(str(word) for word in words if word)
    return ""


def short_name(path: str) -> str:
    """The last two parts of a run's path, `<name>/<time>`; a Hub name as it is."""
    parts = [part for part in Path(path).parts if part not in ("/", "..", "~")]
    if parts and parts[-1] == "model" and len(parts) > 1:
        parts = parts[:-1]
    return "/".join(parts[-2:])


def _name_of(model: Any) -> str | None:
    if isinstance(model, Mapping):
        name = short_name(str(model.get("layers_of")))
        return f"the first {model.get('num_layers', 8)} layers of {name}"
    return None if model is None else short_name(str(model))


def _find_run(path: str, *, near: Path) -> Path | None:
    """The run folder that a setting names, where it says or beside the run `near`."""
    named = Path(path).expanduser()
    places = [named, near.absolute().parent.parent / short_name(path)]
    if named.name == "model":
        places.insert(1, named.parent)
    return next((place for place in places if (place / "config.yaml").is_file()), None)


def _metrics(path: Path) -> tuple[int | None, int | None, dict[str, float]]:
    """Steps, tokens, and the last figures of validation and test."""
    steps: int | None = None
    tokens: int | None = None
    figures: dict[str, float] = {}
    if not path.is_file():
        return steps, tokens, figures
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = {name: value for name, value in row.items() if name and value}
            if any(name.startswith("train/") for name in values):
                # The first step is logged as step 0.
                steps = max(steps or 0, int(float(values.get("step", 0))) + 1)
            if "train/tokens" in values:
                tokens = max(tokens or 0, int(float(values["train/tokens"])))
            logged = {n: v for n, v in values.items() if _is_figure(n)}
            figures |= {name: float(value) for name, value in logged.items()}
    return steps, tokens, figures


def _is_figure(name: str) -> bool:
    return name.startswith(("val/", "test/")) and not name.endswith("tokens_per_second")


def _reports_on(run: Path) -> list[Path]:
    """The reports in the run's own folder and beside it that are on this run, by path."""
    own = run / "report.json"
    beside = sorted(run.absolute().parent.parent.glob("*/*/report.json"))
    found = [own] if own.is_file() else []
    for path in beside:
        if path.resolve() != own.resolve() and _is_on(_json(path), run):
            found.append(path)
    return found


def _is_on(report: Mapping[str, Any], run: Path) -> bool:
    named = (report.get("settings") or {}).get("model")
    return isinstance(named, str) and short_name(named) == short_name(str(run.resolve()))


def _report(path: Path) -> dict[str, Any]:
    report = _json(path)
    settings = report.get("settings") or {}
    return {
        "title": report.get("title", ""),
        "settings": {name: settings[name] for name in REPORT_SETTINGS if name in settings},
        "tables": report.get("tables") or {},
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a report: {error}") from error
    return data if isinstance(data, dict) else {}
