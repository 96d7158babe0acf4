"""The trace: documents, rows, positions, times."""

import json
from itertools import pairwise

import pytest
from rich.console import Console

from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.text.documents import Document
from tests.inference.pipelines import (
    PO,
    QUESTION,
    RHINE,
    RIVERS,
    SEINE,
    MemoryStore,
    parts,
    pipeline,
    plain_parts,
)


def test_documents_and_rows():
    model, tokenizer = parts()
    store = MemoryStore()
    store.add(model, tokenizer, [SEINE])
    pipe = pipeline(store=store)
    expand = ["none", "all", [0], "none"]
    trace = pipe.prepare(QUESTION, [*RIVERS, Document("  ")], expand=expand).trace
    assert [document.origin for document in trace.documents] == ["store", "text", *["encoded"] * 2]
    seine, rhine, po, empty = trace.documents
    [packed] = tokenizer.pack([SEINE])
    spans = [(row.start, row.end) for row in seine.rows]
    bounds = packed.bounds.tolist()
    assert spans == [*pairwise(bounds)]
    assert "".join(row.text for row in seine.rows) == SEINE
    assert {(row.state, row.why) for row in seine.rows} == {
        ("vector", "compressed: from the index")
    }
    assert [(row.text, row.state, row.why) for row in rhine.rows] == [
        (RHINE, "tokens", "expanded: asked for")
    ]
    assert [row.state for row in po.rows] == ["tokens", *["vector"] * (len(po.rows) - 1)]
    assert po.rows[1].why == "compressed: encoded now"
    assert [(row.state, row.why) for row in empty.rows] == [
        ("empty", "the encoder reads no token of it")
    ]
    assert {row.document_id for row in po.rows} == {"3"}
    assert pipe.prepare(QUESTION, RIVERS).trace.origins == ["memory", "encoded", "memory"]


@pytest.mark.parametrize("decoder", ["tiny/decoder", "tiny/gemma"])
def test_positions_with_and_without_compression(decoder):
    pipe = pipeline(decoder)
    trace = pipe.prepare(QUESTION, RIVERS).trace
    whole = pipe.prepare(QUESTION, RIVERS, expand="all").trace
    assert trace.positions_as_text == whole.positions == whole.positions_as_text
    assert trace.positions < whole.positions
    assert (trace.rate, pipe.prepare(QUESTION, RIVERS, rate=8).trace.rate) == (4, 8)


def test_a_model_without_an_encoder_has_text_alone():
    trace = RefragPipeline(*plain_parts()).prepare(QUESTION, RIVERS).trace
    assert trace.rate is None and trace.origins == ["text"] * 3
    assert {row.why for document in trace.documents for row in document.rows} == {
        "text: there is no encoder"
    }


def test_plain_data_and_tables():
    answer = pipeline()(QUESTION, RIVERS, max_new_tokens=3, temperature=1.0, seed=7)
    trace = answer.trace
    data = json.loads(json.dumps(answer.as_dict()))["trace"]
    assert data["documents"][0]["source"] == "rivers.txt"
    assert [row["text"] for row in data["documents"][2]["rows"]]
    assert sum(data["documents"][2]["states"].values()) == len(data["documents"][2]["rows"])
    assert data["positions_as_text"] == trace.positions_as_text
    assert (data["seed"], data["batch_size"]) == (7, 1)
    assert "rows" not in answer.as_dict(rows=False)["trace"]["documents"][0]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trace.table())
    console.print(trace.rows_table())
    shown = console.export_text()
    for text in ("Seine", "encoded now", "positions of the prompt", "seed 7", PO[:8]):
        assert text in shown, text


def test_a_title_is_no_markup():
    trace = pipeline().prepare(QUESTION, [Document(PO, title="[red]Po[/red]")]).trace
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trace.table())
    assert "[red]Po[/red]" in console.export_text()


def test_times_add_up():
    trace = pipeline()(QUESTION, RIVERS, max_new_tokens=20).trace
    seconds = trace.seconds
    parts_of_first = seconds.lookup + seconds.encoding + seconds.building + seconds.prefill
    assert 0 < parts_of_first <= seconds.first_token < seconds.total
    assert all(value >= 0 for value in vars(seconds).values())
    assert trace.tokens_a_second > 0 or trace.new_tokens < 2
