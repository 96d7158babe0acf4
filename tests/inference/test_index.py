"""A pipeline on an index that was built from files: search, stored rows, answers, sources."""

import pytest

from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.retrieval.build import build_index
from tests.inference.pipelines import PO, QUESTION, RHINE, SEINE, parts


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model folder, and an index of three files at the rates 4 and 8."""
    folder = tmp_path_factory.mktemp("index")
    model, tokenizer = parts(context="document")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = folder / "texts"
    texts.mkdir()
    for name, text in {"seine": SEINE, "rhine": RHINE, "po": PO}.items():
        (texts / f"{name}.txt").write_text(f"  {text}\n")
    build_index(folder / "index", [str(texts)], str(folder / "model"), rates=[4, 8], progress=False)
    return folder


@pytest.mark.parametrize("search", ["bm25", "dense", "fused"])
def test_searched_passages_have_stored_rows(places, search):
    pipe = RefragPipeline.from_pretrained(places / "model", index=places / "index", search=search)
    for rate in (4, 8):
        answer = pipe(QUESTION, search=2, rate=rate, max_new_tokens=8)
        placed = answer.trace.placed
        assert answer.trace.origins == ["store"] * len(placed)
        assert 1 <= len(placed) <= 2
        found = {p.document_id: p for p in placed}
        if search == "bm25":  # the vectors of random weights find anything
            assert placed[0].document_id.endswith("seine.txt")
            assert placed[0].document.text == SEINE and placed[0].source.endswith("seine.txt")
            assert placed[0].start == 2
        # The same passages, handed over, are encoded now: the answer is the same.
        fresh = RefragPipeline(pipe.model, pipe.tokenizer)
        given = [p.document for p in placed]
        expected = fresh(QUESTION, given, rate=rate, max_new_tokens=8)
        assert set(expected.trace.origins) == {"encoded"}
        assert answer.text == expected.text
        assert len(found) == len(placed)


def test_a_causal_language_model_searches_an_index_by_words(places):
    pipe = RefragPipeline.from_pretrained("tiny/decoder", index=places / "index", search="bm25")
    answer = pipe(QUESTION, search=1, max_new_tokens=2)
    assert [p.document.text for p in answer.trace.placed] == [SEINE]
    assert answer.trace.origins == ["text"]
    with pytest.raises(ValueError, match="encoder"):
        RefragPipeline.from_pretrained("tiny/decoder", index=places / "index")
