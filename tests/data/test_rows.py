import gzip
import os

import pytest

from refrag_lightning.data import JsonLinesConversations, JsonLinesQuestions, JsonLinesSource
from refrag_lightning.data.rows import field_of, json_rows, matching_files


def test_files_come_in_the_order_of_the_patterns_and_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    found = matching_files([str(tmp_path / "c.*"), str(tmp_path / "*.jsonl")])
    assert [file.rsplit("/", 1)[1] for file in found] == ["c.txt", "a.jsonl", "b.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*none\*'"):
        matching_files(str(tmp_path / "none*"))


def test_rows_of_different_forms_and_empty_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"b": ["x", {"c": null}]}\n', encoding="utf-8")
    assert list(json_rows(str(path))) == [
        (f"row 1 of {str(path)!r}", {"a": 1}),
        (f"row 3 of {str(path)!r}", {"b": ["x", {"c": None}]}),
    ]


@pytest.mark.parametrize(
    "content",
    [b"no gzip at all\n", gzip.compress(b'{"a": 1}\n' * 99)[:30], gzip.compress(b"\xff")],
    # What gzip writes holds its time: it would name the tests anew in each process.
    ids=["no gzip", "cut off", "no UTF-8"],
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz' cannot be read as JSON lines"):
        list(json_rows(str(path)))


def test_fields_and_fields_within_fields():
    row = {"a": {"b": 1}, "a.c": 2}
    assert field_of(row, "a.b", "row 1") == 1
    assert field_of(row, "a.c", "row 1") == 2
    for path in ("a.d", "a.b.c", "x"):
        with pytest.raises(ValueError, match=f"row 1 has no field '{path}'"):
            field_of(row, path, "row 1")


@pytest.mark.parametrize(
    "value",
    ["[" * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000, "[" * 500 + "]" * 500],
    ids=["open", "deep", "rather deep"],
)
def test_deep_nesting_is_named(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' + "[" * 99 + "]" * 99 + '}\n{"a": ' + value + "}\n")
    rows = json_rows(str(path))
    assert next(rows)[0].startswith("row 1 of")
    with pytest.raises(ValueError, match=r"row 2 of '.*rows\.jsonl' is nested more than 100 deep"):
        next(rows)


def test_numbers_without_end_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' + "9" * 10_000 + "}\n")
    with pytest.raises(ValueError, match=r"row 1 of '.*rows\.jsonl' is no JSON: "):
        list(json_rows(str(path)))


@pytest.mark.parametrize("kind", [JsonLinesSource, JsonLinesQuestions, JsonLinesConversations])
def test_every_source_has_limits_and_opens_no_fifo(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "' + "x" * 1_500_000 + '"}\n')
    with pytest.raises(ValueError, match=r"longer than 1 million .*raise max_mb"):
        list(kind(str(path), max_mb=1).read())
    os.mkfifo(tmp_path / "fifo.jsonl")
    with pytest.raises(ValueError, match=r"fifo\.jsonl' is a FIFO"):
        list(kind(str(tmp_path / "f*.jsonl")).read())
