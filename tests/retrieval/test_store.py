import numpy as np
import pytest

from refrag_lightning.retrieval.bm25 import searched_text
from refrag_lightning.retrieval.info import index_info
from refrag_lightning.retrieval.keys import text_key
from refrag_lightning.retrieval.passages import Passage
from refrag_lightning.retrieval.store import PassageStore, doubled, unused
from refrag_lightning.retrieval.stored_rows import StoredRows
from tests.retrieval.stores import put, store_of

SETTINGS = {"num_slots": 1, "row_size": 3, "compression": 8, "encoder": "e"}
QUOTES = "it's \"quoted\" \\ 100 %' OR ''='"


def rows_of(count, value=1.0):
    layout = np.arange(3 * count, dtype=np.int32).reshape(3, count)
    return StoredRows(np.full((count, 1, 3), value, np.float16), *layout)


def test_there_is_no_store_before_it_is_made(tmp_path):
    place = tmp_path / "index"
    assert not PassageStore.exists(place)
    with pytest.raises(FileNotFoundError, match=r"there is no index at .*index build"):
        PassageStore.open(place)
    assert not place.exists()
    store = PassageStore.create(place)
    assert PassageStore.exists(place) and len(store) == 0
    assert store.passage_table().num_rows == 0 and list(store.passages()) == []
    PassageStore.create(place)  # opens it
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        PassageStore.create(file)


def test_a_store_that_was_never_finished_is_none_and_can_be_made(tmp_path):
    """What a kill in the first moments leaves: folders of tables, and one without its settings."""
    (tmp_path / "passages.lance" / "_versions").mkdir(parents=True)
    (tmp_path / "settings.lance").mkdir()
    assert not PassageStore.exists(tmp_path)
    with pytest.raises(FileNotFoundError):
        PassageStore.open(tmp_path)
    store = PassageStore.create(tmp_path)
    assert PassageStore.exists(tmp_path) and len(store) == 0


def test_another_format_is_refused(tmp_path):
    PassageStore.create(tmp_path).set("format", 99)
    with pytest.raises(ValueError, match="has the format 99, and this version reads 1"):
        PassageStore.open(tmp_path)


def test_passages_come_back_by_id_and_in_order(tmp_path):
    store = PassageStore.create(tmp_path)
    passages = [
        Passage("b#2", "b", "T", "last", 10, 14, "f.txt"),
        Passage(QUOTES, QUOTES, "", "text\x00 ü", 0, 7, "f"),
        Passage("b#1", "b", "T", "first", 0, 5, "f.txt"),
    ]
    store.put_documents(passages, {"b": "1", QUOTES: "2"})
    assert store.get(["b#2", QUOTES, "b#1", "b#2"]) == [*passages, passages[0]]
    assert list(store.passages()) == sorted(passages, key=lambda passage: passage.id)
    table = store.passage_table()
    assert table["id"].to_pylist() == ["b#1", "b#2", QUOTES]
    assert table["text_key"].to_pylist()[0] == text_key("first")
    assert store.document_keys() == {"b": "1", QUOTES: "2"}
    with pytest.raises(ValueError, match="has no passage 'b#3'"):
        store.get(["b#1", "b#3"])
    assert store.get([]) == []


def test_replacing_and_removing_documents(tmp_path):
    store = store_of(tmp_path, {"a": "one", "b": "two", QUOTES: "three"})
    before = store.version
    put(store, {"a": "other", "d": "four"}, replaced=["a", QUOTES])
    assert store.version == before + 1  # one commit
    assert {p.id: p.text for p in store.passages()} == {"a": "other", "b": "two", "d": "four"}
    store.remove_documents(["b", "nothing"])
    assert [p.id for p in store.passages()] == ["a", "d"]
    put(store, {}, replaced=["a"])
    assert [p.id for p in store.passages()] == ["d"]


def test_rows_belong_to_texts(tmp_path):
    store = store_of(tmp_path, {"a": "one", "b": ("T", "one"), "c": "two"})
    assert sorted(store.missing_states("k")) == ["one", "two"]
    assert store.rows("k", ["one"]) == [None]
    store.add_states("k", SETTINGS, ["two", "one"], [rows_of(2), rows_of(0)])
    found = store.rows("k", ["one", "never", "two", "one"])
    assert [None if each is None else len(each.states) for each in found] == [0, None, 2, 0]
    np.testing.assert_array_equal(found[2].lost, [4, 5])
    assert found[2].states.dtype == np.float16 and found[2].states.shape == (2, 1, 3)
    assert store.missing_states("k") == [] and store.rows("k", []) == []
    assert store.rows("other", ["one"]) == [None]
    store.add_states("other", SETTINGS, ["one"], [rows_of(1, 5.0)])
    assert store.state_keys() == ["k", "other"]
    assert store.rows("other", ["one"])[0].states.max() == 5
    store.drop_states("k")
    assert store.state_keys() == ["other"] and store.rows("k", ["one"]) == [None]


