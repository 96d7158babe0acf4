"""What run folders say of how a model came about."""

import json

import pytest

from refrag_lightning.inference.history import (
    History,
    describe,
    read_history,
    run_of,
    short_name,
)
from tests.inference.exporting import METRICS, write_report, write_run


def test_a_run_says_what_it_did(tmp_path):
    run = write_run(tmp_path / "runs" / "sft" / "2026-01-31_12-00-00", metrics=METRICS)
    history = read_history(run)
    (stage,) = history.stages
    assert history.complete and history.reports == []
    assert (stage.name, stage.module) == ("sft", "SFTModule")
    assert stage.data == "SFTDataModule (QuestionConversations (HubQuestions (rajpurkar/squad)))"
    assert (stage.encoder, stage.decoder) == ("tiny/encoder", "tiny/decoder")
    # Step 19 is the twentieth; the validation before the first step is none.
    assert (stage.steps, stage.tokens) == (20, 1600)
    assert stage.figures == {"val/loss": 1.25, "val/em@4": 0.5}
    assert stage.options == {
        "lr": {"projector": 1e-4},
        "batch_size": 4,
        "precision": "32-true",
        "seed": 1234,
    }


def test_a_run_without_metrics_has_no_steps(tmp_path):
    (stage,) = read_history(write_run(tmp_path / "runs" / "sft" / "one")).stages
    assert (stage.steps, stage.tokens, stage.figures) == (None, None, {})


@pytest.mark.parametrize("named", ["there", "model", "moved"])
def test_the_runs_before_are_found(tmp_path, monkeypatch, named):
    runs = tmp_path / "runs"
    align = write_run(runs / "align" / "1", module="AlignmentModule", metrics=METRICS)
    init_from = {
        "there": align,
        "model": align / "model",
        "moved": "/somewhere/else/runs/align/1",
    }[named]
    sft = write_run(runs / "sft" / "2", init_from=init_from)
    monkeypatch.chdir(tmp_path)
    history = read_history(sft)
    assert [stage.module for stage in history.stages] == ["AlignmentModule", "SFTModule"]
    assert history.complete
    assert history.stages[1].began_from == "align/1"
    assert history.stages[1].encoder is None  # the settings' default, which was not used


def test_the_run_of_the_decoder_counts(tmp_path):
    runs = tmp_path / "runs"
    text = write_run(runs / "text" / "1", encoder=None, metrics=METRICS)
    align = write_run(runs / "align" / "1", module="AlignmentModule", decoder=text / "model")
    history = read_history(align)
    assert [stage.name for stage in history.stages] == ["text", "align"]
    assert (history.stages[0].encoder, history.stages[0].decoder) == (None, "tiny/decoder")
    assert (history.stages[1].encoder, history.stages[1].decoder) == ("tiny/encoder", "text/1")
    assert history.complete


def test_a_run_before_that_is_gone_is_said_to_be(tmp_path):
    run = write_run(tmp_path / "runs" / "sft" / "2", init_from="runs/align/1")
    history = read_history(run)
    assert not history.complete
    assert [stage.began_from for stage in history.stages] == ["align/1"]


def test_runs_in_a_circle_end(tmp_path):
    first, second = tmp_path / "runs" / "a" / "1", tmp_path / "runs" / "b" / "1"
    write_run(first, init_from=second)
    write_run(second, init_from=first)
    assert [stage.name for stage in read_history(second).stages] == ["a", "b"]


def test_reports_on_the_run_and_no_others(tmp_path):
    runs = tmp_path / "runs"
    run = write_run(runs / "sft" / "2")
    write_report(runs / "eval-answers" / "1", "runs/sft/2")
    write_report(runs / "eval-answers" / "2", run / "model", full_model="/home/me/x", title="b")
    write_report(runs / "eval-answers" / "3", "runs/sft/1")
    reports = read_history(run).reports
    assert len(reports) == 2
    for report in reports:
        # The others name folders of this machine.
        assert report["settings"] == {"questions": 200, "split": "test"}
        assert list(report["tables"]) == ["Answers"]


def test_it_survives_a_file(tmp_path):
    run = write_run(tmp_path / "runs" / "sft" / "2", init_from="runs/align/1", metrics=METRICS)
    write_report(run, run)
    history = read_history(run)
    assert len(history.reports) == 1
    assert History.from_data(json.loads(json.dumps(history.data()))) == history


@pytest.mark.parametrize("text", ["a: [1", "just words", b"\xff"])
def test_settings_that_cannot_be_read_are_an_error(tmp_path, text):
    run = write_run(tmp_path / "runs" / "sft" / "2")
    path = run / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_history(run)


def test_a_model_folder_knows_its_run(tmp_path):
    run = write_run(tmp_path / "runs" / "sft" / "2")
    (run / "model").mkdir()
    assert run_of(run / "model") == run
    (tmp_path / "model").mkdir()
    assert run_of(tmp_path / "model") is None
    assert run_of(run) is None


def test_files_of_a_source_are_named_without_their_folders():
    source = {
        "class_path": "refrag_lightning.data.JsonLinesSource",
        "init_args": {"paths": ["/home/me/books.jsonl.gz", "/home/me/web/*.jsonl"]},
    }
    mixture = {"class_path": "a.b.Many", "init_args": {"sources": {"x": [source], "y": None}}}
    assert describe(mixture) == "Many (JsonLinesSource (books.jsonl.gz, *.jsonl))"
    assert describe({"class_path": "refrag_lightning.data.PydocSource"}) == "PydocSource"
    assert describe(None) == "unknown"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/sft/2026", "sft/2026"),
        ("/home/me/runs/sft/2026/model", "sft/2026"),
        ("owner/name", "owner/name"),
        ("name", "name"),
        ("../base", "base"),
    ],
)
def test_short_names(path, name):
    assert short_name(path) == name
