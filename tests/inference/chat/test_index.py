"""Questions that are searched for in an index."""

import io

import pytest
from rich.console import Console

from refrag_lightning.inference.chat.screen import Screen
from refrag_lightning.inference.chat.session import Session
from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.retrieval.build import build_index

TEXTS = {
    "rivers": "The Seine flows through Paris to the sea.",
    "towns": "Lyon lies on the Rhone, where the Saone joins it.",
    "trees": "An oak stands in the garden of the old mill.",
}


@pytest.fixture(scope="module")
def session(seine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    build_index(folder / "index", [str(folder / "*.txt")], str(seine), progress=False)
    pipeline = RefragPipeline.from_pretrained(seine, index=folder / "index", search="bm25")
    return Session(pipeline, "seine", options={"max_new_tokens": 40, "search": 1})


def test_each_question_has_passages_of_its_own(session):
    for question, name in (("Where is the Seine?", "rivers"), ("Which oak is old?", "trees")):
        reply = session.ask(question)
        list(reply)
        (placed,) = reply.turn.trace.placed
        assert placed.document.text == TEXTS[name] and placed.document.id == "1"
        (citation,) = reply.turn.citations
        assert citation.title == name and citation.source.endswith(f"{name}.txt")
        # Its rows were computed when the index was built.
        assert reply.turn.trace.origins == ["store"]


def test_what_was_found_is_listed_and_read_again_as_text(session):
    session.clear()
    list(session.ask("Where is the Seine?"))
    file = io.StringIO()
    Screen(Console(file=file, width=100)).documents(session)
    assert "found for the last question" in file.getvalue() and "rivers" in file.getvalue()
    full = session.ask_with_full_text()
    list(full)
    assert [p.document.text for p in full.turn.trace.placed] == [TEXTS["rivers"]]
    assert full.turn.trace.origins == ["text"]
