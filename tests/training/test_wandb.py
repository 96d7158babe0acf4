"""What a run gives to W&B, read back from the file of an offline run; nothing is ever sent."""

import csv
import json
import os
import random
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from refrag_lightning import RefragModel, RefragTokenizer
from refrag_lightning.cli import main
from refrag_lightning.evaluation.reader import Reader
from refrag_lightning.evaluation.readings import Reading
from refrag_lightning.git_state import git_state, without_credentials
from refrag_lightning.text.batch import RowTrace
from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Segment, render_chat
from refrag_lightning.training import wandb_run
from refrag_lightning.training.samples import Sample, documents_shown, expanded

pytest.importorskip("wandb")

ROOT = Path(__file__).parents[2]
TOY = {
    "model": {"class_path": "tests.training.toy.ToyModule", "init_args": {"lr": 0.01}},
    "data": {"class_path": "tests.training.toy.ToyDataModule", "init_args": {"batch_size": 4}},
    "trainer": {
        "max_steps": 6,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    },
    "name": "toy",
    "export": False,
    "save_every": 2,
}


@pytest.fixture(scope="module")
def wandb_home(tmp_path_factory):
    """Where W&B keeps its own files; its service is started anew, so that it takes the place."""
    import wandb

    wandb.teardown()
    yield str(tmp_path_factory.mktemp("wandb-home"))
    wandb.teardown()


@pytest.fixture
def work(tmp_path, monkeypatch, wandb_home):
    """An empty current folder with a configuration, and no key anywhere."""
    import tests.training.toy  # noqa: F401  # so that short class names are known

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", wandb_home)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("AWS_BATCH_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    return tmp_path


class Written:
    """What an offline run's file holds.

    Its blocks of 32 KiB hold records as LevelDB's log does: a checksum, a length, and whether the
    record is whole (1) or begins (2), goes on (3) or ends (4) here.
    """

    def __init__(self, folder):
        from wandb.proto import wandb_internal_pb2

        (path,) = folder.glob("*.wandb")
        data = path.read_bytes()
        assert data[:4] == b":W&B"
        self.files = folder / "files"
        self.config, self.history, self.git, self.run_id = {}, [], None, None
        place, whole = 7, b""
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            _, size, kind = struct.unpack_from("<IHB", data, place) if left >= 7 else (0, 0, 0)
            if kind == 0:
                place += left
                continue
            whole += data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                whole = b""
                self._take(record)

    def _take(self, record):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run_id, self.git = record.run.run_id, record.run.git
            self.project, self.name = record.run.project, record.run.display_name
        updates = {"run": record.run.config, "config": record.config}.get(kind)
        for item in updates.update if updates is not None else ():
            self.config[item.key] = json.loads(item.value_json)
        if kind == "history":
            row = {}
            for item in record.history.item:
                keys = list(item.nested_key) or [item.key]
                inner = row
                for key in keys[:-1]:
                    inner = inner.setdefault(key, {})
                inner[keys[-1]] = json.loads(item.value_json)
            self.history.append({k: v for k, v in row.items() if not k.startswith("_")})

    def metrics(self):
        """The rows of numbers, by step, without what a clock says."""
        return [
            {k: v for k, v in row.items() if "tokens_per" not in k}
            for row in self.history
            if all(isinstance(value, int | float) for value in row.values())
        ]

    def tables(self, name):
        """The tables of that name, as lists of rows by column."""
        found = []
        for row in self.history:
            if name in row:
                table = json.loads((self.files / row[name]["path"]).read_text())
                found.append([dict(zip(table["columns"], r, strict=True)) for r in table["data"]])
        return found


def written(run):
    """What the offline runs of a run folder hold, the oldest first."""
    return [Written(path) for path in sorted((run / "wandb").glob("offline-run-*"))]


