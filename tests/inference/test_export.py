"""The export subcommand: what is written, that it is the same model, and what it never touches."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from refrag_lightning import RefragModel, RefragTokenizer, hub
from refrag_lightning.cli import main
from refrag_lightning.inference.export import ExportOptions, export_folder
from refrag_lightning.inference.mark import CARD, MARK
from refrag_lightning.model import PlainModel
from refrag_lightning.model.load import load
from tests.inference.exporting import (
    METRICS,
    PROMPT,
    ROUNDING,
    logits,
    trained_model,
    write_model,
    write_run,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a model that has a LoRA."""
    run = tmp_path_factory.mktemp("runs") / "sft" / "2026-01-31_12-00-00"
    return write_model(write_run(run, metrics=METRICS))


@pytest.fixture(scope="module")
def expected(run):
    """The logits of the run's model."""
    model, tokenizer = load(run)
    return logits(model, tokenizer)


def files(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def failure(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, args)])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1, error
    assert ended.value.code == 1
    return error


def test_a_copy_is_the_same_model(run, expected, tmp_path, capsys):
    (run / "model" / "answers.json").write_text("{}")
    (run / "model" / ".secret").write_text("token")
    (run / "model" / "LICENSE").write_text("mine")
    main(["export", "--model", str(run), "--out", str(tmp_path / "out")])
    assert f"folder  {tmp_path / 'out'}" in capsys.readouterr().out
    model, tokenizer = load(tmp_path / "out")
    assert torch.equal(logits(model, tokenizer), expected)
    before, after = files(run / "model"), files(tmp_path / "out")
    # Nothing that is not part of the model, and nothing new but the card and the mark.
    assert after.keys() == before.keys() - {"answers.json", ".secret"} | {CARD, MARK}
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert changed <= {"config.json"}
    assert os.listdir(tmp_path) == ["out"]
    for name in ("answers.json", ".secret", "LICENSE"):
        (run / "model" / name).unlink()


def test_no_folder_of_this_machine_is_told(run, tmp_path):
    # As folders written before had it.
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    assert config["decoder_config"]["_name_or_path"] == "tiny/decoder"
    cache = hub.resolve("tiny/decoder", weights=False).path
    config["decoder_config"]["_name_or_path"] = cache
    path.write_text(json.dumps(config))
    for number, options in enumerate(({}, {"full": True}, {"merge_lora": True})):
        out = tmp_path / str(number)
        export_folder(str(run), out, options=ExportOptions(**options))
        for name, content in files(out).items():
            for private in (cache, str(run), str(tmp_path), os.path.expanduser("~/")):
                assert private.encode() not in content, (name, private)


OFFLINE = """
import sys, torch
from refrag_lightning.model.load import load
for folder in sys.argv[2:]:
    model, tokenizer = load(folder)
    batch = tokenizer(sys.argv[1])
    with torch.no_grad():
        torch.save(model(**batch).logits, folder + ".pt")
    print(tokenizer.decode(model.generate(**batch, max_new_tokens=4, do_sample=False)[0]))
"""


@pytest.mark.slow
def test_full_folders_are_the_same_model_without_any_cache(run, expected, tmp_path):
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    flags = ["--model", str(run), "--full", "true"]
    main(["export", *flags, "--out", str(whole)])
    main(["export", *flags, "--out", str(merged), "--merge_lora", "true"])
    empty = tmp_path / "nothing"
    environment = {**os.environ, "REFRAG_CACHE": str(empty), "HF_HOME": str(empty)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", OFFLINE, PROMPT, str(whole), str(merged)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(f"{whole}.pt"), expected)
    difference = (torch.load(f"{merged}.pt") - expected).abs().max()
    assert difference < ROUNDING * expected.abs().max()
    model, tokenizer = load(run)
    tokens = model.generate(**tokenizer(PROMPT), max_new_tokens=4, do_sample=False)
    assert done.stdout == 2 * (tokenizer.decode(tokens[0]) + "\n")
    # No base was fetched or built on the way.
    assert not any(empty.rglob("*.safetensors"))
    assert (whole / "adapter").exists() and not (merged / "adapter").exists()


def test_a_full_folder_generates_under_the_bases_own_settings(tmp_path):
    model = trained_model()
    model.decoder.generation_config.eos_token_id = [2, 5]
    model.decoder.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path, full=True)
    settings = RefragModel.from_pretrained(tmp_path).decoder.generation_config
    assert settings.eos_token_id == [2, 5]
    assert settings.repetition_penalty == 1.5


