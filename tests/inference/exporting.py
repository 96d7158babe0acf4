"""A trained run and its model, made by hand, for the tests of exporting."""

import csv
import json

import torch
import yaml

from refrag_lightning import RefragModel, RefragTokenizer

PROMPT = 'Where? <doc id="1" title="Rivers">The Seine flows through Paris.</doc> Answer:'
# A merged LoRA adds in another order: float32 rounds at 6e-8, in sums of 64 to 128 numbers in each
# of two layers. The largest difference seen was 1.1e-5 of the largest logit.
ROUNDING = 3e-5
SHAPE = {"compression": 4, "rates": [4, 8], "pooling": "concat", "context": "document"}


def trained_model(*, lora=True, parts=("projector", "encoder"), **shape):
    """A model on the tiny pair whose trained parts are far from their start."""
    torch.manual_seed(0)
    model = RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", **{**SHAPE, **shape})
    if lora:
        model.set_trainable([*parts, "decoder"], lora={"r": 2, "alpha": 6})
    else:
        model.set_trainable(parts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if "lora" in name else 0.05)
    return model


def its_tokenizer(**shape):
    return RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", **{k: v for k, v in SHAPE.items() if k != "pooling"} | shape
    )


def write_model(run, model=None):
    """A run folder's `model/`."""
    model = trained_model() if model is None else model
    model.save_pretrained(run / "model")
    its_tokenizer().save_pretrained(run / "model")
    return run


def logits(model, tokenizer, prompt=PROMPT):
    with torch.no_grad():
        return model(**tokenizer(prompt)).logits


def write_run(
    run,
    *,
    module="SFTModule",
    encoder="tiny/encoder",
    decoder="tiny/decoder",
    init_from=None,
    metrics=(),
    **settings,
):
    """A run folder's config.yaml and metrics.csv, as `fit` writes them."""
    run.mkdir(parents=True, exist_ok=True)
    config = {
        "seed_everything": 1234,
        "trainer": {"precision": None},
        "name": run.parent.name,
        "model": {
            "class_path": f"refrag_lightning.training.{module}",
            "init_args": {
                "encoder": encoder,
                "decoder": str(decoder),
                "init_from": None if init_from is None else str(init_from),
                "lr": {"projector": 1.0e-4},
                "lora": None,
            },
        },
        "data": {
            "class_path": "refrag_lightning.data.SFTDataModule",
            "init_args": {
                "sources": {
                    "class_path": "refrag_lightning.data.QuestionConversations",
                    "init_args": {
                        "source": {
                            "class_path": "refrag_lightning.data.HubQuestions",
                            "init_args": {"name": "rajpurkar/squad", "config": None},
                        }
                    },
                },
                "batch_size": 4,
            },
        },
        **settings,
    }
    (run / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + yaml.safe_dump(config))
    if metrics:
        names = list(dict.fromkeys(name for row in metrics for name in row))
        with (run / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(metrics)
    return run


METRICS = [
    {"epoch": 0, "step": 0, "val/loss": 9.5},
    {"epoch": 0, "step": 9, "train/loss": 2.5, "train/tokens": 800.0},
    {"epoch": 0, "step": 19, "train/loss": 2.0, "train/tokens": 1600.0},
    {"epoch": 0, "step": 19, "val/loss": 1.25, "val/em@4": 0.5, "val/tokens_per_second": 800},
]


def write_report(folder, run, **settings):
    """An evaluation's run folder with a report on a run."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "title": "Questions answered from compressed documents",
        "settings": {"questions": 200, "model": str(run), "split": "test", **settings},
        "tables": {
            "Answers": {
                "columns": ["reading", "nll", "em"],
                "rows": [
                    ["rows@4", {"value": 1.5, "low": 1.25, "high": 1.75}, 0.5],
                    ["none", {"value": 3.0, "low": None, "high": None}, None],
                ],
                "notes": ["Greedy answers."],
            }
        },
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder
