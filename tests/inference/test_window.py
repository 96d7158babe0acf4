"""Prompts that are too long: refused, or shortened by the rule."""

import pytest

from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.text.documents import Document
from tests.inference.pipelines import PO, QUESTION, RHINE, RIVERS, SEINE, pipeline, plain_parts


def positions(**options):
    return pipeline(window=1 << 20).prepare(QUESTION, RIVERS, **options).trace.positions


def prepare(window, **options):
    """A request that has room for so many positions beside an answer of 10 tokens."""
    given = {"max_new_tokens": 10, **options}
    return pipeline(window=window + 10).prepare(QUESTION, RIVERS, **given)


def texts(prepared):
    return [placed.document.text for placed in prepared.trace.placed]


def test_what_fits_exactly_stays():
    whole = positions()
    prepared = prepare(whole)
    assert prepared.trace.positions == whole and prepared.trace.actions == ()
    assert texts(prepared) == [SEINE, RHINE, PO]


def test_one_position_too_many_is_refused():
    whole = positions()
    message = rf"takes {whole} positions and max_new_tokens \(10\) more, but the decoder has "
    with pytest.raises(ValueError, match=message + rf"{whole + 9}; too_long='drop' leaves out"):
        prepare(whole - 1)


def test_dropping_takes_the_last_document_whole():
    whole = positions()
    prepared = prepare(whole - 1, too_long="drop")
    assert texts(prepared) == [SEINE, RHINE]
    assert prepared.trace.actions == ("document 3 was left out",)
    # What is left is the prompt of two documents, position for position.
    shorter = pipeline().prepare(QUESTION, RIVERS[:2])
    assert prepared.trace.positions == shorter.trace.positions
    assert prepared.batch["input_ids"].tolist() == shorter.batch["input_ids"].tolist()
    assert texts(prepare(shorter.trace.positions - 1, too_long="drop")) == [SEINE]


@pytest.mark.parametrize("expand", ["none", "all", ["none", "none", [0, 1]]])
def test_truncating_cuts_the_last_document(expand):
    whole = positions(expand=expand)
    for less in (1, 2, 3):
        prepared = prepare(whole - less, too_long="truncate", expand=expand)
        assert prepared.trace.positions <= whole - less
        kept = texts(prepared)
        assert kept[:2] == [SEINE, RHINE]
        assert PO.startswith(kept[2]) and 0 < len(kept[2]) < len(PO)
        assert prepared.trace.actions == (
            f"document 3 was cut to its first {len(kept[2])} of {len(PO)} characters",
        )
        if expand == "none":  # a row less is a position less, so nothing is taken in vain
            assert prepared.trace.positions == whole - less


def test_truncated_rows_keep_their_states():
    pipe = pipeline(window=positions() - 1 + 10)
    cut = pipe.prepare(QUESTION, RIVERS, max_new_tokens=10, too_long="truncate").batch
    whole = pipeline().prepare(QUESTION, RIVERS).batch
    rows = len(cut["row_states"])
    assert rows == len(whole["row_states"]) - 1
    assert cut["row_states"].tolist() == whole["row_states"][:rows].tolist()


def test_truncating_drops_what_does_not_fit_at_all():
    two = pipeline().prepare(QUESTION, RIVERS[:2]).trace.positions
    prepared = prepare(two - 1, too_long="truncate")
    kept = texts(prepared)
    assert kept[0] == SEINE and len(kept) == 2 and RHINE.startswith(kept[1])
    assert [action.split(" was ")[1][:8] for action in prepared.trace.actions] == [
        "left out",
        "cut to i",
    ]


@pytest.mark.parametrize("rule", ["drop", "truncate"])
def test_every_window_is_kept_or_refused(rule):
    least = pipeline().prepare(QUESTION).trace.positions
    for window in range(least, positions() + 1):
        assert prepare(window, too_long=rule).trace.positions <= window
    with pytest.raises(ValueError, match=f"takes {least} positions"):
        prepare(least - 1, too_long=rule)


def test_documents_of_messages_are_not_touched():
    messages = [{"role": "user", "content": [Document(RHINE), QUESTION]}]
    whole = pipeline().prepare(messages).trace.positions
    with pytest.raises(ValueError, match=f"takes {whole} positions"):
        pipeline(window=whole).prepare(messages, max_new_tokens=1, too_long="drop")


def test_an_answer_as_long_as_the_window_is_refused():
    with pytest.raises(ValueError, match=r"max_new_tokens \(50\) more, but the decoder has 50"):
        pipeline(window=50).prepare("Who?", max_new_tokens=50, too_long="drop")


def test_a_model_without_an_encoder_is_shortened_too():
    pipe = RefragPipeline(*plain_parts())
    whole = pipe.prepare(QUESTION, RIVERS).trace.positions
    small = RefragPipeline(*plain_parts(), window=whole)
    prepared = small.prepare(QUESTION, RIVERS, max_new_tokens=4, too_long="truncate")
    assert whole - 8 <= prepared.trace.positions <= whole - 4
    kept = texts(prepared)
    assert kept[:2] == [SEINE, RHINE] and PO.startswith(kept[2]) and kept[2] != PO


def test_the_decoders_own_window_is_the_default():
    pipe = pipeline()
    assert pipe.window == pipe.model.decoder.config.max_position_embeddings == 4096