def test_more_texts_than_a_filter_names(tmp_path):
    texts = {f"d{number:05}": f"text {number}" for number in range(2500)}
    store = store_of(tmp_path, texts)
    assert [p.id for p in store.get(list(texts))] == list(texts)
    store.add_states("k", SETTINGS, list(texts.values()), [rows_of(n % 3) for n in range(2500)])
    found = store.rows("k", list(texts.values())[::-1])
    assert [len(rows.states) for rows in found] == [n % 3 for n in range(2500)][::-1]
    store.remove_documents(list(texts)[1:])
    assert len(store) == 1 and store.sweep() == 2499


def test_vectors_are_of_titles_and_texts(tmp_path):
    store = store_of(tmp_path, {"a": ("T", "one"), "b": "one", "c": ("T", "one")})
    texts = sorted(store.missing_vectors("e"))
    assert texts == sorted([searched_text("T", "one"), "one"])
    keys, empty = store.vectors("e")
    assert keys == [] and empty.shape[0] == 0
    vectors = np.array([[0.6, 0.8], [1.0, 0.0]])
    store.add_vectors("e", [text_key(text) for text in texts], vectors, name="some/model")
    keys, found = store.vectors("e")
    assert keys == sorted(keys) and found.dtype == np.float32
    by_key = dict(zip(keys, found.tolist(), strict=True))
    assert by_key[text_key(texts[0])] == pytest.approx([0.6, 0.8])
    assert store.missing_vectors("e") == [] and store.vector_keys() == ["e"]
    with pytest.raises(ValueError, match="'embeddings_a/b' cannot be a table's name"):
        store.vectors("a/b")


def test_sweeping_removes_what_no_passage_uses_and_doubles(tmp_path):
    store = store_of(tmp_path, {"a": "one", "b": "two", "c": "three"})
    store.add_states("k", SETTINGS, ["one", "two", "gone"], [rows_of(1)] * 3)
    store.add_states("k", SETTINGS, ["two"], [rows_of(1)])
    store.add_vectors("e", [text_key("one"), text_key("gone")], np.eye(2))
    assert store.sweep() == 3  # "gone" twice, and "two", which was there twice
    assert sorted(store.missing_states("k")) == ["three", "two"]
    assert store.vectors("e")[0] == [text_key("one")]
    assert store.sweep() == 0
    assert unused(["a", "b", "a"], {"b": 1}) == ["a"] and doubled(["x", "y", "x"]) == ["x"]


def test_another_reader_sees_every_commit_and_compacting_disturbs_none(tmp_path):
    store = store_of(tmp_path, {"a": "one"})
    reader = PassageStore.open(tmp_path)
    assert [p.id for p in reader.passages()] == ["a"]
    version = reader.version
    for number in range(12):
        put(store, {f"b{number}": f"text {number}"})
    assert len(reader) == 13 and reader.version > version
    store.add_states("k", SETTINGS, ["one"], [rows_of(1)])
    assert reader.rows("k", ["one"])[0] is not None
    store.compact()
    assert len(reader) == 13 and reader.get(["b11"])[0].text == "text 11"
    assert reader.rows("k", ["one"])[0] is not None
    store.drop_states("k")
    assert reader.rows("k", ["one"]) == [None]
    files = list((tmp_path / "passages.lance" / "data").iterdir())
    assert len(files) == 1
    # A table that did not change is left alone.
    before = store.version
    store.compact(force=True)
    assert store.version == before


def test_disk_does_not_grow_with_builds(tmp_path):
    store = PassageStore.create(tmp_path)
    sizes = []
    for turn in range(6):
        put(store, {"a": f"{turn} " * 20_000}, replaced=["a"])
        store.compact()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        sizes.append(sum(path.stat().st_size for path in files))
    assert max(sizes) < 1.1 * sizes[0] and len(files) < 20


def test_one_builder_at_a_time(tmp_path):
    store, other = PassageStore.create(tmp_path), PassageStore.open(tmp_path)
    with store.lock(), pytest.raises(OSError, match="another build of the index"), other.lock():
        pass
    with other.lock():
        pass


def test_info_counts(tmp_path):
    store = store_of(tmp_path, {"a": ("T", "one"), "b": "one", "c": "three"})
    store.add_states("k", SETTINGS, ["one"], [rows_of(4)])
    store.add_vectors("e", [text_key("one")], np.ones((1, 2)), name="some/model")
    info = index_info(store)
    assert (info.documents, info.passages, info.texts, info.characters) == (3, 3, 2, 11)
    (states,), (vectors,) = info.states, info.vectors
    assert (states.key, states.texts, states.missing) == ("k", 1, 1)
    assert states.settings == SETTINGS
    # 4 rows of 3 numbers of 2 bytes, and 12 bytes of layout a row.
    assert states.bytes > 4 * (3 * 2 + 12)
    assert (vectors.name, vectors.size, vectors.texts, vectors.missing) == ("some/model", 2, 1, 2)
    files = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert info.bytes == files