def test_merging_the_adapter(run, expected, tmp_path):
    export_folder(str(run), tmp_path / "out", options=ExportOptions(merge_lora=True))
    model, tokenizer = load(tmp_path / "out")
    got = logits(model, tokenizer)
    assert (got - expected).abs().max() < ROUNDING * expected.abs().max()
    assert model.config.lora is None
    assert model.config.trained == ["projector", "encoder", "decoder"]
    assert not (tmp_path / "out" / "adapter").exists()
    # Another implementation of the sum, for a layer: W + alpha / r * B A.
    before = RefragModel.from_pretrained(run / "model")
    key = "model.layers.1.self_attn.q_proj"
    layer = before.decoder.get_submodule(key)
    update = layer.lora_B.default.weight @ layer.lora_A.default.weight
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored[f"decoder.{key}.weight"], layer.weight + 3 * update)
    assert "decoder.model.embed_tokens.weight" not in stored
    # And it counts: without it the model is another one.
    before.decoder.disable_adapters()
    assert (logits(before, tokenizer) - expected).abs().max() > 1


def test_merged_in_half_precision_is_rounded_once(run, tmp_path):
    for dtype in (None, "bfloat16"):
        options = ExportOptions(merge_lora=True, dtype=dtype)
        export_folder(str(run), tmp_path / str(dtype), options=options)
    whole = load_file(tmp_path / "None" / "model.safetensors")
    half = load_file(tmp_path / "bfloat16" / "model.safetensors")
    assert whole.keys() == half.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor.bfloat16(), half[name]), name


def test_the_decoder_alone(run, tmp_path):
    options = ExportOptions(decoder_only=True)
    notes = export_folder(str(run), tmp_path / "out", options=options)
    assert "decoder alone" in notes[0]
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    model, tokenizer = load(run)
    ids = tokenizer("The Seine flows.")["input_ids"]
    with torch.no_grad():
        expected = model.decoder(ids).logits
        got = decoder(ids).logits
    assert (got - expected).abs().max() < ROUNDING * expected.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids == (
        tokenizer.decoder("a b").input_ids
    )
    # It is a model that `load` takes, documents as text.
    plain, its = load(tmp_path / "out")
    assert isinstance(plain, PlainModel)
    assert its(PROMPT, expand="all")["input_ids"].tolist() == (
        tokenizer(PROMPT, expand="all")["input_ids"].tolist()
    )


@pytest.mark.parametrize("options", [{}, {"full": True}, {"max_shard_size": "200KB"}])
def test_a_causal_language_model_alone_keeps_its_type(tmp_path, options):
    model = PlainModel.from_pretrained("tiny/decoder")
    model.save_pretrained(tmp_path / "model", dtype="bfloat16")
    its = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    its.save_pretrained(tmp_path / "model")
    export_folder(str(tmp_path / "model"), tmp_path / "out", options=ExportOptions(**options))
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert second.dtype == torch.bfloat16
    for (name, one), two in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    is_sharded = len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert is_sharded is ("max_shard_size" in options)
    _, tokenizer = load(tmp_path / "out")
    assert tokenizer.settings == its.settings


def test_a_name_of_a_model_is_exported_too(tmp_path):
    export_folder("tiny/decoder", tmp_path / "out")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    second = AutoModelForCausalLM.from_pretrained(hub.resolve("tiny/decoder").path)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_another_type_and_shards(run, tmp_path):
    flags = ["--full", "true", "--dtype", "bfloat16", "--max_shard_size", "100KB"]
    main(["export", "--model", str(run), "--out", str(tmp_path / "out"), *flags])
    paths = list((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) > 3
    assert {t.dtype for path in paths for t in load_file(path).values()} == {torch.bfloat16}
    model = RefragModel.from_pretrained(tmp_path / "out")
    before = RefragModel.from_pretrained(run / "model")
    for (name, one), two in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two.bfloat16().to(one.dtype)), name


# ---- places ----------------------------------------------------------------------------------


