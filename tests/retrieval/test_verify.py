import json

import numpy as np
import pyarrow as pa
import pytest

from refrag_lightning.retrieval.build import build_index
from refrag_lightning.retrieval.keys import text_key
from refrag_lightning.retrieval.store import PassageStore
from refrag_lightning.retrieval.stored_rows import StoredRows
from refrag_lightning.retrieval.verify import verify_index

TEXTS = {
    "a": "The Seine flows through Paris, and on to the sea.",
    "b": "The Rhine comes from the Alps.",
    "c": "The Po is the longest river of Italy.",
}


@pytest.fixture
def index(tmp_path, model_folder):
    file = tmp_path / "documents.jsonl"
    rows = [{"id": name, "title": name.upper(), "text": text} for name, text in TEXTS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(tmp_path / "index", [str(file)], model_folder, progress=False)
    return tmp_path / "index"


def verify(index, model_folder):
    return verify_index(index, model_folder, progress=False)


def change_states(index, name, change):
    """Writes other rows in the place of those of a text."""
    store = PassageStore.open(index)
    (key,) = store.state_keys()
    (rows,) = store.rows(key, [TEXTS[name]])
    settings = store.get_setting(f"states_{key}")
    store.states_table(key).delete("text_key", [text_key(TEXTS[name])])
    store.add_states(key, settings, [TEXTS[name]], [change(rows)])


def test_a_right_index_has_no_problems(index, model_folder):
    report = verify(index, model_folder)
    assert report.problems() == [] and report.passages == 3
    states, vectors = report.comparisons
    assert (states.compared, vectors.compared) == (3, 3)
    # Alone or in a batch, most numbers are the same; no other is more than a step of float16 off.
    assert states.equal > 0.9 and states.largest < 4e-3
    assert vectors.largest < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: StoredRows(rows.states[::-1], rows.ends, rows.sizes, rows.lost),
        lambda rows: StoredRows(rows.states * np.float16(1.01), rows.ends, rows.sizes, rows.lost),
        lambda rows: StoredRows(rows.states[1:], rows.ends[1:], rows.sizes[1:], rows.lost[1:]),
        lambda rows: StoredRows(rows.states, rows.ends - 1, rows.sizes, rows.lost),
        lambda rows: StoredRows(rows.states * np.float16("nan"), *([rows.ends] * 3)),
    ],
    ids=["order", "scale", "fewer", "layout", "nan"],
)
def test_other_states_are_found(index, model_folder, change):
    change_states(index, "a", change)
    assert verify(index, model_folder).problems() == [
        "row states at 4: 1 texts have others than the model gives"
    ]


def test_one_wrong_number_is_found(index, model_folder):
    def change(rows):
        states = rows.states.copy()
        states[-1, 0, 5] += np.float16(0.02) * np.abs(states).max()
        return StoredRows(states, rows.ends, rows.sizes, rows.lost)

    change_states(index, "b", change)
    assert verify(index, model_folder).comparisons[0].different == 1


def test_missing_doubled_and_orphaned_ones_are_found(index, model_folder):
    store = PassageStore.open(index)
    (key,), (vectors,) = store.state_keys(), store.vector_keys()
    settings = store.get_setting(f"states_{key}")
    (rows,) = store.rows(key, [TEXTS["a"]])
    store.add_states(key, settings, [TEXTS["a"], "of nothing"], [rows, rows])
    store.states_table(key).delete("text_key", [text_key(TEXTS["c"])])
    store.vectors_table(vectors).delete("text_key", [text_key(f"A\n{TEXTS['a']}")])
    store.add_vectors(vectors, [text_key("x")], store.vectors(vectors)[1][:1])
    report = verify(index, model_folder)
    assert report.comparisons[0].problems() == [
        "row states at 4: 1 texts have none",
        "row states at 4: 1 belong to no passage",
        "row states at 4: 1 texts have them twice",
    ]
    assert [line.split(": ")[1] for line in report.comparisons[1].problems()] == [
        "1 texts have none",
        "1 belong to no passage",
    ]


def test_a_passage_that_is_not_its_text_is_found(index, model_folder):
    store = PassageStore.open(index)
    table = store._passages
    rows = table.rows()
    other = pa.array(["0" * 32, *rows["text_key"].to_pylist()[1:]])
    table.upsert(rows.set_column(rows.schema.get_field_index("text_key"), "text_key", other))
    report = verify(index, model_folder)
    assert report.wrong_passages == [rows["id"][0].as_py()]
    assert "1 passages have another text's key" in report.problems()


def test_another_model_finds_no_states_of_its_own(index, model_folder):
    report = verify_index(index, model_folder, rates=[8], embedder="none", progress=False)
    assert report.problems() == ["row states at 8: 3 texts have none"]
    with pytest.raises(FileNotFoundError, match="there is no index"):
        verify(index / "nowhere", model_folder)
