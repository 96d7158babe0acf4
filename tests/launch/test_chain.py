"""Chains of runs: names, what is run again, and a chain that is broken off."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from refrag_lightning.cli import main
from refrag_lightning.launch import chain as chain_module
from refrag_lightning.launch.chain import Chain, chain

ROOT = Path(__file__).parents[2]
CHAINS = sorted((ROOT / "configs" / "chains").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write_chain(**parts):
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump(parts, sort_keys=False))
        return path

    return write_chain


class FakeProcess:
    """A run that makes its folder and ends as it is told to."""

    commands: ClassVar[list[list[str]]] = []
    ends: ClassVar[list[int | None]] = []

    def __init__(self, command):
        self.commands.append(command[3:])
        words = command[3:]
        out, name = words[words.index("--runs_dir") + 1], words[words.index("--name") + 1]
        self.folder = Path(out) / name / f"2026-01-01_00-00-{len(self.commands):02d}"
        (self.folder / "checkpoints").mkdir(parents=True)
        (self.folder / "metrics.csv").write_text("step,train/tokens\n4,1000\n9,2000\n")
        if words[0] == "fit":
            (self.folder / "checkpoints" / "last.ckpt").touch()
        else:
            (self.folder / "report.md").write_text("# A report\n\nGood.\n")
        self.returncode = self.ends.pop(0) if self.ends else 0

    def wait(self, timeout=None):
        if self.returncode is None:
            self.returncode = 143
            raise subprocess.TimeoutExpired("run", timeout)

    def send_signal(self, number):
        pass


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.setattr(FakeProcess, "commands", [])
    monkeypatch.setattr(FakeProcess, "ends", [])
    monkeypatch.setattr(chain_module, "_start", FakeProcess)
    return FakeProcess


def test_folders_and_variables_are_put_in_and_finished_stages_are_left_alone(write, runs, tmp_path):
    file = write(
        variables={"text": None, "steps": 5},
        stages={
            "one": "fit --config a.yaml --paths {text}",
            "two": "fit --config b.yaml --model {one} --steps {steps}",
            "three": "test --config c.yaml --model {two}",
        },
    )
    out = tmp_path / "out"
    chain(str(file), str(out), set={"text": "my corpus"})
    first = out / "one" / "2026-01-01_00-00-01"
    second = out / "two" / "2026-01-01_00-00-02"
    common = ["--runs_dir", str(out), "--name"]
    assert runs.commands == [
        ["fit", "--config", "a.yaml", "--paths", "my corpus", *common, "one"],
        ["fit", "--config", "b.yaml", "--model", str(first), "--steps", "5", *common, "two"],
        ["test", "--config", "c.yaml", "--model", str(second), *common, "three"],
    ]
    results = (out / "results.md").read_text()
    assert "## three\n\n## A report\n\nGood." in results
    assert "| one | 10 | 2,000 | 0.0 |" in results
    chain(str(file), str(out), set={"text": "my corpus"})
    assert len(runs.commands) == 3


def test_a_stage_that_was_broken_off_goes_on_from_its_checkpoint(write, runs, tmp_path, capsys):
    file = write(stages={"one": "fit --config a.yaml", "two": "fit --config b.yaml --model {one}"})
    out = tmp_path / "out"
    runs.ends = [0, None]
    with pytest.raises(SystemExit) as ended:
        chain(str(file), str(out), minutes=1)
    assert ended.value.code == 3 and "time is up in two" in capsys.readouterr().out
    assert not (out / "results.md").exists()
    chain(str(file), str(out))
    checkpoint = out / "two" / "2026-01-01_00-00-02" / "checkpoints" / "last.ckpt"
    assert runs.commands[2][-2:] == ["--ckpt_path", str(checkpoint)]
    assert len(runs.commands) == 3


def test_a_stage_whose_command_has_changed_runs_again(write, runs, tmp_path):
    out = tmp_path / "out"
    chain(str(write(stages={"one": "test --config a.yaml"})), str(out))
    chain(str(write(stages={"one": "test --config b.yaml"})), str(out))
    assert [command[2] for command in runs.commands] == ["a.yaml", "b.yaml"]


def test_chains_with_one_output_folder_share_their_stages(write, runs, tmp_path):
    out = str(tmp_path / "out")
    chain(str(write(stages={"one": "fit --config a.yaml", "two": "fit --model {one}"})), out)
    chain(str(write(stages={"one": "fit --config a.yaml", "three": "fit --model {one}"})), out)
    chain(str(write(stages={"one": "fit --config a.yaml", "two": "fit --model {one}"})), out)
    assert [command[-1] for command in runs.commands] == ["one", "two", "three"]


def test_another_command_does_not_go_on_from_the_checkpoint_of_the_first(write, runs, tmp_path):
    out = tmp_path / "out"
    runs.ends = [None]
    with pytest.raises(SystemExit):
        chain(str(write(stages={"one": "fit --config a.yaml"})), str(out), minutes=1)
    chain(str(write(stages={"one": "fit --config b.yaml"})), str(out))
    assert "--ckpt_path" not in runs.commands[1]


def test_a_chain_that_was_killed_goes_on_from_the_checkpoint(write, runs, tmp_path, monkeypatch):
    file, out = write(stages={"one": "fit --config a.yaml"}), tmp_path / "out"
    save = Chain._save
    saves = []

    def only_before_the_run(self):
        # A killed chain has saved nothing after the run began.
        saves.append(1)
        if len(saves) == 1:
            save(self)

    monkeypatch.setattr(Chain, "_save", only_before_the_run)
    runs.ends = [None]
    with pytest.raises(SystemExit):
        chain(str(file), str(out), minutes=1)
    monkeypatch.setattr(Chain, "_save", save)
    chain(str(file), str(out))
    assert runs.commands[1][-1].endswith("00-00-01/checkpoints/last.ckpt")


def test_a_failure_is_told_and_kept(write, runs, tmp_path):
    file = write(stages={"one": "test --config a.yaml", "two": "test --config b.yaml"})
    runs.ends = [0, 2]
    with pytest.raises(ChildProcessError, match="'two' failed with exit code 2"):
        chain(str(file), str(tmp_path / "out"))
    stages = json.loads((tmp_path / "out" / "chain.json").read_text())["stages"]
    assert [stage["done"] for stage in stages] == [True, False]


def test_only_some_stages(write, runs, tmp_path):
    file = write(stages={"one": "fit --config a.yaml", "two": "fit --config b.yaml --model {one}"})
    with pytest.raises(ValueError, match="'two' needs stage 'one', which is not finished"):
        chain(str(file), str(tmp_path), only=["two"])
    with pytest.raises(ValueError, match="no stage 'three', only one, two"):
        chain(str(file), str(tmp_path), only=["three"])
    assert not runs.commands


@pytest.mark.parametrize(
    ("parts", "values", "message"),
    [
        ({"title": "nothing"}, {}, "has no stages"),
        ({"stages": {"../x": "fit"}}, {}, "stage '../x' of .* may have letters"),
        ({"stages": {"-x": "fit"}}, {}, "stage '-x' of .* may have letters"),
        ({"stages": {"a": "fit {b}", "b": "fit"}}, {}, "'a' of .* names 'b'"),
        ({"stages": {"a": "fit"}}, {"x": "1"}, "no variable 'x'; it has none"),
    ],
)
def test_what_is_no_chain(write, tmp_path, parts, values, message):
    with pytest.raises(ValueError, match=message):
        Chain(write(**parts), tmp_path / "out", values)


def test_a_variable_without_a_value(write, runs, tmp_path):
    file = write(variables={"text": None}, stages={"one": "fit --paths {text}"})
    with pytest.raises(ValueError, match=r"'one' needs a value: --set.text VALUE"):
        chain(str(file), str(tmp_path / "out"))


@pytest.mark.slow
def test_the_tiny_chain_comes_to_its_report(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)

    class InThisProcess:
        """A run without the seconds that a new interpreter takes."""

        returncode = 0

        def __init__(self, command):
            extra = ["--trainer.limit_test_batches", "1"] if command[3] == "test" else []
            small = ["--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2"]
            main([*command[3:], *(extra or small)])

        def wait(self, timeout=None):
            pass

    monkeypatch.setattr(chain_module, "_start", InThisProcess)
    file = "configs/chains/tiny.yaml"
    names = yaml.safe_load(Path(file).read_text())["variables"]
    chain(file, "out", set={name: 2 for name in names if name.endswith("_steps")})
    results = Path("out/results.md").read_text()
    for name in ("one-person", "two-people", "four-people"):
        assert f"## {name}\n" in results
    for words in ("rows@4", "rows@16", "full-text baseline", "closed-book baseline"):
        assert results.count(f"| {words} |") >= 3, words
    assert "![" not in results


@pytest.fixture
def little_data(tmp_path):
    """data/ as the demonstration's chain reads it, made up: books, passages and questions."""
    folder = tmp_path / "data"
    folder.mkdir()

    def sentence(n):
        town = ("Arden", "Birken", "Corley", "Dunmore")[n % 4] + "ville"
        return f"The town of {town} was founded in {1700 + n} and it has {20 + n} old mills."

    passages = [
        {"id": str(n), "title": f"Page {n % 3}", "text": f"{sentence(n)} {sentence(n + 40)}"}
        for n in range(24)
    ]
    questions = [
        {
            "id": str(n),
            "question": f"What was founded in {1700 + n}?",
            "answers": [("Ardenville", f"{20 + n} mills")[n % 2]],
            "passages": [
                {**passages[n], "gold": True},
                *({**passages[(n + k) % 24], "gold": False} for k in (1, 2)),
            ],
        }
        for n in range(24)
    ]
    text = "\n\n".join(" ".join(sentence(n + k) for k in range(6)) for n in range(60))
    books = [{"id": "1", "title": "A book", "text": text}]
    files = {"wiki_passages": passages}
    files |= dict.fromkeys(("books_train", "books_val", "books_test"), books)
    files |= dict.fromkeys(("squad_train", "squad_dev", "nq_train", "nq_dev"), questions)
    for name, records in files.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.mark.slow
