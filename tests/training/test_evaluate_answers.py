"""AnswerEvaluation and PerplexityEvaluation on tiny models, through the Trainer and the CLI."""

import json
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F

from refrag_lightning import RefragModel, RefragTokenizer
from refrag_lightning.cli import main
from refrag_lightning.data.question_batches import QuestionDataModule
from refrag_lightning.data.questions import JsonLinesQuestions
from refrag_lightning.evaluation.metrics import f1
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.training.evaluate_answers import AnswerEvaluation

PLACES = ["Paris", "Rome", "Oslo", "Bern", "Kyoto"]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {
            "id": str(n),
            "question": f"Which place is number {n}?",
            "answers": [place, place.lower()],
            "passages": [
                {"id": "1", "title": "Places", "text": f"Number {n} is {place}.", "gold": True},
                {"id": "2", "title": "Else", "text": f"Nothing of {n} is known.", "gold": False},
            ],
        }
        for n, place in enumerate(PLACES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _test(tmp_path, module, data):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.test(module, data, verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    return report, written


def _column(report, table, column):
    table = report["tables"][table]
    place = table["columns"].index(column)
    return {row[0]: row[place] for row in table["rows"]}


def test_every_reading_of_a_model_is_in_the_report(folder, tmp_path, lines):
    module = AnswerEvaluation(str(folder), max_new_tokens=4, num_draws=50)
    data = QuestionDataModule(
        JsonLinesQuestions(lines), prompt="{passages}{question}", batch_size=4
    )
    report, written = _test(tmp_path, module, data)
    nll = {name: cell["value"] for name, cell in _column(report, "Answers", "nll").items()}
    rated = [f"{kind}@{k}" for kind in ("rows", "cut", "other", "random", "zero") for k in (4, 8)]
    assert {*nll} == {*rated, "full", "none", "titles"}

    # Nats a token of the answers by plain forward passes, a question at a time.
    model, tokenizer = RefragModel.from_pretrained(folder), RefragTokenizer.from_pretrained(folder)
    nats = tokens = 0
    for n, place in enumerate(PLACES):
        text = f'<doc id="1" title="Places">Number {n} is {place}.</doc>'
        text += f'<doc id="2" title="Else">Nothing of {n} is known.</doc>'
        text += f"Which place is number {n}?"
        prompt = tokenizer.at(8).apply_chat([{"role": "user", "content": text}])
        answer = tokenizer.decoder(place, add_special_tokens=False)["input_ids"]
        embeds = torch.cat(
            [model.embed(prompt), model.get_input_embeddings()(torch.tensor([answer]))], dim=1
        )
        logits = model.decoder(inputs_embeds=embeds).logits[0, -len(answer) - 1 : -1]
        nats += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    assert nll["rows@8"] == pytest.approx(nats / tokens, rel=1e-4)

    assert [row["id"] for row in written] == [str(n) for n in range(5)]
    assert {*written[0]["answers"]} == {"rows@4", "rows@8", "full", "cut@4", "cut@8", "none"}
    by_hand = [
        max(f1(row["answers"]["full"], reference) for reference in row["references"])
        for row in written
    ]
    assert _column(report, "Answers", "f1")["full"]["value"] == pytest.approx(sum(by_hand) / 5)


def test_figures_do_not_depend_on_the_size_of_batches(folder, tmp_path, lines):
    tables = []
    for size in (1, 5):
        module = AnswerEvaluation(str(folder), rates=[4], generate=["rows"], max_new_tokens=3)
        data = QuestionDataModule(JsonLinesQuestions(lines), batch_size=size)
        report, _ = _test(tmp_path, module, data)
        cells = _column(report, "Answers", "nll")
        tables.append({name: cell["value"] for name, cell in cells.items()})
    assert tables[0] == pytest.approx(tables[1], rel=1e-4)


def test_a_plain_model_is_read_as_far_as_it_can_be(folder, tmp_path, lines):
    PlainModel.from_pretrained("tiny/decoder").save_pretrained(tmp_path / "plain")
    RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1).save_pretrained(
        tmp_path / "plain"
    )
    module = AnswerEvaluation(str(tmp_path / "plain"), rates=[4], max_new_tokens=2, num_draws=50)
    report, _ = _test(tmp_path, module, QuestionDataModule(JsonLinesQuestions(lines)))
    nll = _column(report, "Answers", "nll")
    assert {*nll} == {"full", "cut@4", "none", "titles"}
    assert report["settings"]["left out"].startswith("rows@4, other@4, random@4, zero@4")

    # As baselines beside the model whose decoder it is: the same numbers as the model's own.
    module = AnswerEvaluation(
        str(folder),
        full_model=str(tmp_path / "plain"),
        closed_model=str(tmp_path / "plain"),
        readings=["rows@4", "full", "none"],
        generate=[],
        num_draws=50,
    )
    report, _ = _test(tmp_path, module, QuestionDataModule(JsonLinesQuestions(lines)))
    both = {name: cell["value"] for name, cell in _column(report, "Answers", "nll").items()}
    assert both["full-text baseline"] == pytest.approx(both["full"], rel=1e-4)
    assert both["closed-book baseline"] == pytest.approx(both["none"], rel=1e-4)
    assert both["full"] == pytest.approx(nll["full"]["value"], rel=1e-4)


def test_bad_settings_are_named(folder, tmp_path, lines):
    with pytest.raises(ValueError, match="no reading 'ful'"):
        AnswerEvaluation("anywhere", readings=["ful"])
    with pytest.raises(ValueError, match=r"max_new_tokens \(0\)"):
        AnswerEvaluation("anywhere", max_new_tokens=0)
    module = AnswerEvaluation(str(folder), rates=[5])
    with pytest.raises(ValueError, match=r"rates \(\[5\]\) are not among the model's \(\[4, 8\]\)"):
        _test(tmp_path, module, QuestionDataModule(JsonLinesQuestions(lines)))
    module = AnswerEvaluation(str(folder), full_model="tiny/gemma")
    with pytest.raises(ValueError, match=r"full_model \(tiny/gemma\) has another tokenizer"):
        _test(tmp_path, module, QuestionDataModule(JsonLinesQuestions(lines)))
    # A baseline that would be loaded and not be read.
    module = AnswerEvaluation(str(folder), closed_model=str(folder), readings=["full"], generate=[])
    with pytest.raises(ValueError, match=r"closed_model .* needs 'none' among the readings"):
        _test(tmp_path, module, QuestionDataModule(JsonLinesQuestions(lines)))


def test_a_baseline_of_another_header_is_refused(folder, tmp_path, lines):
    model, tokenizer = RefragModel.from_pretrained(folder), RefragTokenizer.from_pretrained(folder)
    model.save_pretrained(tmp_path / "other")
    tokenizer.header = "Document {id}: {title}\n"
    tokenizer.save_pretrained(tmp_path / "other")
    other, data = str(tmp_path / "other"), QuestionDataModule(JsonLinesQuestions(lines))
    options = {"readings": ["full", "none"], "generate": [], "num_draws": 50}
    with pytest.raises(ValueError, match=r"full_model .* has another header or footer"):
        _test(tmp_path, AnswerEvaluation(str(folder), full_model=other, **options), data)
    # Without documents there are no headers.
    report, _ = _test(tmp_path, AnswerEvaluation(str(folder), closed_model=other, **options), data)
    nll = {name: cell["value"] for name, cell in _column(report, "Answers", "nll").items()}
    assert nll["closed-book baseline"] == pytest.approx(nll["none"], rel=1e-6)


def test_one_question_alone_is_measured_unless_a_control_needs_another(folder, tmp_path, lines):
    data = QuestionDataModule(JsonLinesQuestions(lines, limit=1))
    module = AnswerEvaluation(str(folder), readings=["rows", "zero"], generate=[], num_draws=50)
    report, _ = _test(tmp_path, module, data)
    assert {*_column(report, "Answers", "nll")} == {"rows@4", "rows@8", "zero@4", "zero@8"}
    module = AnswerEvaluation(str(folder), readings=["rows", "other"], generate=[])
    with pytest.raises(ValueError, match="needs another question that has documents"):
        _test(tmp_path, module, data)


@pytest.mark.parametrize("name", ["biographies", "perplexity"])
def test_configurations_run_from_the_command_line(name, folder, tmp_path, monkeypatch, capsys):
    config = Path(__file__).parents[2] / "configs" / "eval" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    small = {
        "biographies": ["source.init_args.eval_groups=2", "source.init_args.questions_a_group=2"],
        "perplexity": ["contexts=[32,64]", "continuations=[4,8]", "num_windows=3"],
    }[name]
    options = [f"--data.init_args.{option}" for option in small]
    options += ["--trainer.accelerator=cpu", "--model.init_args.num_draws=50"]
    main(["test", "--config", str(config), "--model", str(folder), *options])
    (run,) = (tmp_path / "runs" / f"eval-{name}").iterdir()
    report = json.loads((run / "report.json").read_text())
    first = {"biographies": "Answers", "perplexity": "Log-perplexity"}[name]
    assert first in report["tables"]
    assert (run / "report.md").is_file() and list(run.glob("*.png"))
    assert "test/nll/rows@8" in (run / "metrics.csv").read_text().splitlines()[0]
    assert str(run / "report.md").removeprefix(f"{tmp_path}/") in capsys.readouterr().out


def test_a_question_that_the_decoder_has_no_room_for_is_named(folder, tmp_path, lines, monkeypatch):
    monkeypatch.setattr("refrag_lightning.model.refrag.num_positions", lambda model: 60)
    data = QuestionDataModule(JsonLinesQuestions(lines), prompt="{passages}{question}")
    options = {"readings": ["none", "full"], "generate": ["none"], "max_new_tokens": 4}
    module = AnswerEvaluation(str(folder), **options)
    with pytest.raises(ValueError, match=r"question '.', read as full, takes .* decoder has 60: g"):
        _test(tmp_path, module, data)
