import gzip
import json
import os
import socket
import tracemalloc

import pytest

from refrag_lightning.retrieval.sources import SourceDocument, read_documents


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*paths, **fields):
    return list(read_documents(paths, **fields))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_kind_of_file_in_a_folder(here):
    (here / "docs" / "sub").mkdir(parents=True)
    (here / "docs" / ".git").mkdir()
    (here / "docs" / ".git" / "x.txt").write_text("hidden")
    (here / "docs" / "a.txt").write_text("\ufeffplain\ntext", encoding="utf-8")
    (here / "docs" / "b.md").write_text("# Head\n\nBody.")
    (here / "docs" / "sub" / "c.HTML").write_text("<title>Page</title><p>Words</p>")
    lines(here / "docs" / "d.jsonl", [{"text": "one", "title": "T", "id": 7}, {"text": "two"}])
    with gzip.open(here / "docs" / "e.jsonl.gz", "wt") as file:
        file.write('\n{"text": "three", "title": null}\n')
    documents = read("docs")
    assert documents == [
        SourceDocument("docs/a.txt", "a", "plain\ntext", "docs/a.txt"),
        SourceDocument("docs/b.md", "Head", "Head\n\nBody.", "docs/b.md"),
        SourceDocument("7", "T", "one", "docs/d.jsonl"),
        SourceDocument("docs/d.jsonl#2", "", "two", "docs/d.jsonl#2"),
        SourceDocument("docs/e.jsonl.gz#1", "", "three", "docs/e.jsonl.gz#1"),
        SourceDocument("docs/sub/c.HTML", "Page", "Words", "docs/sub/c.HTML"),
    ]
    # However they are named, files in the current folder have the same ids.
    assert read(str(here / "docs")) == documents
    assert read("./docs/a.txt", "docs/*.md", "docs/**/*.txt") == documents[:2]


def test_fields_can_have_other_names(here):
    lines(here / "x.jsonl", [{"body": {"en": "Text"}, "name": "N", "key": "k"}])
    (document,) = read("x.jsonl", text_field="body.en", title_field="name", id_field="key")
    assert document == SourceDocument("k", "N", "Text", "x.jsonl")


def test_passages_of_questions_are_documents_each_once(here):
    seine = {"id": "1", "title": "Seine", "text": "Flows."}
    rows = [
        {"id": "q1", "passages": [seine, {"text": "Other."}]},
        {"id": "q2", "passages": [{**seine, "id": "9"}, "Bare."]},
    ]
    lines(here / "q.jsonl", rows)
    documents = read("q.jsonl", text_field="passages")
    assert [(document.id, document.title, document.text) for document in documents] == [
        ("q1/1", "Seine", "Flows."),
        ("q1/2", "", "Other."),
        ("q2/2", "", "Bare."),
    ]


def test_the_python_reference_and_hub_data_sets(here, monkeypatch):
    documents = read("pydoc")
    assert documents[0].id == "pydoc#1" and len(documents) > 100
    assert sum(len(document.text) for document in documents) > 300_000

    from refrag_lightning.data.rows import HubRows

    def rows(self):
        assert (self.config, self.split) == ("en", "test")
        yield "row 1 of it", {"text": "Words", "title": "T"}

    monkeypatch.setattr(HubRows, "__iter__", rows)
    (document,) = read("hub:owner/name@en#test")
    assert document == SourceDocument(
        "hub:owner/name@en#test#1", "T", "Words", "hub:owner/name@en#test#1"
    )


def test_other_and_empty_files_of_a_folder_are_counted(here):
    (here / "a.txt").write_text("text")
    (here / "b.png").write_bytes(b"\x89PNG")
    (here / "c.png").write_bytes(b"\x89PNG")
    (here / "d.md").write_text("\n")
    with pytest.warns(
        UserWarning, match="files of '.' that are no documents were left out: 2 .png, 1 empty"
    ):
        assert len(read(".")) == 1


def test_rows_without_text_are_counted(here):
    lines(here / "x.jsonl", [{"text": " "}, {"text": "a"}, {"text": ""}])
    with pytest.warns(UserWarning, match="2 rows without text"):
        assert [document.id for document in read("x.jsonl")] == ["x.jsonl#2"]