def test_the_demonstration_comes_from_data_to_its_tables(tmp_path, monkeypatch, little_data):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    fit = {
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1,
        "trainer.limit_test_batches": 1,
        "data.init_args.batch_size": 2,
        "data.init_args.eval_batch_size": 2,
    }
    base = {"model.init_args.decoder": "tiny/decoder"}
    answers = {
        "model.init_args.max_new_tokens": 2,
        "model.init_args.num_draws": 20,
        "data.init_args.batch_size": 12,
        "data.init_args.limit": 12,
    }
    encoder = {
        "model.init_args.encoder.layers_of": "tiny/decoder",
        "model.init_args.encoder.num_layers": 1,
    }
    further = {
        "align": fit | base | encoder,
        "full": fit | base,
        "closed": fit | base,
        "perplexity": {
            "data.init_args.contexts": "[32]",
            "data.init_args.continuations": "[8]",
            "data.init_args.num_windows": 2,
            "model.init_args.num_draws": 20,
        },
    }

    class InThisProcess:
        """A run without the seconds that a new interpreter takes."""

        returncode = 0

        def __init__(self, command):
            name = command[command.index("--name") + 1]
            options = further.get(name, fit if command[3] == "fit" else answers)
            if name.startswith("zero-shot"):
                options = options | {"model.init_args.init_from": "tiny/decoder"}
            main([*command[3:], *(f"--{key}={value}" for key, value in options.items())])

        def wait(self, timeout=None):
            pass

    monkeypatch.setattr(chain_module, "_start", InThisProcess)
    file = "configs/chains/demo.yaml"
    # The same as those of SQuAD but for the data.
    left_out = {"answers-nq", "zero-shot-nq"}
    chain(
        file,
        "out",
        only=[s for s in yaml.safe_load(Path(file).read_text())["stages"] if s not in left_out],
    )

    def report(stage):
        (path,) = Path("out", stage).glob("*/report.json")
        return json.loads(path.read_text())

    kinds = ("rows", "cut", "other", "random", "zero")
    expected = {f"{kind}@{k}" for kind in kinds for k in (4, 8)}
    expected |= {f"{kind}@{k}+0.1" for kind in ("bm25", "drawn") for k in (4, 8)}
    expected |= {f"bm25@{k}+0.2" for k in (4, 8)} | {"full", "none", "titles"}
    expected |= {"full-text baseline", "closed-book baseline"}
    for stage, passages in (("answers-squad", 1), ("answers-nq-10", 10)):
        assert report(stage)["settings"]["passages"] == [passages]
        found = report(stage)["tables"]
        place = found["Answers"]["columns"].index("positions")
        positions = {row[0]: row[place] for row in found["Answers"]["rows"]}
        assert {*positions} == expected
        for k in (4, 8):
            assert positions[f"cut@{k}"] == positions[f"rows@{k}"]
            shares = [f"rows@{k}", f"bm25@{k}+0.1", f"bm25@{k}+0.2", "full"]
            assert sorted(shares, key=positions.get) == shares
        for name, labels in (("article", 3), ("kind of answer", 2)):
            assert len({row[0] for row in found[f"By {name}"]["rows"]}) == labels
    zero_shot = report("zero-shot-squad")["tables"]["Answers"]["rows"]
    assert [row[0] for row in zero_shot] == ["full", "none"]
    assert "Log-perplexity" in report("perplexity")["tables"]


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_every_chain_has_commands_that_parse(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    variables = yaml.safe_load(path.read_text()).get("variables") or {}
    values = {name: "x" for name, value in variables.items() if value is None}
    run = Chain(path, tmp_path / "out", values)
    folder = tmp_path / "model"
    folder.mkdir()
    for stage in run.stages.values():
        stage.folder, stage.done = str(folder), True
        with pytest.raises(SystemExit) as ended:
            main([*run.arguments(stage.name), "--print_config"])
        assert ended.value.code == 0, shlex.join(run.arguments(stage.name))
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["name"] == stage.name
