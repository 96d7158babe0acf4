"""Reports: the same tables as text in the terminal, as JSON, as Markdown and in W&B, with plots.

A report is data: tables of cells, and plots of points with intervals. What is not defined stands
there as such, with its reason in a note; it is never left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refrag_lightning.cache import replace_file, write_text
from refrag_lightning.evaluation.gap import Interval
from refrag_lightning.plain_text import as_json, code_markdown, literal_markdown, one_line

Cell = Interval | float | int | str | None


@dataclass
class Table:
    """A table of results.

    Attributes:
        name: Its heading, and its key in the JSON file.
        columns: The headings of the columns, the first one that of the row names.
        rows: The cells of each row.
        notes: What has to be known to read it, each a sentence.
        digits: Digits behind the point.
    """

    name: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    digits: int = 3

    def cells(self) -> list[list[str]]:
        """The rows as text; an interval is `0.912 [0.893, 0.930]`, nothing is `-`."""
        return [[one_line(show(cell, self.digits)) for cell in row] for row in self.rows]

    def text(self) -> str:
        """The table for a terminal."""
        lines = [[*map(one_line, self.columns)], *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        aligned.insert(1, "-" * max(map(len, aligned)))
        return "\n".join([one_line(self.name), *aligned, *map(one_line, self.notes)])

    def markdown(self) -> str:
        """The table for a Markdown file."""
        rows = [
            [literal_markdown(c) if isinstance(c, str) else show(c, self.digits) for c in row]
            for row in self.rows
        ]
        heads = [literal_markdown(column) for column in self.columns]
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = map(literal_markdown, self.notes)
        return "\n\n".join([f"## {literal_markdown(self.name)}", table, *notes])

    def data(self) -> dict[str, Any]:
        """The table as plain data; an interval is `{"value": …, "low": …, "high": …}`."""
        return {
            "columns": self.columns,
            "rows": [[plain(cell) for cell in row] for row in self.rows],
            "notes": self.notes,
        }


@dataclass
class Plot:
    """Points with intervals.

    Attributes:
        name: Its heading; in its file's name white space becomes `_`.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        series: For each line its points: where it stands (a number or a word) and its interval.
        lines: Horizontal lines: label -> height.
        log_x: Whether the horizontal axis is logarithmic.
    """

    name: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float | str, Interval]]]
    lines: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False

    @property
    def file(self) -> str:
        """The name of its file."""
        words = "".join(c if c.isalnum() or c in "-." else "_" for c in self.name.lower())
        return f"{words}.png"

    def draw(self, path: Path) -> None:
        """Writes it as a PNG file."""
        # Not through pyplot, which would look for a display and keep every figure.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for label, points in self.series.items():
            shown = [(x, i) for x, i in points if math.isfinite(i.value)]
            errors = [
                [max(0.0, i.value - i.low) if math.isfinite(i.low) else 0.0 for _, i in shown],
                [max(0.0, i.high - i.value) if math.isfinite(i.high) else 0.0 for _, i in shown],
            ]
            axes.errorbar(
                [x for x, _ in shown],
                [i.value for _, i in shown],
                yerr=errors,
                marker="o",
                capsize=3,
                label=label,
            )
        styles = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
        for number, (label, height) in enumerate(self.lines.items()):
            if math.isfinite(height):
                style = styles[number % len(styles)]
                axes.axhline(height, linestyle=style, color="grey", linewidth=1.2, label=label)
        if self.log_x:
            axes.set_xscale("log", base=2)
            places = sorted({float(x) for points in self.series.values() for x, _ in points})
            axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set(title=self.name, xlabel=self.x, ylabel=self.y)
        if self.series or self.lines:
            axes.legend(fontsize=8)
        with replace_file(path) as part:
            figure.savefig(part, dpi=120, format="png")


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        title: Its heading.
        settings: What was evaluated, on what, and how.
        tables: Its tables, the most important one first.
        plots: Its plots.
    """

    title: str
    settings: dict[str, Any]
    tables: list[Table]
    plots: list[Plot] = field(default_factory=list)

    def text(self) -> str:
        """All tables for a terminal."""
        settings = "\n".join(one_line(f"{name}: {value}") for name, value in self.settings.items())
        tables = (table.text() for table in self.tables)
        return "\n\n".join([one_line(self.title), settings, *tables])

    def markdown(self) -> str:
        """The Markdown file."""
        settings = "\n".join(
            f"- {literal_markdown(name)}: {code_markdown(str(value))}"
            for name, value in self.settings.items()
        )
        plots = "\n\n".join(f"![{literal_markdown(p.name)}]({p.file})" for p in self.plots)
        parts = [
            f"# {literal_markdown(self.title)}",
            settings,
            *(table.markdown() for table in self.tables),
            plots,
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def data(self) -> dict[str, Any]:
        """The JSON file's data."""
        return {
            "title": self.title,
            "settings": self.settings,
            "tables": {table.name: table.data() for table in self.tables},
        }

    def write(self, folder: Path) -> list[Path]:
        """Writes `report.json`, `report.md` and the plots.

        Args:
            folder: Where to; must exist.

        Returns:
            The files.
        """
        text = as_json(self.data(), indent=1, allow_nan=False)
        write_text(folder / "report.json", text + "\n")
        write_text(folder / "report.md", self.markdown())
        for plot in self.plots:
            plot.draw(folder / plot.file)
        names = ["report.json", "report.md", *(plot.file for plot in self.plots)]
        return [folder / name for name in names]

    def log(self, loggers: Iterable[Any], folder: Path) -> None:
        """Hands the tables and plots to every W&B logger among `loggers`.

        Args:
            loggers: The trainer's.
            folder: Where `write` wrote the plots.
        """
        from lightning.pytorch.loggers import WandbLogger

        for logger in loggers:
            if not isinstance(logger, WandbLogger):
                continue
            for table in self.tables:
                name, columns = f"report/{one_line(table.name)}", [*map(one_line, table.columns)]
                logger.log_table(name, columns=columns, data=table.cells())
            for plot in self.plots:
                logger.log_image(f"report/{plot.name}", [str(folder / plot.file)])


def show(cell: Cell, digits: int = 3) -> str:
    """A cell as text."""
    if cell is None:
        return "-"
    if isinstance(cell, Interval):
        value, low, high = (show(float(number), digits) for number in cell)
        return value if low == high == "-" else f"{value} [{low}, {high}]"
    if isinstance(cell, float):
        return f"{cell:.{digits}f}" if math.isfinite(cell) else "-"
    return str(cell)


def plain(cell: Cell) -> Any:
    """A cell as data of JSON, which has neither NaN nor infinity."""
    if isinstance(cell, Interval):
        return {name: plain(number) for name, number in cell._asdict().items()}
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    return cell
