"""Runs of words that training texts share with test texts."""

import gzip
import json

import pytest

from refrag_lightning.data.overlap import OverlapCheck
from scripts.check_overlap import main

# Of 6 words each; runs of 4 are looked for.
GOLD = "The old river-bridge in Paris fell."
DISTRACTOR = "A quite different thing was said."
BOOK = (
    "It began.\n\nWe saw how the old, RIVER bridge\n\nin Paris looked.\n\nThe end of it all came."
)


def write(path, *records):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return str(path)


def question(*passages):
    return {"question": "?", "answers": ["x"], "extra": 1, "passages": list(passages)}


@pytest.fixture
def test_set(tmp_path):
    passages = [{"text": GOLD, "gold": True}, {"text": DISTRACTOR, "gold": False}]
    return write(tmp_path / "dev.jsonl.gz", question(*passages))


def test_counts(tmp_path, test_set):
    other = write(tmp_path / "other.jsonl", {"text": "Nothing that stands in any other place."})
    check = OverlapCheck([test_set, other], num_words=4)
    book = write(tmp_path / "book.jsonl", {"text": BOOK}, {"text": DISTRACTOR}, {"text": ""})
    found = check.overlaps(book)[test_set]
    # A run may cross the edge of a paragraph; a test question's distractors do not count.
    assert (found.texts, found.sharing) == (3, 1)
    assert found.runs == {
        ("the", "old", "river", "bridge"),
        ("old", "river", "bridge", "in"),
        ("river", "bridge", "in", "paris"),
    }
    assert not check.overlaps(book)[other].runs
    # Distractors of a training set do; a passage of two questions is one text.
    passage = {"text": "In the old river bridge.", "gold": False}
    train = write(tmp_path / "train.jsonl", question(passage), question(passage, {"text": "No."}))
    found = check.overlaps(train)[test_set]
    assert (found.texts, found.sharing, len(found.runs)) == (2, 1, 1)


def test_clean_copies(tmp_path, test_set):
    check = OverlapCheck([test_set], num_words=4)
    fine = {"id": "1", "text": "All is well here today.", "gold": True}
    shared = {"id": "2", "text": f"So: {GOLD}", "gold": False}
    train = write(
        tmp_path / "train.jsonl.gz",
        question(fine, shared),
        question(fine, {**shared, "gold": True}),
        question(fine),
    )
    copy = tmp_path / "copy.jsonl.gz"
    assert check.write_clean(train, copy) == (3, 1)
    with gzip.open(copy, "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [question(fine), question(fine)]
    assert not check.overlaps(str(copy))[test_set].sharing
    book = write(tmp_path / "b.jsonl", {"id": "b", "text": BOOK}, {"text": GOLD})
    assert check.write_clean(book, tmp_path / "b2.jsonl") == (2, 1)
    kept = json.loads((tmp_path / "b2.jsonl").read_text())
    assert kept == {"id": "b", "text": "It began.\n\nThe end of it all came."}
    with pytest.raises(FileExistsError):
        check.write_clean(book, tmp_path / "b2.jsonl")


def test_a_test_file_without_runs_is_an_error(tmp_path):
    path = write(tmp_path / "dev.jsonl", question({"text": GOLD}))
    with pytest.raises(ValueError, match=r"no gold passage\) of 13 words"):
        OverlapCheck([path])
    with pytest.raises(ValueError, match="at least 1 word, not 0"):
        OverlapCheck([path], 0)


def test_the_script(tmp_path, test_set, capsys):
    book = write(tmp_path / "book.jsonl", {"text": BOOK})
    options = ["--words", "4", "--clean", str(tmp_path / "c"), "--table", str(tmp_path / "t.md")]
    assert main([book, "--against", test_set, *options]) == 0
    out = capsys.readouterr().out
    assert "| book.jsonl | dev.jsonl.gz | 1 | 1 | 3 |" in out and "1 of 1 records" in out
    assert (tmp_path / "t.md").read_text() in out
    assert main([str(tmp_path / "none"), "--against", test_set]) == 1
    assert "error: " in capsys.readouterr().err