def test_a_folder_that_no_export_wrote_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    error = failure(capsys, "--model", run, "--out", tmp_path / "out", "--full", "true")
    assert "is not empty and no export wrote it" in error
    assert files(tmp_path / "out") == {"thesis.txt": b"years of work"}
    failure(capsys, "--model", run, "--out", run / "model")
    (tmp_path / "file").write_text("")
    assert "is a file" in failure(capsys, "--model", run, "--out", tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_an_export_replaces_one_and_leaves_what_others_put_there(run, tmp_path):
    out = tmp_path / "out"
    export_folder(str(run), out)
    assert (out / "adapter").is_dir()
    (out / "LICENSE").write_text("mine")
    (out / "plots").mkdir()
    (out / "plots" / "em.png").write_bytes(b"png")
    export_folder(str(run), out, options=ExportOptions(decoder_only=True))
    names = {path.name for path in out.iterdir()}
    assert {"LICENSE", "plots", CARD, MARK, "model.safetensors", "tokenizer.json"} <= names
    # Nothing of the model that was there is left.
    gone = {"adapter", "refrag_tokenizer.json", "encoder_tokenizer", "decoder_tokenizer"}
    assert not gone & names
    assert "decoder alone" in (out / CARD).read_text()
    AutoModelForCausalLM.from_pretrained(out)


def test_a_card_changed_by_hand_stays(run, tmp_path, capsys):
    out = tmp_path / "out"
    export_folder(str(run), out)
    (out / CARD).write_text("# My model\n")
    for _ in range(2):
        main(["export", "--model", str(run), "--out", str(out), "--full", "true"])
        assert "was changed by hand and stays" in capsys.readouterr().out
        assert (out / CARD).read_text() == "# My model\n"
    (out / CARD).unlink()
    export_folder(str(run), out)
    assert "# out" in (out / CARD).read_text()


def test_an_interrupted_export_leaves_what_was_there(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_folder(str(run), out)
    before = files(out)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("refrag_lightning.inference.card.model_card", fail)
    for place in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            export_folder(str(run), place, options=ExportOptions(merge_lora=True))
    assert files(out) == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_export_of_an_export_knows_how_the_model_came_about(run, tmp_path):
    export_folder(str(run), tmp_path / "first")
    export_folder(str(tmp_path / "first"), tmp_path / "second", options=ExportOptions(full=True))
    first, second = (json.loads((tmp_path / n / MARK).read_text()) for n in ("first", "second"))
    assert first["history"]["stages"][0]["steps"] == 20
    assert second["history"] == first["history"]
    # In place, too.
    export_folder(str(tmp_path / "first"), tmp_path / "first", options=ExportOptions(full=True))
    assert json.loads((tmp_path / "first" / MARK).read_text())["history"] == first["history"]
    load(tmp_path / "first")


def test_everybody_may_read_the_files(run, tmp_path):
    export_folder(str(run), tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "out").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


# ---- refusals --------------------------------------------------------------------------------


def test_wrong_calls_are_one_line(run, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "nowhere to export to" in failure(capsys, "--model", run)
    assert "not found" in failure(capsys, "--model", tmp_path / "nowhere", *out)
    assert "dtype ('half-ish')" in failure(capsys, "--model", run, *out, "--dtype", "half-ish")
    error = failure(capsys, "--model", run, *out, "--full", "true", "--decoder_only", "true")
    assert "exclude each other" in error
    assert "must be a name on the Hub" in failure(
        capsys, "--model", run, *out, "--push_to_hub", "a/b/c"
    )
    assert os.listdir(tmp_path) == []


def test_without_a_lora_there_is_nothing_to_merge(tmp_path, capsys):
    write_model(tmp_path / "run", trained_model(lora=False))
    error = failure(
        capsys, "--model", tmp_path / "run", "--out", tmp_path / "out", "--merge_lora", "true"
    )
    assert "has no LoRA to merge" in error
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", ["adapter", "refrag_tokenizer.json", "model.safetensors"])
def test_a_folder_with_a_part_missing_is_refused(tmp_path, capsys, name):
    model = write_model(tmp_path / "run") / "model"
    (model / name).rename(tmp_path / name)
    error = failure(capsys, "--model", model, "--out", tmp_path / "out")
    assert ("*.safetensors" if name == "model.safetensors" else name) in error
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_unless_told_otherwise(tmp_path, capsys):
    run = write_model(tmp_path / "run")
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    found = config["decoder_revision"]
    config["decoder_revision"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(config))
    for flag in ("--full", "--merge_lora", "--decoder_only"):
        args = ("--model", run, "--out", tmp_path / flag, flag, "true")
        assert found in failure(capsys, *args)
        with pytest.warns(UserWarning, match="0000"):
            main(["export", *map(str, args), "--allow_base_mismatch", "true"])
    # It is the base that was found which the new folder is made with.
    for flag in ("--full", "--merge_lora"):
        exported = json.loads((tmp_path / flag / "config.json").read_text())
        assert exported["decoder_revision"] == found
    RefragModel.from_pretrained(tmp_path / "--merge_lora")


# ---- the Hub ---------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch):
    """What would have been sent: the call that made the repository, and the files."""
    sent = SimpleNamespace(created=None, files=None)

    def create_repo(name, **options):
        sent.created = (name, options)
        url = type("Url", (str,), {"repo_id": name})
        return url(f"https://huggingface.co/{name}")

    def upload_folder(*, repo_id, folder_path, commit_message):
        sent.files = files(folder_path)

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name: SimpleNamespace(private=True))
    return sent


def test_a_push_sends_the_folder_and_says_where_to(run, tmp_path, capsys, uploads):
    main(["export", "--model", str(run), "--push_to_hub", "me/mine"])
    assert uploads.created == ("me/mine", {"private": True, "exist_ok": True})
    assert capsys.readouterr().out.splitlines()[-1] == "sent to https://huggingface.co/me/mine"
    assert {CARD, "config.json", "model.safetensors"} <= uploads.files.keys()
    assert b"# me/mine" in uploads.files[CARD]
    for name, content in uploads.files.items():
        folder = tmp_path / "again" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_bytes(content)
    load(tmp_path / "again")


def test_a_push_that_fails_leaves_the_folder(run, tmp_path, capsys):
    # The tests run with HF_HUB_OFFLINE.
    args = ("--model", run, "--out", tmp_path / "out", "--push_to_hub", "me/mine")
    assert "me/mine could not be sent to the Hub" in failure(capsys, *args)
    load(tmp_path / "out")