@pytest.mark.parametrize(
    ("content", "paths", "message"),
    [
        (None, [], "no paths"),
        (None, ["nowhere"], "no file or folder 'nowhere'"),
        (None, ["*.md"], "'\\*.md' holds no document"),
        (b"", ["f.txt"], "'f.txt' holds no document"),
        (b"x", ["f.pdf"], "'f.pdf' is of an unknown kind; documents are read from .txt, .md"),
        (b"caf\xe9", ["f.txt"], "'f.txt' is no UTF-8 text: byte 3 is 0xe9"),
        (b'{"text": 1}', ["f.jsonl"], "row 1 of 'f.jsonl'"),
        (b'{"body": "x"}', ["f.jsonl"], "row 1 of 'f.jsonl' has no field 'text'"),
        (b'{"text": "x", "title": 3}', ["f.jsonl"], "'title' in row 1 of 'f.jsonl' is no text"),
        (b'{"text": "a\\ud800"}', ["f.jsonl"], "'f.jsonl#1' holds .*, which is no character"),
        (
            b'{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}',
            ["f.jsonl"],
            "two documents have the id 'x': one in f.jsonl, another in f.jsonl",
        ),
        (None, ["hub:@x"], "'hub:@x' is no data set"),
    ],
)
def test_what_cannot_be_read_is_named(here, content, paths, message):
    if content is not None:
        (here / paths[0]).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(*paths)


def test_the_same_document_again_is_read_once(here):
    (here / "a.txt").write_text("text")
    assert len(read("a.txt", "*.txt", ".")) == 1


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with links that lead out of it, around in it, and to nothing."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.txt").write_text("secret")
    (tmp_path / "in" / "a.txt").write_text("a river")
    links = {"out": "../secret", "o.txt": "../secret/s.txt", "A.txt": "a.txt",
             "gone.txt": "nowhere", "sub/up": "../../in", "sub/loop": "../sub",
             "self": "self"}  # fmt: skip
    for link, target in links.items():
        (tmp_path / "in" / link).symlink_to(target)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", ["in", "./in", "in/**/*.txt", "in/**"])
def test_links_are_followed_within_a_folder_once_and_out_of_it_where_asked(outside, path):
    with pytest.warns(UserWarning, match=r"link out of it \(--follow_links.*link to nothing"):
        assert [document.id for document in read(path)] == ["in/a.txt"]
    with pytest.warns(UserWarning, match="1 link to nothing|2 link to nothing"):
        texts = [document.text for document in read(path, follow_links=True)]
    assert sorted(texts) == ["a river", "secret"]


def test_a_link_that_is_named_is_followed(outside):
    assert read("in/o.txt")[0].text == "secret" and read("in/out")[0].text == "secret"
    with pytest.warns(UserWarning, match="link out of it"):
        assert len(read("in/*.txt")) == 1


def test_what_is_no_regular_file_is_never_opened(here):
    (here / "d").mkdir()
    os.mkfifo(here / "d" / "f.txt")
    os.mkfifo(here / "d" / "g.jsonl.gz")
    (here / "d" / "a.txt").write_text("a river")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("d/s.md")
        (here / "d" / "zero.md").symlink_to("/dev/zero")
        with pytest.warns(UserWarning, match="2 FIFO, 1 socket, 1 device"):
            assert [document.id for document in read("d", follow_links=True)] == ["d/a.txt"]
        with pytest.warns(UserWarning, match="1 socket"):
            assert len(read("d/?.*")) == 1
    for name, kind in (("d/f.txt", "FIFO"), ("d/g.jsonl.gz", "FIFO"), ("/dev/zero", "device")):
        with pytest.raises(ValueError, match=f"{name}' is a {kind}, not a file that can be read"):
            read(name)


def test_large_documents_are_refused_by_name_and_taken_where_meant(here):
    (here / "x.txt").write_text("word " * 300_000)
    with pytest.raises(ValueError, match=r"'x.txt' is larger than 1 MB, .*raise max_mb"):
        read("x.txt", max_mb=1)
    assert len(read("x.txt", max_mb=2)[0].text) == 1_500_000
    lines(here / "x.jsonl", [{"text": "a"}, {"text": "b" * 1_500_000}])
    with pytest.raises(ValueError, match=r"row 2 of 'x.jsonl' is longer than 1 million characters"):
        read("x.jsonl", max_mb=1)


@pytest.mark.parametrize(
    "line", ["x" * 20_000_000, ('{"x": "' + "y" * 990 + '", "text": ""}\n') * 20_000]
)
def test_what_is_packed_too_well_is_read_no_further(here, line):
    with gzip.open(here / "x.jsonl.gz", "wt", compresslevel=9) as file:
        file.write(line)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"'x.jsonl.gz'.*raise max_mb"):
        read("x.jsonl.gz", max_mb=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000
