import gzip
import json

import datasets
import pytest

from refrag_lightning.data.sources import HubSource, JsonLinesSource, PydocSource


def _write(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_pydoc_splits_are_disjoint_and_whole():
    source = PydocSource(held_out=0.1)
    train, val, test = (list(source.texts(split)) for split in ("train", "val", "test"))
    everything = list(source.read())
    assert sorted(train + val + test) == sorted(everything)
    assert len(val) == len(everything) // 10
    assert abs(len(test) - len(val)) <= 1


def test_pydoc_has_no_paragraph_twice():
    paragraphs = [p.strip() for text in PydocSource().read() for p in text.split("\n\n")]
    bare = [" ".join(p.split()) for p in paragraphs if p]
    assert len(bare) == len(set(bare))
    assert sum(map(len, bare)) > 250_000


def test_json_lines_gzipped_or_not(tmp_path):
    _write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two\nlines"}])
    _write(tmp_path / "b.jsonl.gz", [{"text": "three"}])
    source = JsonLinesSource([str(tmp_path / "a.jsonl"), str(tmp_path / "*.gz")])
    assert list(source.texts("train")) == ["one", "two\nlines", "three"]
    assert list(source.texts("val")) == []


def test_json_lines_limit_and_field(tmp_path):
    _write(tmp_path / "a.jsonl", [{"body": str(n)} for n in range(10)])
    source = JsonLinesSource(str(tmp_path / "a.jsonl"), field="body", limit=8, held_out=0.25)
    assert list(source.texts("train")) == ["0", "1", "4", "5"]
    assert list(source.texts("test")) == ["2", "6"]
    assert list(source.texts("val")) == ["3", "7"]


def test_json_lines_key_changes_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    _write(path, [{"text": "one"}])
    before = JsonLinesSource(str(path)).key()
    assert JsonLinesSource(str(path)).key() == before
    _write(path, [{"text": "another"}])
    assert JsonLinesSource(str(path)).key() != before


def test_json_lines_errors_name_the_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        list(JsonLinesSource(str(tmp_path / "nowhere.jsonl")).texts("train"))
    _write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": None}])
    with pytest.raises(ValueError, match=r"'text' in row 2 of '.*a\.jsonl' is no text: None"):
        list(JsonLinesSource(str(tmp_path / "a.jsonl")).texts("train"))
    with pytest.raises(ValueError, match=r"row 1 of '.*a\.jsonl' has no field 'body'"):
        list(JsonLinesSource(str(tmp_path / "a.jsonl"), field="body").texts("train"))
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"broken\.jsonl"):
        list(JsonLinesSource(str(tmp_path / "broken.jsonl")).texts("train"))


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_source_reads_the_column(monkeypatch, streaming):
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        rows = datasets.Dataset.from_dict({"content": ["one", "two"]})
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HubSource("org/set", config="en", field="content", streaming=streaming, revision="v1")
    assert list(source.texts("train")) == ["one", "two"]
    assert asked == {
        "name": "org/set",
        "config": "en",
        "split": "train",
        "revision": "v1",
        "streaming": streaming,
    }


def test_hub_source_without_a_network_is_one_line(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'org/set' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        OSError, match=r"^the data set 'org/set' cannot be had: Couldn't reach .*Hub$"
    ):
        list(HubSource("org/set").texts("train"))


@pytest.mark.parametrize("held_out", [-0.1, 0.5])
def test_held_out_is_checked(held_out):
    with pytest.raises(ValueError, match=str(held_out)):
        PydocSource(held_out=held_out)
