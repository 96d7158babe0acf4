"""The generate subcommand, through the command line."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refrag_lightning import RefragModel, RefragTokenizer, hub
from refrag_lightning.cli import main
from refrag_lightning.model import PlainModel

PROMPT = 'Where? <doc id="1" title="Rivers">The Seine flows through Paris.</doc> Answer:'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a model on a decoder of its own, which a test may change."""
    run = tmp_path_factory.mktemp("run")
    base = run / "base"
    shutil.copytree(hub.resolve("tiny/decoder", weights=False).path, base)
    torch.manual_seed(0)
    shape = {"compression": 4, "context": "document"}
    model = RefragModel.from_encoder_decoder("tiny/encoder", str(base), **shape)
    tokenizer = RefragTokenizer.from_encoder_decoder("tiny/encoder", str(base), **shape)
    model.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    return run


def _failure(capsys, args):
    with pytest.raises(SystemExit) as ended:
        main(["generate", *args])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    return ended.value.code, error


@pytest.mark.parametrize("expand", ["none", "all"])
def test_it_prints_the_greedy_answer_alone(folder, capsys, expand):
    options = ["--prompt", PROMPT, "--max_new_tokens", "6", "--expand", expand]
    main(["generate", "--model", str(folder), *options])
    model = RefragModel.from_pretrained(folder / "model")
    tokenizer = RefragTokenizer.from_pretrained(folder / "model")
    batch = tokenizer(PROMPT, expand=expand)
    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(tokens[0]).strip() + "\n"


def test_a_causal_language_model_alone_reads_documents_as_text(tmp_path, capsys):
    model = PlainModel.from_pretrained("tiny/decoder")
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ["--prompt", PROMPT, "--max_new_tokens", "6", "--expand", "all"]
    main(["generate", "--model", str(tmp_path), *options])
    batch = tokenizer(PROMPT, expand="all")
    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(tokens[0]).strip() + "\n"
    code, error = _failure(capsys, ["--model", str(tmp_path), "--prompt", PROMPT])
    assert code == 1 and "expand='all'" in error


def test_chat_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    model_folder = str(folder / "model")
    main(["generate", "--model", model_folder, "--chat", "true", "--max_new_tokens", "3"])
    model = RefragModel.from_pretrained(folder / "model")
    tokenizer = RefragTokenizer.from_pretrained(folder / "model")
    batch = tokenizer.apply_chat([{"role": "user", "content": PROMPT}])
    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(tokens[0]).strip() + "\n"


def test_sampling_goes_by_the_seed(folder, capsys):
    def answer(seed):
        options = ["--max_new_tokens", "8", "--temperature", "50", "--seed", seed]
        main(["generate", "--model", str(folder), "--prompt", PROMPT, *options])
        return capsys.readouterr().out

    assert answer("1") == answer("1") != answer("2")


def test_a_broken_document_is_one_line(folder, capsys):
    code, error = _failure(capsys, ["--model", str(folder), "--prompt", "Where?\n <doc id=1>The"])
    assert code == 1
    assert "<doc> is never closed at line 2, column 2" in error


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--model", "nowhere"], 1, "'nowhere' is no model folder: there is no such folder"),
        (["--modle", "x"], 2, "there is no option '--modle', did you mean '--model'?"),
        (["--model", "x", "--expand", "some"], 2, "expand: expected one of"),
        ([], 2, "--model must be given"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, args, code, message):
    got, error = _failure(capsys, [*args, "--prompt", "a"])
    assert got == code
    assert message in error


def test_another_base_is_refused_in_one_line(folder, capsys):
    weights = Path(folder) / "base" / "model.safetensors"
    before = load_file(weights)
    changed = dict(before)
    name = next(iter(changed))
    changed[name] = changed[name] + 1
    save_file(changed, weights, metadata={"format": "pt"})
    try:
        code, error = _failure(capsys, ["--model", str(folder), "--prompt", PROMPT])
        assert code == 1
        assert "sha256:" in error and str(folder / "base") in error
    finally:
        save_file(before, weights, metadata={"format": "pt"})
