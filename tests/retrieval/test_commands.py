import json

import pytest

from refrag_lightning.cli import main
from tests.test_cli import failure


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "seine.md").write_text("# Seine\n\nThe Seine flows through Paris.")
    (tmp_path / "rhine.txt").write_text("The Rhine comes from the Alps. It passes Basel.")
    return tmp_path


def run(capsys, *args):
    main(["index", *args])
    return capsys.readouterr().out


def test_build_search_info_verify(here, model_folder, capsys):
    words = ["--index", "ix", "--paths", "docs", "rhine.txt", "--model", model_folder]
    out = run(capsys, "build", *words, "--rates", "4", "8", "--out", "build.json")
    assert "2 documents: 2 new, 0 changed, 0 as before; 0 removed" in out
    assert "2 passages, " in out and " in ix" in out and "row states of 4 texts in" in out
    figures = json.loads((here / "build.json").read_text())
    assert (figures["encoded"], figures["embedded"]) == (4, 2) and figures["bytes"] > 0
    assert "nothing had to be computed" in run(capsys, "build", *words, "--rates", "4", "8")

    info = run(capsys, "info", "--index", "ix")
    assert "2 documents, 2 passages" in info and "split at 100 words, overlap 0" in info
    assert "row states at 4" in info and "row states at 8" in info and "tiny/encoder" in info
    parsed = json.loads(run(capsys, "info", "--index", "ix", "--json", "true"))
    assert [states["texts"] for states in parsed["states"]] == [2, 2]

    out = run(capsys, "search", "--index", "ix", "--question", "Where does the Rhine come from?")
    assert out.startswith("1. rhine.txt  rhine  (") and "comes from the Alps" in out
    words = ["--index", "ix", "--question", "Paris", "--model", model_folder, "--top_k", "1"]
    (hit,) = map(json.loads, run(capsys, "search", *words, "--json", "true").splitlines())
    assert hit["rank"] == 1 and hit["passage"]["document_id"] == "docs/seine.md"
    assert set(hit["ranks"]) <= {"bm25", "dense"}
    assert "nothing was found" in run(capsys, "search", "--index", "ix", "--question", "zebra")

    words = ["--index", "ix", "--model", model_folder, "--out", "verify.json"]
    out = run(capsys, "verify", *words)
    assert out.rstrip().endswith("all of it is right") and "2 texts compared, 0 different" in out
    assert json.loads((here / "verify.json").read_text())["problems"] == []


def test_failures_are_one_line(here, model_folder, capsys):
    assert failure(capsys, ["index", "info", "--index", "no"], code=1).startswith(
        "there is no index at 'no'; `python -m refrag_lightning index build --index no"
    )
    words = ["index", "build", "--index", "ix", "--paths"]
    assert failure(capsys, [*words, "missing.md"], code=1) == (
        "there is no file or folder 'missing.md'"
    )
    main([*words, "docs"])
    capsys.readouterr()
    words = ["index", "search", "--index", "ix", "--question", "x", "--method"]
    assert "needs --model or --embedder" in failure(capsys, [*words, "dense"], code=1)
    words = ["index", "verify", "--index", "ix", "--model", model_folder]
    assert failure(capsys, words, code=1).startswith(
        "the index 'ix' is not right: row states at 4: 1 texts have none"
    )
    assert not (here / "no").exists()
