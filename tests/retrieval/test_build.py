import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refrag_lightning.model import RefragModel
from refrag_lightning.retrieval import build as build_module
from refrag_lightning.retrieval import changes, encoding
from refrag_lightning.retrieval import verify as verify_module
from refrag_lightning.retrieval.build import build_index
from refrag_lightning.retrieval.encoding import batches_by_length
from refrag_lightning.retrieval.info import index_info
from refrag_lightning.retrieval.loading import load_models
from refrag_lightning.retrieval.store import PassageStore
from refrag_lightning.retrieval.tables import KeyedTable
from refrag_lightning.retrieval.verify import verify_index
from tests.strategies import PYDOC

ROOT = Path(__file__).parent.parent.parent
PARAGRAPHS = [paragraph for paragraph in PYDOC.split("\n\n") if len(paragraph) > 200]


@pytest.fixture
def documents(tmp_path):
    """A JSON lines file, and a function that writes it: a dictionary of ids and texts."""
    file = tmp_path / "documents.jsonl"

    def write(texts):
        file.write_text("".join(json.dumps({"id": k, "text": v}) + "\n" for k, v in texts.items()))
        return str(file)

    return write


def some(count, start=0):
    return {f"d{number}": PARAGRAPHS[number] for number in range(start, start + count)}


def build(index, path, model_folder, **options):
    return build_index(index, [path], model_folder, words=20, progress=False, **options)


def test_a_second_build_computes_nothing(tmp_path, documents, model_folder):
    index, path = tmp_path / "index", documents(some(12))
    first = build(index, path, model_folder)
    assert (first.read, first.added, first.kept) == (12, 12, 0)
    store = PassageStore.open(index)
    texts = len(store.texts())
    assert first.passages == len(store) and 12 < texts <= len(store)
    assert first.encoded == texts and first.passages_per_second > 0
    assert first.embedded == len(store.texts_to_search())
    before = {file: file.stat().st_mtime_ns for file in index.rglob("*") if file.is_file()}
    second = build(index, path, model_folder)
    assert (second.kept, second.added, second.changed, second.removed) == (12, 0, 0, 0)
    assert (second.encoded, second.embedded, second.swept) == (0, 0, 0)
    # Not a file was written.
    after = {file: file.stat().st_mtime_ns for file in index.rglob("*") if file.is_file()}
    assert {k: v for k, v in after.items() if not k.name.endswith(".lock")} == {
        k: v for k, v in before.items() if not k.name.endswith(".lock")
    }
    assert verify_index(index, model_folder, progress=False).problems() == []


def test_only_what_changed_is_computed(tmp_path, documents, model_folder):
    index, texts = tmp_path / "index", some(10)
    build(index, documents(texts), model_folder)
    del texts["d0"]
    texts["d1"] += " And one sentence more."
    texts["copy"] = texts["d2"]  # its texts have states already
    report = build(index, documents(texts), model_folder)
    assert (report.kept, report.changed, report.added, report.removed) == (8, 1, 1, 1)
    store = PassageStore.open(index)
    old = {text for name, text in some(10).items()}
    assert not any(passage.document_id == "d0" for passage in store.passages())
    # Two passages at most of d1 are new: the last one, or what was cut anew behind it.
    assert 1 <= report.encoded <= 2 and len(old) == 10
    assert report.swept > 0
    assert verify_index(index, model_folder, progress=False).problems() == []


def test_several_rates_stand_beside_each_other_until_they_are_pruned(
    tmp_path, documents, model_folder
):
    index, path = tmp_path / "index", documents(some(4))
    first = build(index, path, model_folder, rates=[4, 8])
    texts = len(PassageStore.open(index).texts())
    assert first.encoded == 2 * texts
    info = index_info(PassageStore.open(index))
    assert [states.settings["compression"] for states in info.states] == [4, 8]
    assert all(states.missing == 0 for states in info.states)
    report = build(index, path, model_folder, rates=[8])
    assert report.encoded == 0
    assert len(PassageStore.open(index).state_keys()) == 2
    build(index, path, model_folder, rates=[8], embedder="none", prune=True)
    store = PassageStore.open(index)
    assert len(store.state_keys()) == 1 and store.vector_keys() == []
    found = verify_index(index, model_folder, rates=[8], embedder="none", progress=False)
    assert found.problems() == [] and found.comparisons[0].compared == texts
    found = verify_index(index, model_folder, rates=[4], embedder="none", progress=False)
    assert found.problems() == [f"row states at 4: {texts} texts have none"]


def test_another_encoder_has_states_of_its_own(tmp_path, documents, model_folder):
    index, path = tmp_path / "index", documents(some(3))
    build(index, path, model_folder)
    model = RefragModel.from_pretrained(model_folder)
    model.set_trainable(["projector", "encoder"])
    for parameter in model.encoder.parameters():
        parameter.data.mul_(1.02)
    trained = tmp_path / "trained"
    model.save_pretrained(trained)
    for part in Path(model_folder).iterdir():
        if not (trained / part.name).exists():
            (trained / part.name).symlink_to(part)
    report = build(index, path, str(trained))
    assert report.kept == 3 and report.encoded > 0 and report.embedded > 0
    for folder in (model_folder, str(trained)):
        assert verify_index(index, folder, progress=False).problems() == []


def test_without_a_model_there_are_passages_alone(tmp_path, documents):
    index = tmp_path / "index"
    report = build_index(index, [documents(some(3))], words=20, progress=False)
    assert (report.encoded, report.embedded) == (0, 0) and report.passages > 3
    assert verify_index(index, progress=False).problems() == []
    with pytest.raises(ValueError, match=r"rates \(\[8\]\) need a model"):
        build_index(index, [documents(some(3))], rates=[8], progress=False)