def logged(run):
    """The rows of metrics.csv, without what a clock says, as W&B has them."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {
            "trainer/global_step" if name == "step" else name: pytest.approx(float(value))
            for name, value in row.items()
            if value and "tokens_per" not in name
        }
        for row in rows
    ]


def equal(one, other):
    """Whether two checkpoints are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_a_run_is_the_same_with_and_without(work, monkeypatch):
    import wandb

    original = wandb.init

    def drawing(**options):
        # As if W&B or what it imports drew random numbers.
        random.random(), np.random.rand(), torch.rand(1)
        return original(**options)

    monkeypatch.setattr(wandb, "init", drawing)
    checkpoints, metrics = [], []
    for mode in ("off", "offline"):
        main(["fit", "--config", "toy.yaml", "--run_id", mode, "--wandb", mode])
        run = Path("runs/toy") / mode
        for name in ("last", "best"):
            saved = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)
            # Where the best one lies differs, and nothing else.
            best = saved["callbacks"]["Checkpoints"].pop("best_model_path")
            assert best == str(run / "checkpoints" / "best.ckpt")
            checkpoints.append(saved)
        metrics.append(logged(run))
    assert equal(checkpoints[0], checkpoints[2]) and equal(checkpoints[1], checkpoints[3])
    moved = {name: value + 1e-6 for name, value in checkpoints[0]["state_dict"].items()}
    assert not equal(checkpoints[0], checkpoints[0] | {"state_dict": moved})
    rows = [[{k: v.expected for k, v in row.items()} for row in part] for part in metrics]
    assert rows[0] == rows[1]
    (held,) = written(Path("runs/toy/offline"))
    assert held.metrics() == metrics[1]
    assert not Path("runs/toy/off/wandb").exists()


def test_an_offline_run_holds_what_was_set_the_commit_the_metrics_and_a_table(work, capfd):
    config = str(ROOT / "configs" / "tiny" / "sft_documents.yaml")
    sizes = ["--data.init_args.eval_examples", "6", "--data.init_args.batch_size", "4"]
    steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    # So fast that the model, which is random, writes something.
    steps += ["--trainer.log_every_n_steps", "1", "--model.init_args.lr", "0.3"]
    options = ["--run_id", "w", "--wandb", "auto", "--wandb_samples", "5"]
    main(["fit", "--config", config, *sizes, *steps, *options, "--test_after_fit", "false"])
    said = capfd.readouterr()
    run = Path("runs/tiny-sft-documents/w")
    (folder,) = (run / "wandb").glob("offline-run-*")
    lines = [line for line in said.out.splitlines() if "W&B" in line]
    assert lines == [
        "W&B:       offline, no key found (WANDB_API_KEY or `wandb login`), "
        f"`wandb sync {folder}` uploads it"
    ]
    assert "wandb:" not in said.out + said.err
    (held,) = written(run)
    assert (held.project, held.name) == ("refrag_lightning", "tiny-sft-documents/w")
    # Everything that was set.
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: held.config[key] for key in saved} == saved
    assert saved["model"]["init_args"]["max_new_tokens"] == 8
    # The commit, where this is a checkout.
    state = git_state(ROOT)
    if state is not None:
        assert held.git.commit == held.config["git"]["commit"] == state.commit
        assert held.config["git"]["dirty"] == state.dirty
        assert "@" not in held.git.remote_url
    # The metrics.
    assert held.metrics() == logged(run) and len(held.metrics()) == 3
    # The table: what the trained model answers to the first held-out questions.
    (table,) = held.tables("samples/val")
    assert [*table[0]] == [*Sample._fields]
    assert [row["read"] for row in table] == ["rows@4"] * 5 + ["rows@8"] * 5
    tokenizer = RefragTokenizer.from_pretrained(run / "model")
    reader = Reader(RefragModel.from_pretrained(run / "model").eval(), tokenizer)
    for row in table:
        assert row["question"].endswith("?") and row["expected"]
        texts = row["documents"].split("\n")
        assert len(texts) == 4 and texts[::2] == ["[1]", "[2]"]
        # The right answer is said in the documents alone.
        assert row["expected"] in row["documents"] and row["expected"] not in row["question"]
        rows = sum(
            len(document.row_sizes)
            for document in tokenizer.at(int(row["read"][5:])).pack([texts[1], texts[3]])
        )
        assert row["expanded"] == f"none of {rows} rows"
        assert row["answer"] == _asked(reader, row, Reading.parse(row["read"]))
    assert any(row["answer"] for row in table)


