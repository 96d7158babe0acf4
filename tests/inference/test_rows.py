"""Rows: from memory, from an index, or encoded; and what a batch is made of."""

import numpy as np
import pytest
import torch

from refrag_lightning.inference.rows import DocumentRows, KnownRows, RowMemory, RowReader
from refrag_lightning.retrieval.stored_rows import StoredRows
from refrag_lightning.text.documents import Document
from tests.inference.pipelines import PO, RHINE, SEINE, MemoryStore, parts

TEXTS = [SEINE, RHINE, PO, "", "  "]


def reader(context="row", **options):
    return RowReader(*parts(context=context), **options)


@pytest.mark.parametrize("context", ["row", "document"])
@pytest.mark.parametrize("rate", [4, 8])
def test_encoded_rows_are_those_of_the_tokenizer_and_model(context, rate):
    model, tokenizer = parts(context=context)
    found = reader(context).read(TEXTS, rate)
    for text in TEXTS:
        [packed] = tokenizer.at(rate).pack([text])
        rows = found.rows[text]
        assert rows.packed.bounds.tolist() == packed.bounds.tolist()
        assert rows.packed.row_sizes.tolist() == packed.row_sizes.tolist()
        assert rows.packed.lost.tolist() == packed.lost.tolist()
        batch = tokenizer.at(rate)([[Document(text)]])
        expected = model.encode(batch)[torch.from_numpy(batch.trace[0].rows)]
        torch.testing.assert_close(rows.states, expected, atol=1e-5, rtol=1e-5)
        assert found.origins[text] == "encoded"
    assert found.encoding_seconds > 0


def test_rows_come_from_the_index_then_from_memory():
    model, tokenizer = parts()
    store = MemoryStore()
    store.add(model, tokenizer.at(4), [SEINE, RHINE])
    rows = reader(store=store)
    found = rows.read([SEINE, PO, RHINE, SEINE], 4)
    assert found.origins == {SEINE: "store", RHINE: "store", PO: "encoded"}
    assert store.asked == [[SEINE, PO, RHINE]]
    fresh = reader().read([SEINE], 4).rows[SEINE]
    stored = found.rows[SEINE]
    assert stored.packed.bounds.tolist() == fresh.packed.bounds.tolist()
    assert stored.packed.row_sizes.tolist() == fresh.packed.row_sizes.tolist()
    # What was stored in float16 has 11 significant bits.
    torch.testing.assert_close(stored.states.float(), fresh.states, atol=1e-3, rtol=1e-3)

    again = rows.read([PO, SEINE], 4)
    assert set(again.origins.values()) == {"memory"} and len(store.asked) == 1
    # The index has no states of the other rate.
    assert rows.read([SEINE], 8).origins == {SEINE: "encoded"}


def test_stored_states_of_another_shape_are_refused():
    class Wrong:
        def rows(self, key, texts):
            none = np.zeros(1, dtype=np.int32)
            return [StoredRows(np.zeros((1, 1, 3), dtype=np.float16), none, none, none)]

    with pytest.raises(ValueError, match=r"states of shape \(1, 1, 3\)"):
        reader(store=Wrong()).read([SEINE], 4)


def test_memory_keeps_what_was_read_last():
    def rows(size):
        none = np.zeros(0, dtype=np.int64)
        return DocumentRows.of(none, none, none, torch.zeros(size, 1, 1))

    memory = RowMemory(40)
    memory.put(4, "a", rows(4))
    memory.put(4, "b", rows(4))
    assert memory.used == 32
    assert memory.get(4, "a") is not None and memory.get(8, "a") is None
    memory.put(4, "c", rows(2))
    assert memory.used == 40
    memory.put(8, "a", rows(1))  # b was read longest ago
    assert memory.get(4, "b") is None
    assert (len(memory), memory.used) == (3, 28)
    memory.put(8, "a", rows(3))  # replaced, not counted twice
    assert memory.used == 36
    memory.put(4, "large", rows(11))
    assert (len(memory), memory.used) == (0, 0)


def test_the_head_of_a_document():
    found = reader().read([RHINE], 4).rows[RHINE]
    head = found.head(2)
    assert head.packed.num_rows == 2 and head.packed.row_sizes.tolist() == [4, 4]
    assert head.packed.bounds.tolist() == found.packed.bounds[:3].tolist()
    assert torch.equal(head.states, found.states[:2])


@pytest.mark.parametrize("context", ["row", "document"])
def test_known_rows_build_the_tokenizers_batch(context):
    _, tokenizer = parts(context=context)
    prompts = [["Where? ", Document(text, str(n))] for n, text in enumerate(TEXTS)]
    expected = tokenizer(prompts, expand=[[0], [], [1], [], []])
    from refrag_lightning.text.segments import render

    style = {"header": tokenizer.header, "footer": tokenizer.footer}
    packed = dict(zip(TEXTS, tokenizer.pack(TEXTS), strict=True))
    batch = KnownRows(tokenizer, packed).build(
        [render(prompt, **style) for prompt in prompts], expand=[[0], [], [1], [], []]
    )
    assert sorted(batch) == sorted(expected)
    for key in batch:
        assert torch.equal(batch[key], expected[key]), key
