"""The timing of first tokens: what is timed, and what is made of it. No time is judged here."""

import json

import pytest

from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.inference.timing import (
    Spread,
    Timing,
    TimingReport,
    take_tokens,
    time_to_first_token,
)
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


def stored(rates=(4, 8)):
    model, tokenizer = parts()
    store = MemoryStore()
    for rate in rates:
        store.add(model, tokenizer.at(rate), [SEINE, RHINE, PO])
    return pipeline(store=store)


def test_a_report_of_stored_rows():
    pipe = stored()
    report = time_to_first_token(pipe, QUESTION, RIVERS, rounds=3, warmup=1)
    names = ["rows@4", "bare rows@4", "rows@8", "bare rows@8", "text", "bare text"]
    assert sorted(report.timings) == sorted(names)
    assert all(len(timing.seconds) == 3 for timing in report.timings.values())
    assert all(min(timing.seconds) > 0 for timing in report.timings.values())
    for rate in (4, 8):
        expected = pipe.prepare(QUESTION, RIVERS, rate=rate).trace
        assert report.timings[f"rows@{rate}"].positions == expected.positions
        assert report.timings[f"bare rows@{rate}"].positions == expected.positions
    assert report.tokens == report.timings["text"].positions == expected.positions_as_text
    # The index is asked in each round, and nothing is encoded.
    assert len(pipe.rows.store.asked) >= 2 * 4
    for timing in (report.timings["rows@4"], report.timings["rows@8"]):
        assert [part["encoding"] for part in timing.parts] == [0.0] * 3
    data = json.loads(json.dumps(report.as_dict()))
    assert set(data["overhead"]) == {"rows@4", "rows@8", "text"}
    assert report.table().row_count == 6
    # The pipeline is as it was.
    assert pipe.rows.store is not None


def test_rows_from_memory_and_from_the_encoder():
    pipe = pipeline()
    options = {"rounds": 2, "warmup": 0, "rates": [8], "full_text": False}
    kept = time_to_first_token(pipe, QUESTION, RIVERS, source="memory", **options)
    assert [part["encoding"] for part in kept.timings["rows@8"].parts] == [0.0] * 2
    fresh = time_to_first_token(pipe, QUESTION, RIVERS, source="encoded", **options)
    assert all(part["encoding"] > 0 for part in fresh.timings["rows@8"].parts)
    assert sorted(fresh.timings) == ["bare rows@8", "rows@8"]
    assert fresh.as_dict()["speedup"] == {}


def test_ratios_are_taken_round_by_round():
    timings = {
        "rows@8": Timing("rows@8", 9, [2.0, 4.4, 1.0]),
        "bare rows@8": Timing("bare rows@8", 9, [1.0, 4.0, 1.0]),
        "text": Timing("text", 50, [8.0, 8.8, 6.0]),
    }
    report = TimingReport(timings, "cpu", "store", (8,), 50)
    # 2.0, 1.1 and 1.0; tenths lie a fifth of the way to the middle.
    assert report.ratio("rows@8", "bare rows@8") == Spread(1.1, 1.02, pytest.approx(1.82))
    assert report.overhead("rows@8").median == pytest.approx(0.1)
    assert report.speedup(8).median == pytest.approx(4.0)


def test_what_cannot_be_timed():
    with pytest.raises(ValueError, match="a model without an encoder has no rows to time"):
        time_to_first_token(RefragPipeline(*plain_parts()), QUESTION, RIVERS)
    with pytest.raises(ValueError, match=r"source \('store'\): not all documents have rows at"):
        time_to_first_token(stored(rates=(4,)), QUESTION, RIVERS)
    with pytest.raises(ValueError, match=r"source \('disk'\) must be one of"):
        time_to_first_token(pipeline(), QUESTION, RIVERS, source="disk")
    with pytest.raises(ValueError, match=r"rounds \(0\) must be at least 1"):
        time_to_first_token(pipeline(), QUESTION, RIVERS, rounds=0)


def test_texts_of_so_many_tokens():
    pipe = pipeline()
    counts = [len(read.ids) for read in pipe.tokenizer.plain_decoder([SEINE, RHINE, PO])]
    taken = take_tokens([SEINE, RHINE, PO], pipe, counts[0] + 3)
    assert taken[0] == SEINE and len(taken) == 2 and RHINE.startswith(taken[1])
    assert len(pipe.tokenizer.plain_decoder([taken[1]])[0].ids) == 3
    assert take_tokens([SEINE, RHINE, PO], pipe, counts[0]) == [SEINE]
    assert take_tokens([SEINE, RHINE, PO], pipe, sum(counts)) == [SEINE, RHINE, PO]
    with pytest.raises(ValueError, match=f"the texts have {sum(counts)} tokens, fewer than 1000"):
        take_tokens([SEINE, RHINE, PO], pipe, 1000)