def _asked(reader, row, reading):
    """An answer to a row's question, through the evaluation's reader."""
    tokenizer = reader.tokenizer
    texts = row["documents"].split("\n")[1::2]
    message = "".join(f'<doc id="{n}">{text}</doc>' for n, text in enumerate(texts, 1))
    prompt = render_chat(
        tokenizer.decoder,
        [{"role": "user", "content": message + row["question"]}],
        header=tokenizer.header,
        footer=tokenizer.footer,
        add_generation_prompt=True,
    )
    (answer,) = reader.answers([prompt], reading, max_new_tokens=8)
    return answer


def test_an_evaluation_hands_over_its_answers(work, folder):
    lines = [
        {
            "id": f"q{n}",
            "question": f"Which place is number {n}?",
            "answers": [place, place.lower()],
            "passages": [{"id": "1", "title": "Places", "text": f"{n} is {place}.", "gold": True}],
        }
        for n, place in enumerate(["Paris", "Rome", "Oslo"])
    ]
    Path("q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = "--data.init_args.source.init_args.paths"
    model = ["--model", str(folder), "--model.init_args.num_draws", "20"]
    model += ["--model.init_args.rates", "[4]", "--model.init_args.max_new_tokens", "3"]
    options = ["--wandb", "offline", "--wandb_samples", "2", "--run_id", "e"]
    config = str(ROOT / "configs" / "eval" / "answers.yaml")
    main(["test", "--config", config, *model, source, "q.jsonl", *options])
    run = Path("runs/eval-answers/e_test")
    (held,) = written(run)
    (table,) = held.tables("samples/test")
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [(row["id"], row["read"]) for row in table] == [
        (f"q{n}", read) for n in range(2) for read in ("rows@4", "full", "cut@4", "none")
    ]
    for row in table:
        number = int(row["id"][1])
        assert row["answer"] == answers[number]["answers"][row["read"]]
        assert row["question"] == lines[number]["question"]
        assert row["documents"] == f"[1] Places\n{lines[number]['passages'][0]['text']}"
        assert row["expected"] == " | ".join(lines[number]["answers"])
    assert {row["read"]: row["expanded"] for row in table} == {
        "rows@4": "none of the rows",
        "full": "everything: the documents are read as text",
        "cut@4": "the documents are read as cut",
        "none": "no document is read",
    }
    # The report's tables go there as well.
    assert len(held.tables("report/Answers")) == 1


def test_what_was_expanded_is_told():
    texts = ["One two three.", "Four."]
    rows = [
        RowTrace(0, 0, "7", 0, 8, "vector"),
        RowTrace(1, 0, "7", 8, 14, "tokens"),
        RowTrace(2, 1, "9", 0, 5, "tokens"),
    ]
    assert expanded(rows, texts) == "2 of 3 rows: [7] three. … [9] Four."
    assert expanded(rows[:1], texts) == "none of 1 rows"
    assert expanded([], []) == "no document is read"
    assert expanded([], texts, as_text=True) == "everything: the documents are read as text"
    document = Segment("One two three.", "document", Document("One two three."))
    prompt = [Segment("[7]\n", "header"), document, Segment("\n", "footer"), Segment("?", "text")]
    assert documents_shown(prompt) == "[7]\nOne two three."


def test_a_run_that_goes_on_is_one_run_with_the_whole_curve(work, capsys):
    fit = ["fit", "--config", "toy.yaml", "--run_id", "r", "--wandb", "offline"]
    with pytest.raises(SystemExit):
        main([*fit, "--model.nan_at", "5"])
    main(fit)
    run = Path("runs/toy/r")
    first, second = written(run)
    assert first.run_id == second.run_id == (run / "wandb" / "run_id").read_text().strip()
    # Steps 4 and 5 come after the checkpoint: the first part has step 4, the second has it once.
    steps = [
        [row["trainer/global_step"] for row in part.metrics() if "train/loss" in row]
        for part in (first, second)
    ]
    assert steps == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert second.metrics() == logged(run)
    newest = max((run / "wandb").glob("offline-run-*"))
    assert f"`wandb sync {newest}`" in capsys.readouterr().out


def test_a_start_that_fails_and_a_line_that_breaks_are_told_once(work, monkeypatch, capsys):
    import wandb

    original = wandb.init

    def refusing(**options):
        if options.get("mode") != "disabled":
            raise RuntimeError("no\nservice")
        return original(**options)

    fit = ["fit", "--config", "toy.yaml", "--wandb", "offline"]
    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", refusing)
        main([*fit, "--run_id", "a"])
    out = capsys.readouterr().out
    line = "W&B:       could not start (RuntimeError: no service); the run goes on without it"
    assert out.count("W&B") == 1 and line in out
    calls = []

    class Breaking:
        dir = "wandb/files"

        def log(self, *args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                raise BrokenPipeError("gone")

        def finish(self, exit_code=None):
            raise AssertionError("a disabled run stands in its place")

    with monkeypatch.context() as patch:
        patch.setattr(wandb_run.WandbRun, "_start", lambda self: Breaking())
        main([*fit, "--run_id", "b"])
    out = capsys.readouterr().out
    assert out.count("W&B") == 1 and "stopped (BrokenPipeError: gone)" in out and len(calls) == 3
    assert logged(Path("runs/toy/a")) == [
        {k: v.expected for k, v in row.items()} for row in logged(Path("runs/toy/b"))
    ]


def test_without_the_package(work, monkeypatch, capsys):
    monkeypatch.setattr(wandb_run, "installed", lambda: False)
    fit = ["fit", "--config", "toy.yaml", "--trainer.max_steps", "1"]
    main([*fit, "--wandb", "auto"])
    line = "W&B:       not installed (pip install wandb); the run goes on without it"
    assert line in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*fit, "--wandb", "online"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: wandb is not installed: pip install wandb\n")


def test_where_a_key_may_be(tmp_path):
    file = tmp_path / "netrc"
    where = {"NETRC": str(file)}
    assert not wandb_run.has_key(where)
    file.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_run.has_key(where)
    assert not wandb_run.has_key(where | {"WANDB_BASE_URL": "https://wandb.example.com"})
    file.write_text("machine wandb.example.com login user password secret\n")
    assert wandb_run.has_key(where | {"WANDB_BASE_URL": "https://wandb.example.com"})
    file.write_text("nonsense\n")
    assert not wandb_run.has_key(where)
    assert wandb_run.has_key(where | {"WANDB_API_KEY": "x"})
    assert wandb_run.has_key(where | {"WANDB_IDENTITY_TOKEN_FILE": "x"})


def test_the_state_of_a_checkout(tmp_path, monkeypatch):
    def git(*words):
        names = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        command = ["git", "-C", str(tmp_path), *names, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_COMMIT", "c0ffee-dirty")
    assert git_state(tmp_path) == ("c0ffee", True, "")
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, False, "")
    git("remote", "add", "origin", "https://user:token@example.com/a/b.git")
    (tmp_path / "other").write_text("not tracked")
    assert git_state(tmp_path) == (commit, False, "https://example.com/a/b.git")
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path).dirty


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://example.com/a/b.git", "https://example.com/a/b.git"),
        ("https://token@example.com:8443/a/b?key=1#x", "https://example.com:8443/a/b"),
        ("https://user:pass@word@example.com/a", "https://example.com/a"),
        ("ssh://git@example.com/a", "ssh://example.com/a"),
        ("git@example.com:a/b.git", "git@example.com:a/b.git"),
        ("/srv/git/a.git", "/srv/git/a.git"),
        ("", ""),
    ],
)
def test_credentials_are_taken_out(url, clean):
    assert without_credentials(url) == clean
