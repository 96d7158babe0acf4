import pytest

from refrag_lightning.retrieval import changes
from refrag_lightning.retrieval.changes import Changes, apply_changes
from refrag_lightning.retrieval.passages import PassageSplitter
from refrag_lightning.retrieval.sources import SourceDocument
from refrag_lightning.retrieval.store import PassageStore
from tests.retrieval.stores import put, store_of


def document(name, text, title="", source="f"):
    return SourceDocument(name, title, text, source)


def passages(store):
    return {passage.id: passage.text for passage in store.passages()}


def apply(store, documents, words=2, **options):
    return apply_changes(store, documents, PassageSplitter(words), **options)


@pytest.fixture
def store(tmp_path):
    return PassageStore.create(tmp_path)


def test_only_what_changed_is_written(store):
    documents = [document("a", "a b c"), document("b", "d"), document("c", "e")]
    assert apply(store, documents) == Changes(read=3, added=3)
    assert passages(store) == {"a#1": "a b", "a#2": "c", "b": "d", "c": "e"}
    before = store.version
    assert apply(store, documents) == Changes(read=3, kept=3)
    assert store.version == before
    documents = [document("d", "new"), document("a", "a"), document("b", "d")]
    assert apply(store, documents) == Changes(read=3, kept=1, added=1, changed=1, removed=1)
    assert passages(store) == {"a": "a", "b": "d", "d": "new"}
    assert apply(store, [document("b", "d")], keep_others=True) == Changes(read=1, kept=1)
    assert set(passages(store)) == {"a", "b", "d"}


@pytest.mark.parametrize("change", [{"title": "T"}, {"source": "g"}, {"text": "a b d"}])
def test_whatever_changes_in_a_document_is_seen(store, change):
    apply(store, [document("a", "a b c")])
    changed = document(**{"name": "a", "text": "a b c", **change})
    assert apply(store, [changed]).changed == 1
    (first, *_) = store.passages()
    assert first.title == changed.title and first.source == changed.source


def test_another_way_of_splitting_is_a_change(store):
    apply(store, [document("a", "a b c")])
    assert apply(store, [document("a", "a b c")], words=3).changed == 1
    assert passages(store) == {"a": "a b c"}


def test_many_commits(store, monkeypatch):
    monkeypatch.setattr(changes, "_COMMIT", 3)
    documents = [document(f"d{number}", "a b c d e") for number in range(10)]
    apply(store, documents)
    assert len(store) == 30
    assert apply(store, documents).kept == 10
    assert apply(store, [document(f"d{number}", "x") for number in range(10)]).changed == 10
    assert len(store) == 10


def test_documents_that_share_a_passage_id_are_refused(store):
    two = [document("b", "a b c"), document("b#1", "x")]
    for documents in (two, two[::-1]):
        with pytest.raises(ValueError, match="'b#1'; give one of them another id"):
            apply(store, documents)
    # One that went, or comes later with fewer passages, is in nobody's way.
    apply(store, [document("b", "a b c")])
    with pytest.raises(ValueError, match="both have a passage"):
        apply(store, [document("b#1", "x")], keep_others=True)
    assert apply(store, [document("b#1", "x")]) == Changes(read=1, added=1, removed=1)
    assert passages(store) == {"b#1": "x"}
    assert apply(store, [document("b", "short"), document("b#1", "x")]).kept == 1
    assert passages(store) == {"b": "short", "b#1": "x"}


def test_a_document_whose_passage_was_taken_is_written_anew(store):
    apply(store, [document("b", "a b c d e")])
    with pytest.raises(ValueError, match="both have a passage"):
        apply(store, [document("b#2", "x"), document("b", "a b c d e")])
    # The refused build changed nothing for the worse: the next one is right.
    apply(store, [document("b", "a b c d e")])
    assert passages(store) == {"b#1": "a b", "b#2": "c d", "b#3": "e"}


def test_passages_that_two_builders_wrote_are_written_once(tmp_path):
    store = store_of(tmp_path, {"a": "text", "b": "other"})
    put(store, {"a": "text"})
    assert len(store) == 3 and store.doubled_documents() == ["a"]
    apply(store, [document("a", "text"), document("b", "other")])
    assert len(store) == 2 and store.doubled_documents() == []
