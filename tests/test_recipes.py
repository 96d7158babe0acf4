"""The recipes of SmolLM2, Gemma 3, Llama 3.2 and Qwen3: their files, whole chains, on tiny models.

Small random models of the same architectures stand for those of the Hub, JSON lines for its data,
and a stage takes two optimiser steps. All else is as the files say, down to the precision.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM

from refrag_lightning import RefragModel, RefragTokenizer
from refrag_lightning.cli import main
from refrag_lightning.data import BiographyQuestions, PydocSource

ROOT = Path(__file__).parent.parent
STEPS = 2


class Recipe(NamedTuple):
    """A folder of configs/, and the tiny models that stand for its own."""

    folder: str
    encoder: str
    decoder: str


RECIPES = [
    Recipe("smollm2", "tiny/encoder", "tiny/decoder"),
    Recipe("gemma3_1b", "tiny/encoder-cased", "tiny/gemma"),
    Recipe("llama32_1b", "tiny/encoder-cased", "tiny/llama3"),
    # A causal model is the encoder too.
    Recipe("qwen3_06b", "tiny/qwen3", "tiny/qwen3"),
]

RUN = {
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": STEPS,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "data.init_args.num_workers": 0,
    "test_after_fit": False,
}
ALIGN = {
    "model.init_args.kld_start": 1,
    "data.init_args.batch_size": 4,
    "data.init_args.eval_pieces": 4,
}
PRETRAIN = {
    "data.init_args.min_rows": 1,
    "data.init_args.max_rows": 4,
    "data.init_args.num_stages": 2,
    "data.init_args.num_examples": 32,
    "data.init_args.continuation": 32,
    "data.init_args.eval_examples": 2,
    "data.init_args.eval_rows": "[2]",
    "data.init_args.tokens_per_batch": 2048,
    "data.init_args.line_length": 1024,
}
SFT = {
    "model.init_args.max_new_tokens": 4,
    "data.init_args.batch_size": 4,
    "data.init_args.eval_examples": 2,
}
TEXTS = {
    "data.init_args.source.init_args.paths": "texts.jsonl",
    "data.init_args.source.init_args.held_out": 0.2,
}
QUESTIONS = {
    "data.init_args.sources.init_args.source.init_args.paths": "questions.jsonl",
    "data.init_args.sources.init_args.source.init_args.held_out": 0.1,
}


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs in a folder with the configurations, and texts and questions as JSON lines."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    people = BiographyQuestions(num_groups=40, questions_a_group=1)
    files = {
        "texts": [{"text": text} for text in PydocSource(section=6000, limit=30).read()],
        "questions": [
            {
                "id": question.id,
                "question": question.question,
                "answers": question.answers,
                "passages": [vars(passage) for passage in question.passages],
            }
            for question in people.questions("train")
        ],
    }
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(command, configs, options):
    """Runs a subcommand on configuration files with options on top; returns its run folder."""
    arguments = [word for name in configs for word in ("--config", f"configs/{name}.yaml")]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    before = set(Path("runs").glob("*/*"))
    main([command, *arguments])
    (folder,) = set(Path("runs").glob("*/*")) - before
    return folder


def trained_parts(folder):
    """What a run's model folder holds of each part, with the decoder's adapter for the decoder."""
    model = RefragModel.from_pretrained(folder / "model")
    state = model.state_dict()
    adapter = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return {
        "projector": {k: v for k, v in state.items() if k.startswith("projector.")},
        "encoder": {k: v for k, v in state.items() if k.startswith("encoder.")},
        "decoder": adapter,
    }


def furthest(state, other):
    """The largest change of one number between two states of the same names."""
    assert state.keys() == other.keys() and state
    return max((state[name] - other[name]).abs().max().item() for name in state)


def went_on_from(folder, earlier, recipe, stage):
    """Each part has moved from where the earlier run left it, as far as two steps of AdamW can.

    A step of AdamW changes a number by no more than its learning rate, beside the weight decay
    (Kingma and Ba 2015, section 2.1, for these betas).
    """
    settings = yaml.safe_load(Path(f"configs/{recipe.folder}/{stage}.yaml").read_text())
    rates = settings["model"]["init_args"]["lr"]
    now, before = trained_parts(folder), trained_parts(earlier)
    for part, rate in rates.items():
        if part == "decoder" and not before[part]:
            # A new adapter: its second matrices begin at 0.
            assert any(tensor.any() for name, tensor in now[part].items() if "lora_B" in name)
            continue
        assert 0 < furthest(now[part], before[part]) < 1.1 * STEPS * rate, part


def base_encoder(path):
    return {f"encoder.{k}": v for k, v in AutoModel.from_pretrained(path).state_dict().items()}


def nll(folder):
    """Nats a token of each reading and model in a report."""
    table = json.loads((folder / "report.json").read_text())["tables"]["Answers"]
    return {row[0]: row[table["columns"].index("nll")]["value"] for row in table["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.folder for recipe in RECIPES])
def test_the_chain_runs_from_base_models_to_a_report(in_tmp, tiny_cache, recipe):
    settings = yaml.safe_load(Path(f"configs/{recipe.folder}/1_align.yaml").read_text())
    rates = settings["model"]["init_args"]["compression"]
    bases = {
        "model.init_args.encoder": recipe.encoder,
        "model.init_args.decoder": recipe.decoder,
    }

    def files(stage, *further):
        return [f"{recipe.folder}/{stage}", *further]

    align = run("fit", files("1_align", "data/jsonl"), RUN | TEXTS | ALIGN | bases)
    tokenizer = RefragTokenizer.from_pretrained(align / "model")
    assert list(tokenizer.rates) == sorted(rates) and tokenizer.compression == rates[0]
    aligned = trained_parts(align)
    started = base_encoder(tiny_cache[recipe.encoder])
    kept = {name: started[name] for name in aligned["encoder"]}
    settings = yaml.safe_load(Path(f"configs/{recipe.folder}/1_align.yaml").read_text())
    trains = "encoder" in settings["model"]["init_args"]["train"]
    assert (furthest(aligned["encoder"], kept) > 0) == trains and not aligned["decoder"]

    earlier = align
    for stage, data, options in (
        ("2_reconstruct", "data/jsonl", TEXTS | PRETRAIN),
        ("3_continue", "data/jsonl", TEXTS | PRETRAIN),
        ("4_sft", "data/questions", QUESTIONS | SFT),
    ):
        folder = run("fit", files(stage, data), RUN | options | {"model": earlier})
        went_on_from(folder, earlier, recipe, stage)
        earlier = folder
    sft = earlier

    model = RefragModel.from_pretrained(sft / "model")
    assert model.config.rates == sorted(rates)
    base = AutoModelForCausalLM.from_pretrained(tiny_cache[recipe.decoder])
    assert type(model.decoder) is type(base)
    bare = {k.replace(".base_layer.", "."): v for k, v in model.decoder.state_dict().items()}
    assert furthest({k: v for k, v in bare.items() if ".lora_" not in k}, base.state_dict()) == 0

    baselines = {}
    for read in ("text", "none"):
        options = {"data.init_args.read": read, "model.init_args.decoder": recipe.decoder}
        configs = files("4_sft", f"{recipe.folder}/baseline", "data/questions")
        baselines[read] = run("fit", configs, RUN | QUESTIONS | SFT | options)
        plain = AutoModelForCausalLM.from_pretrained(baselines[read] / "model")
        changed = {
            name.split(".")[-2]
            for name, tensor in plain.state_dict().items()
            if not torch.equal(tensor, base.state_dict()[name])
        }
        assert changed == set(model.config.lora["target_modules"])

    options = {
        "model": sft,
        "model.init_args.full_model": baselines["text"],
        "model.init_args.closed_model": baselines["none"],
        "model.init_args.max_new_tokens": 4,
        "model.init_args.num_draws": 20,
        "data.init_args.source.init_args.paths": "questions.jsonl",
        "data.init_args.limit": 6,
        "trainer.accelerator": "cpu",
    }
    report = run("test", ["eval/answers"], options)
    figures = nll(report)
    rated = [f"{kind}@{k}" for kind in ("rows", "cut", "other", "random", "zero") for k in rates]
    assert {*rated, "full", "none", "titles"} <= figures.keys() and len(figures) == len(rated) + 5
    assert all(math.isfinite(value) for value in figures.values())


def test_questions_in_json_lines_take_nothing_over_from_the_source_of_the_hub(in_tmp, capsys):
    """A class that is changed on top keeps settings of the same name: `answers: answers.text`."""
    for recipe in RECIPES:
        with pytest.raises(SystemExit):
            main(
                [
                    *("fit", "--config", f"configs/{recipe.folder}/4_sft.yaml"),
                    *("--config", "configs/data/questions.yaml", "--print_config"),
                ]
            )
        printed = yaml.safe_load(capsys.readouterr().out)
        source = printed["data"]["init_args"]["sources"]["init_args"]["source"]["init_args"]
        assert {name: source[name] for name in ("question", "answers", "passages", "limit")} == {
            "question": "question",
            "answers": "answers",
            "passages": "passages",
            "limit": None,
        }
