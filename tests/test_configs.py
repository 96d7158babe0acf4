"""Every configuration file: it parses, opens with its commands, and the tiny ones run."""

import csv
import shlex
from pathlib import Path

import pytest
import yaml

from refrag_lightning import RefragModel, RefragTokenizer
from refrag_lightning.cli import main
from refrag_lightning.training import AlignmentModule

ROOT = Path(__file__).parent.parent
# A chain of runs is no configuration of one: tests/launch/test_chain.py has those.
CONFIGS = [
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "chains"
]
NAMES = [str(path.relative_to(ROOT)) for path in CONFIGS]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs and relative paths in an empty folder that has the configurations."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _commands(text):
    """The commands in a file's opening comment; an indented line goes on with the one before."""
    commands = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words = line.lstrip("# ")
        if words.startswith("python -m refrag_lightning"):
            commands.append(words)
        elif commands and line.startswith("#       "):
            commands[-1] += " " + words
    return commands


@pytest.mark.parametrize("name", NAMES)
def test_every_command_at_its_head_parses(name, in_tmp, capsys):
    commands = _commands((ROOT / name).read_text())
    assert commands, f"{name} does not open with a command"
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(command)[3:], "--print_config"])
        assert ended.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["class_path"].startswith("refrag_lightning.")


def test_every_command_of_the_recipes_page_parses(in_tmp, capsys):
    text = (ROOT / "docs" / "recipes.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("python -m refrag_lightning")]
    assert len(commands) > 10
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(command)[3:], "--print_config"])
        if command.split()[3] == "generate":
            # It has no configuration to print; the options before it were understood.
            assert "print_config" in capsys.readouterr().err, command
            continue
        # A run's own config.yaml is not there.
        missing = "runs/smollm2-sft/RUN/config.yaml" in command
        assert ended.value.code == (2 if missing else 0), command
        capsys.readouterr()


def test_the_mixture_of_the_recipes_page_goes_into_a_copy_of_a_recipe(in_tmp, capsys):
    text = (ROOT / "docs" / "recipes.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    block = yaml.safe_load(next(block for block in blocks if "sources:" in block))
    recipe = yaml.safe_load((ROOT / "configs/smollm2/4_sft.yaml").read_text())
    recipe["data"]["init_args"] |= block["data"]["init_args"]
    Path("mixture.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "mixture.yaml", "--print_config"])
    assert ended.value.code == 0
    sources = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["sources"]
    assert [source["weight"] for source in sources] == [0.5, 1.0]


def _rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def _fit(*options):
    before = set(Path("runs/tiny-align").glob("*"))
    main(["fit", "--config", "configs/tiny/align.yaml", *options])
    (folder,) = set(Path("runs/tiny-align").glob("*")) - before
    return folder


def test_tiny_align_runs_and_its_folder_generates(in_tmp):
    folder = _fit("--validate_first", "true", "--test_after_fit", "true")
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "model"} <= names
    columns = set().union(*(row.keys() for row in _rows(folder)))
    for split in ("train", "val"):
        figures = ("loss", "mse", "kld", "explained_variance", "top1", "nearest")
        figures += ("coverage", "granularity", "tokens_per_second")
        assert {f"{split}/{figure}" for figure in figures} <= columns
    first, last = ([r for r in _rows(folder) if r["val/kld"]][place] for place in (0, -1))
    assert float(last["val/kld"]) < float(first["val/kld"])

    model = RefragModel.from_pretrained(folder / "model")
    tokenizer = RefragTokenizer.from_pretrained(folder / "model")
    batch = tokenizer(["Where? <doc>The Seine flows through Paris.</doc> Answer:"])
    tokens = model.generate(**batch, max_new_tokens=5, min_new_tokens=5)
    assert len(tokenizer.batch_decode(tokens)) == 1 and tokens.shape == (1, 5)


@pytest.mark.parametrize(
    "options",
    [
        ["--data.init_args.num_workers", "2"],
        [
            "--data.init_args.streaming=true",
            "--data.init_args.num_workers=2",
            "--data.init_args.shuffle_block=16",
        ],
        ["--model.init_args.train=[projector,encoder,decoder]", "--model.init_args.lora={r: 2}"],
    ],
    ids=["workers", "streaming", "lora"],
)
def test_alignment_resumed_in_mid_epoch_goes_on_bit_for_bit(in_tmp, monkeypatch, options):
    options = [*options, "--trainer.log_every_n_steps", "1", "--save_every", "5"]
    options += ["--trainer.val_check_interval", "6", "--trainer.max_steps", "12"]
    whole = _fit(*options)

    step = AlignmentModule.training_step

    def breaks_at_7(self, batch, batch_idx):
        if self.global_step == 7:
            raise ValueError("broken off")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AlignmentModule, "training_step", breaks_at_7)
    before = set(Path("runs/tiny-align").glob("*"))
    with pytest.raises(SystemExit):
        _fit(*options)
    (broken,) = set(Path("runs/tiny-align").glob("*")) - before
    monkeypatch.setattr(AlignmentModule, "training_step", step)
    resumed = _fit(*options, "--ckpt_path", str(broken / "checkpoints" / "last.ckpt"))

    def later(folder):
        rows = [row for row in _rows(folder) if int(row["step"]) >= saved]
        names = [name for name in rows[0] if not name.endswith("tokens_per_second")]
        return [[row[name] for name in names] for row in rows]

    saved = min(int(row["step"]) for row in _rows(resumed))
    assert 0 < saved <= 7
    assert later(resumed) == later(whole)
    assert len(later(resumed)) >= 12 - saved
