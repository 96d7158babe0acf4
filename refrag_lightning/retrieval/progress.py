"""A progress bar of a build, on a terminal only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refrag_lightning.plain_text import one_line

Advance = Callable[..., None]
_SECONDS = 0.1  # telling the bar of every document would take longer than reading it


@contextmanager
def bar(
    what: str, *, total: float | None, shown: bool, unit: str = "passages"
) -> Iterator[Advance]:
    """Shows how far something is, how fast it goes and how long it will take.

    Args:
        what: What is done.
        total: The work in all, in whatever measure; None if it is not known.
        shown: Whether to show anything; never in a pipe.
        unit: What is counted beside the work.

    Yields:
        What to call with a number of units, and with the work that they were (as much, by default).
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda count=1, work=None: None
        return
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[units]:,} " + unit),
        TextColumn("{task.fields[speed]}"),
    ]
    if total is not None:
        columns += [BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
    else:
        columns.append(TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(one_line(what), total=total, units=0, speed="")
        units, done, told = 0, 0.0, 0.0

        def tell() -> None:
            elapsed = progress.tasks[0].elapsed
            speed = f"{units / elapsed:,.0f} a second" if elapsed else ""
            progress.update(task, completed=done, units=units, speed=speed)

        def advance(count: int = 1, work: float | None = None) -> None:
            nonlocal units, done, told
            units += count
            done += count if work is None else work
            if time.monotonic() - told > _SECONDS:
                told = time.monotonic()
                tell()

        yield advance
        tell()
