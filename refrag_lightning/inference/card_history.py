"""Training and results in a model card: a model's history as Markdown."""

from __future__ import annotations

from typing import Any

from refrag_lightning.evaluation.gap import Interval
from refrag_lightning.evaluation.report import Cell, Table
from refrag_lightning.inference.history import History, Stage
from refrag_lightning.plain_text import as_json, code_markdown, literal_markdown


def training_section(history: History) -> str:
    """The runs, what each learnt from, and how.

    Args:
        history: The model's history.
    """
    if not history.stages:
        return "Not known: no run folder lay beside the model when it was exported."
    rows = [_stage_row(stage) for stage in history.stages]
    table = Table("", ["run", "class", "data", "began from", "steps", "tokens"], rows)
    parts = [_body(table)]
    if not history.complete:
        parts.append(
            f"What led to {code_markdown(str(history.stages[0].began_from))} is not known: its run "
            "folder was not found."
        )
    options = [
        ", ".join(f"{name} {_code(value)}" for name, value in stage.options.items())
        for stage in history.stages
    ]
    names = [literal_markdown(stage.name) for stage in history.stages]
    lines = [f"- {name}: {text}" for name, text in zip(names, options, strict=True)]
    return "\n\n".join([*parts, "\n".join(lines)])


def _stage_row(stage: Stage) -> list[Cell]:
    bases = [base for base in (stage.encoder, stage.decoder) if base]
    began_from = stage.began_from or ", ".join(bases) or "unknown"
    return [
        stage.name,
        stage.module,
        stage.data,
        began_from,
        "unknown" if stage.steps is None else f"{stage.steps:,}",
        "unknown" if stage.tokens is None else f"{stage.tokens:,}",
    ]


def results_section(history: History) -> str:
    """What the last run logged last, and the tables of every evaluation.

    Args:
        history: The model's history.
    """
    parts = []
    figures = history.stages[-1].figures if history.stages else {}
    if figures:
        rows: list[list[Cell]] = [[name, value] for name, value in sorted(figures.items())]
        table = Table("", ["figure", "value"], rows, digits=4)
        parts += ["What the last run of training logged last:", _body(table)]
    for report in history.reports:
        settings = ", ".join(
            f"{literal_markdown(name)} {_code(value)}" for name, value in report["settings"].items()
        )
        title = literal_markdown(report["title"] or "Evaluation")
        parts += [f"### {title}", *([settings] if settings else [])]
        for name, data in report["tables"].items():
            rows = [[_cell(cell) for cell in row] for row in data["rows"]]
            table = Table(name, data["columns"], rows, notes=data.get("notes") or [])
            parts.append(f"**{literal_markdown(name)}**\n\n{_body(table)}")
    if not history.reports:
        parts.append("No report of an evaluation on this model was found.")
    return "\n\n".join(parts)


def _cell(value: Any) -> Cell:
    """A cell of a report's JSON as `Table` takes it."""
    if isinstance(value, dict):
        numbers = (value.get(name) for name in ("value", "low", "high"))
        return Interval(*(float("nan") if n is None else float(n) for n in numbers))
    return value if isinstance(value, float | int | str) else None


def _body(table: Table) -> str:
    """A table in Markdown without its heading."""
    return table.markdown().split("\n\n", 1)[1]


def _code(value: Any) -> str:
    return code_markdown(as_json(value) if isinstance(value, dict | list) else str(value))