def test_what_is_wrong_is_told_before_anything_is_made(tmp_path, documents, model_folder):
    index, path = tmp_path / "index", documents(some(1))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(index, str(tmp_path / "nowhere"), model_folder)
    with pytest.raises(ValueError, match=r"compression \(5\) must be one of rates \(\[4, 8\]\)"):
        build(index, path, model_folder, rates=[5])
    with pytest.raises(ValueError, match="'tiny/decoder' has no encoder"):
        build(index, path, "tiny/decoder")
    assert not index.exists()
    store = PassageStore.create(index)
    with store.lock(), pytest.raises(OSError, match="another build of the index"):
        build(index, path, model_folder)


def test_batches_are_of_like_length_the_longest_first():
    texts = ["a" * size for size in (3, 90, 5, 40, 41, 200, 1)]
    batches = list(batches_by_length(texts, batch_tokens=25))  # 100 characters
    assert [[len(text) for text in batch] for batch in batches] == [
        [200], [90], [41, 40, 5, 3, 1],
    ]  # fmt: skip
    assert list(batches_by_length([], 10)) == []


def test_states_do_not_depend_on_the_batches(tmp_path, documents, model_folder):
    path = documents(some(6))
    for name, batch_tokens in (("one", 1), ("many", 10_000)):
        build(tmp_path / name, path, model_folder, batch_tokens=batch_tokens)
    one, many = (PassageStore.open(tmp_path / name) for name in ("one", "many"))
    (key,) = one.state_keys()
    texts = list(one.texts().values())
    for a, b in zip(one.rows(key, texts), many.rows(key, texts), strict=True):
        np.testing.assert_allclose(a.states, b.states, rtol=2**-9, atol=2**-11)


class Died(BaseException):
    """Stands for the end of a process at this point."""


def test_a_build_that_ends_at_any_commit_is_finished_by_the_next(
    tmp_path, documents, model_folder, monkeypatch
):
    """Dies at one commit after another, just before it or just behind it."""
    monkeypatch.setattr(encoding, "COMMIT_TEXTS", 4)
    monkeypatch.setattr(changes, "_COMMIT", 4)
    first, second = some(3), some(3, start=2) | {"d2": PARAGRAPHS[30]}
    commits = ("append", "upsert", "replace", "delete", "compact")

    def dying_at(number, before):
        """Lets `number` commits through."""
        left = number

        def wrapped(original):
            def commit(self, *args, **kwargs):
                nonlocal left
                if left <= 0 and before:
                    raise Died
                original(self, *args, **kwargs)
                left -= 1
                if left < 0:
                    raise Died

            return commit

        return {name: wrapped(getattr(KeyedTable, name)) for name in commits}

    models = load_models(model_folder)
    for module in (build_module, verify_module):
        monkeypatch.setattr(module, "load_models", lambda *args, **options: models)
    build(tmp_path / "before", documents(first), model_folder, batch_tokens=20)
    path = documents(second)
    ended = 0
    for number in range(0, 200, 2):
        index = tmp_path / f"index{number}"
        shutil.copytree(tmp_path / "before", index)
        with monkeypatch.context() as patch:
            for name, method in dying_at(number, before=number % 4 == 0).items():
                patch.setattr(KeyedTable, name, method)
            try:
                build(index, path, model_folder, batch_tokens=20)
                break
            except Died:
                ended += 1
        assert index_info(PassageStore.open(index)).passages > 0
        report = build(index, path, model_folder)
        assert report.passages == len(PassageStore.open(index))
        assert verify_index(index, model_folder, progress=False).problems() == []
        assert build(index, path, model_folder).encoded == 0
    else:
        raise AssertionError("no build came to its end")
    assert ended >= 5


KILLED = """
import sys
from refrag_lightning.retrieval import build, changes, encoding
index, path, model = sys.argv[1:]
encoding.COMMIT_TEXTS, changes._COMMIT = 8, 16
loading = build.load_models
def load_models(*args, **kwargs):
    models = loading(*args, **kwargs)
    print("ready", flush=True)
    return models
build.load_models = load_models
build.build_index(index, [path], model, words=20, batch_tokens=64, progress=False)
print("done", flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_and_corrupts_nothing(tmp_path, documents, model_folder):
    index = tmp_path / "index"
    chosen = random.Random(0)
    killed = 0
    texts = some(60)
    for turn in range(3):
        # Some documents go and some come, so that every kind of commit is among those killed.
        texts = dict(list(texts.items())[10:]) | some(10, start=60 + 10 * turn)
        path = documents(texts)
        command = [sys.executable, "-c", KILLED, str(index), path, model_folder]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(chosen.uniform(0.05, 0.8))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if PassageStore.exists(index):
            store = PassageStore.open(index)
            assert index_info(store).passages == len(store)
            ids = store.passage_table()["id"].to_pylist()
            assert len(store.get(ids)) == len(ids)
    assert killed >= 2
    report = build(index, path, model_folder)
    assert set(PassageStore.open(index).document_keys()) == set(texts)
    found = verify_index(index, model_folder, progress=False)
    assert found.problems() == [] and found.comparisons[0].compared == len(
        PassageStore.open(index).texts()
    )
    again = build(index, path, model_folder)
    assert (again.kept, again.encoded, again.embedded, again.swept) == (report.read, 0, 0, 0)
    # What the killed builds left on the disk is gone.
    names = [path.parent.parent.name for path in index.glob("states_*.lance/data/*")]
    assert len(names) == 1
