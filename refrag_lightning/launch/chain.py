"""chain: a recipe of several runs, one after another, that can be broken off and taken up again.

A chain is a YAML file of stages. Each is a command of this package, in which `{stage}` stands for
the run folder of an earlier stage and `{variable}` for a value that `--set` can change:

    variables:
      text: null
    stages:
      align: fit --config configs/smollm2/1_align.yaml --config {text}
      reconstruct: fit --config configs/smollm2/2_reconstruct.yaml --model {align}
      answers: test --config configs/eval/answers.yaml --model {reconstruct}

A stage that is finished is not run again; one that was broken off goes on from its last checkpoint.
What is there, and how long it took, stands in `chain.json` of the output folder; the end of a chain
is a Markdown file of all its reports.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from refrag_lightning.cache import sole_writer, write_text
from refrag_lightning.git_state import git_state
from refrag_lightning.plain_text import literal_markdown, say

_NAME = re.compile(r"\{([\w-]+)\}")
# Time for a run to end by itself after it was asked to.
_GRACE = 30.0


@dataclass
class Stage:
    """What is known of a stage.

    Attributes:
        name: Its name, and that of its folder.
        command: The command as the chain has it.
        folder: Its newest run folder, or None before it ran.
        done: Whether it came to its end.
        seconds: How long it ran so far, all attempts together.
        before: Run folders of the same name that were there before its first attempt.
    """

    name: str
    command: str
    folder: str | None = None
    done: bool = False
    seconds: float = 0.0
    before: list[str] | None = None


def chain(
    file: str,
    out: str,
    set: dict[str, Any] | None = None,
    only: list[str] | None = None,
    minutes: float | None = None,
    results: str | None = None,
    show: bool = False,
) -> None:
    """Runs a chain of runs, or goes on with it.

    Args:
        file: The chain's YAML file.
        out: Folder of everything that comes out; the same one to go on.
        set: Values of the chain's variables: `--set.text corpus.jsonl.gz`.
        only: Run these stages only; those that they need have to be finished.
        minutes: Stop after so long; what was running goes on from its last checkpoint next time.
        results: Markdown file of the results; `results.md` in `out` if None.
        show: Only say which stages there are and which are finished.

    Raises:
        ValueError: If the file is no chain, or a name in it is unknown.
        ChildProcessError: If a stage fails.
    """
    # A run that is asked to end stops the stage that it waits for.
    signal.signal(signal.SIGTERM, _end)
    run = Chain(Path(file), Path(out), set or {})
    if show:
        for stage in run.stages.values():
            say(f"{'done' if stage.done else '-':<5} {stage.name:<20} {stage.seconds:7.0f} s")
        return
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    if unknown := [name for name in only or () if name not in run.stages]:
        raise ValueError(f"{file} has no stage {unknown[0]!r}, only {', '.join(run.stages)}")
    with sole_writer(Path(out) / "chain.json", advice="wait for its end, or give another --out"):
        for name in only or run.stages:
            if not run.stages[name].done and not run.run(name, deadline=deadline):
                say(f"time is up in {name}: the same command goes on from there")
                raise SystemExit(3)
        path = Path(results) if results else Path(out) / "results.md"
        write_text(path, run.results())
    say(f"results: {path}")


class Chain:
    """A chain and how far it has come.

    Args:
        file: The YAML file.
        out: The output folder.
        values: Values of variables.

    Raises:
        ValueError: If the file is no chain, or a name in it is unknown.
    """

    def __init__(self, file: Path, out: Path, values: Mapping[str, Any]) -> None:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("stages"), dict):
            raise ValueError(f"{file} has no stages")
        self.title = data.get("title", file.stem)
        self.variables = dict(data.get("variables") or {})
        if unknown := sorted(values.keys() - self.variables.keys()):
            known = ", ".join(self.variables) or "none"
            raise ValueError(f"{file} has no variable {unknown[0]!r}; it has {known}")
        self.variables |= values
        self.out = out
        self.stages: dict[str, Stage] = {}
        # Of other chains with the same output folder, which may share stages with this one.
        self._others: list[dict[str, Any]] = []
        for name, command in data["stages"].items():
            # A folder of the output folder, and a word of the stage's command.
            if not re.fullmatch(r"\w[\w.-]*", str(name)):
                raise ValueError(
                    f"stage {name!r} of {file} may have letters, digits, '.', '_' and '-', and "
                    "begins with a letter, a digit or '_'"
                )
            earlier = {*self.stages, *self.variables}
            if wrong := [word for word in _NAME.findall(command) if word not in earlier]:
                raise ValueError(
                    f"stage {name!r} of {file} names {wrong[0]!r}, which is no variable and no "
                    "earlier stage"
                )
            self.stages[name] = Stage(name, " ".join(command.split()))
        self._restore()

    @property
    def _state(self) -> Path:
        return self.out / "chain.json"

    def _restore(self) -> None:
        if not self._state.is_file():
            return
        for saved in json.loads(self._state.read_text())["stages"]:
            stage = self.stages.get(saved["name"])
            if stage is None:
                self._others.append(saved)
            # A stage whose command has changed has to run again.
            elif saved["command"] == stage.command:
                stage.folder, stage.done = saved["folder"], saved["done"]
                stage.seconds, stage.before = saved["seconds"], saved["before"]

    def _save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        stages = [*map(asdict, self.stages.values()), *self._others]
        text = json.dumps({"stages": stages}, indent=2)
        write_text(self._state, text + "\n")

    def arguments(self, name: str) -> list[str]:
        """A stage's command with everything put in.

        Raises:
            ValueError: If it needs a stage that is not finished, or a variable without a value.
        """

        def value(match: re.Match[str]) -> str:
            word = match[1]
            if word in self.variables:
                if self.variables[word] is None:
                    raise ValueError(f"stage {name!r} needs a value: --set.{word} VALUE")
                given = self.variables[word]
                return given if isinstance(given, str) else json.dumps(given)
            if not self.stages[word].done:
                raise ValueError(f"stage {name!r} needs stage {word!r}, which is not finished")
            return str(self.stages[word].folder)

        words = shlex.split(self.stages[name].command)
        arguments = [_NAME.sub(value, word) for word in words]
        return [*arguments, "--runs_dir", str(self.out), "--name", name]

    def run(self, name: str, *, deadline: float | None = None) -> bool:
        """Runs a stage, from its last checkpoint where there is one.

        Args:
            name: The stage.
            deadline: When to stop, on the monotonic clock.

        Returns:
            Whether it came to its end before the deadline.

        Raises:
            ChildProcessError: If it failed.
        """
        stage = self.stages[name]
        arguments = self.arguments(name)
        if stage.before is None:
            stage.before = [folder.name for folder in self._folders(name)]
            # Before the first attempt, so that it is known of whatever happens.
            self._save()
        saved = _last_checkpoint(self.attempts(stage))
        if arguments[0] == "fit" and saved is not None:
            arguments += ["--ckpt_path", str(saved)]
        command = [sys.executable, "-m", "refrag_lightning", *arguments]
        say(f"\n== {name}: {shlex.join(['python', *command[1:]])}", flush=True)
        begin = time.monotonic()
        process = _start(command)
        stopped = False
        try:
            left = None if deadline is None else max(1.0, deadline - begin)
            process.wait(left)
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        finally:
            stage.seconds += time.monotonic() - begin
            folders = self.attempts(stage)
            stage.folder = str(folders[-1]) if folders else None
            stage.done = process.returncode == 0 and stage.folder is not None
            self._save()
        if not stage.done and not stopped:
            raise ChildProcessError(f"stage {name!r} failed with exit code {process.returncode}")
        return stage.done

    def attempts(self, stage: Stage) -> list[Path]:
        """The run folders of a stage's attempts, the oldest first."""
        before = stage.before or []
        return [folder for folder in self._folders(stage.name) if folder.name not in before]

    def _folders(self, name: str) -> list[Path]:
        return sorted(path for path in (self.out / name).glob("*") if path.is_dir())

    def results(self) -> str:
        """Markdown: what ran, on which commit, and the reports of all stages that have one."""
        lines = [f"# {literal_markdown(self.title)}", "", f"Commit {_commit()}.", ""]
        lines += ["| stage | steps | tokens | minutes |", "| --- | ---: | ---: | ---: |"]
        for stage in self.stages.values():
            if not stage.done or stage.folder is None:
                continue
            steps, tokens = _progress(self.attempts(stage))
            name, minutes = literal_markdown(stage.name), stage.seconds / 60
            lines.append(f"| {name} | {steps} | {tokens} | {minutes:.1f} |")
        for stage in self.stages.values():
            report = Path(stage.folder or "") / "report.md"
            if stage.done and report.is_file():
                # Without the plots, which lie beside the report.
                text = re.sub(
                    r"^!\[.*\n?", "", report.read_text(encoding="utf-8"), flags=re.MULTILINE
                )
                body = re.sub(r"^#", "##", text, flags=re.MULTILINE)
                lines += ["", f"## {literal_markdown(stage.name)}", "", body.strip()]
        return "\n".join(lines) + "\n"


def _end(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command)


def _last_checkpoint(folders: Sequence[Path]) -> Path | None:
    """The checkpoint of the newest run folder that has one."""
    found = [folder / "checkpoints" / "last.ckpt" for folder in folders]
    return next((path for path in reversed(found) if path.is_file()), None)


def _progress(folders: Sequence[Path]) -> tuple[str, str]:
    """Steps and training tokens of a stage, as far as its attempts logged them."""
    steps, tokens = 0, 0.0
    for folder in folders:
        with (folder / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                steps = max(steps, int(float(row.get("step") or 0)) + 1)
                tokens = max(tokens, float(row.get("train/tokens") or 0))
    return (str(steps) if steps > 1 else "-"), (f"{tokens:,.0f}" if tokens else "-")


def _commit() -> str:
    """The checkout's commit, or `unknown`."""
    git = git_state()
    return "unknown" if git is None else git.label(12)
