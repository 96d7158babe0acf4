from __future__ import annotations

import time
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refrag_lightning.text.alignment import (
    Alignment,
    align,
    align_rows,
    anchors,
    anchors_by_decoding,
    ends_by_decoding,
)
from refrag_lightning.text.packing import rows_of_tokens
from tests.strategies import PYDOC, pydoc_excerpts, texts
from tests.text.loading import DECODERS, hugging_face, plain, refrag


def decode(name):
    tokenizer = hugging_face(name)
    return lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def pairs(found):
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


# "The Seine's 👍 ok": encoder tokens The|Seine|'|s|👍|ok, decoder tokens Th|e| Seine|'s| |👍's four
# bytes| o|k.
ENCODER_ENDS = np.asarray([3, 9, 10, 11, 13, 16])
DECODER_ENDS = np.asarray([2, 3, 9, 11, 12, 13, 13, 13, 13, 15, 16])


def test_hand_worked_anchors_and_spans():
    found = anchors(ENCODER_ENDS, DECODER_ENDS)
    # Of the four bytes of the emoji the last one ends with it: token 8.
    assert pairs(found) == [(0, 1), (1, 2), (3, 3), (4, 8), (5, 10)]
    alignment = align(ENCODER_ENDS, DECODER_ENDS)
    assert alignment.num_spans == 5
    assert alignment.encoder_spans.tolist() == [0, 1, 2, 2, 3, 4]
    assert alignment.decoder_spans.tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 3, 4, 4]
    assert alignment.coverage == 1.0
    # All but the span of five decoder tokens.
    assert alignment.granularity == pytest.approx(6 / 11)


def test_hand_worked_tokens_after_the_last_anchor():
    # "abcd": a|b|cd against ab|c|d, and the encoder drops a last character.
    alignment = align(np.asarray([1, 2, 4]), np.asarray([2, 3, 4, 5, 5]))
    assert alignment.encoder_spans.tolist() == [0, 0, 1]
    assert alignment.decoder_spans.tolist() == [0, 1, 1, -1, -1]
    assert alignment.coverage == pytest.approx(3 / 5)
    assert alignment.granularity == pytest.approx(3 / 5)


def test_no_anchor_and_no_token():
    none = np.zeros(0, dtype=np.int64)
    alignment = align(np.asarray([2]), np.asarray([1, 3]))
    assert alignment.num_spans == 0
    assert alignment.decoder_spans.tolist() == [-1, -1]
    assert (alignment.coverage, alignment.granularity) == (0.0, 0.0)
    for ends in ((none, none), (none, np.asarray([1])), (np.asarray([1]), none)):
        alignment = align(*ends)
        assert alignment.num_spans == 0
        assert (alignment.coverage, alignment.granularity) == (0.0, 0.0)
    # A token without a character of its own, at the start, is no anchor.
    assert pairs(anchors(np.asarray([0, 2]), np.asarray([0, 2]))) == [(1, 1)]


@pytest.mark.parametrize("name", DECODERS)
def test_an_emoji_split_into_bytes_by_real_tokenizers(name):
    text = "a👍b"
    [encoder], [decoder] = plain("tiny/encoder-cased")([text]), plain(name)([text])
    # Trained on English, both split the emoji into its four bytes.
    assert encoder.ends.tolist() == [1, 2, 2, 2, 2, 3]
    assert decoder.ends.tolist() == [1, 2, 2, 2, 2, 3]
    assert pairs(anchors(encoder.ends, decoder.ends)) == [(0, 0), (4, 4), (5, 5)]


def test_an_encoder_that_drops_case_and_accents():
    text = "ÉLAN e\u0301t\u00e9, a café"
    [encoder], [decoder] = plain("tiny/encoder")([text]), plain("tiny/decoder")([text])
    words = "".join(hugging_face("tiny/encoder").convert_ids_to_tokens(encoder.ids.tolist()))
    assert words.replace("##", "") == "elanete,acafe"
    ends = {int(encoder.ends[i]) for i, _ in pairs(anchors(encoder.ends, decoder.ends))}
    # The ends of ÉLAN, été (of four characters here), the comma, a, café.
    assert {4, 9, 10, 12, 17} <= ends
    assert align(encoder.ends, decoder.ends).coverage == 1.0


@given(texts())
@example("漢字 👩‍👩‍👧‍👦\ufffd\ufffd x")
@pytest.mark.parametrize("name", DECODERS)
def test_anchors_equal_those_of_decoded_prefixes(name, text):
    # Both decode exactly, so the reference applies to every text.
    [encoder], [decoder] = plain("tiny/encoder-cased")([text]), plain(name)([text])
    reference = anchors_by_decoding(
        text,
        encoder.ids.tolist(),
        decode("tiny/encoder-cased"),
        decoder.ids.tolist(),
        decode(name),
    )
    assert pairs(anchors(encoder.ends, decoder.ends)) == pairs(reference)


@pytest.mark.real_models
@given(text=pydoc_excerpts(400))
def test_anchors_equal_those_of_decoded_prefixes_for_the_default_decoder(real_pair, text):
    _, name = real_pair
    [encoder], [decoder] = plain("tiny/encoder-cased")([text]), plain(name)([text])
    reference = anchors_by_decoding(
        text,
        encoder.ids.tolist(),
        decode("tiny/encoder-cased"),
        decoder.ids.tolist(),
        decode(name),
    )
    assert len(reference[0]) > 0
    assert pairs(anchors(encoder.ends, decoder.ends)) == pairs(reference)


@given(texts())
@pytest.mark.parametrize("name", ["tiny/encoder-cased", *DECODERS])
def test_ends_by_decoding_equal_the_offsets(name, text):
    [tokens] = plain(name)([text])
    found = ends_by_decoding(text, tokens.ids.tolist(), decode(name))
    assert found.tolist() == tokens.ends.tolist()


def test_ends_by_decoding_refuses_a_decoding_that_is_not_exact():
    [tokens] = plain("tiny/encoder")(["ÉLAN"])
    with pytest.raises(
        ValueError, match="must decode its tokens back to the text, but gave 'elan'"
    ):
        ends_by_decoding("ÉLAN", tokens.ids.tolist(), decode("tiny/encoder"))


@given(st.lists(st.integers(1, 3)), st.lists(st.integers(0, 3)))
def test_spans_cover_the_same_characters_on_both_sides(encoder_lengths, decoder_lengths):
    encoder_ends = np.cumsum(np.asarray(encoder_lengths, dtype=np.int64))
    decoder_ends = np.cumsum(np.asarray(decoder_lengths, dtype=np.int64))
    alignment = align(encoder_ends, decoder_ends)
    for spans in (alignment.encoder_spans, alignment.decoder_spans):
        covered = spans[spans >= 0]
        # Every span has tokens; what has none comes last.
        assert np.unique(covered).tolist() == list(range(alignment.num_spans))
        assert (np.diff(covered) >= 0).all()
        assert (spans[len(covered) :] == -1).all()
    for span in range(alignment.num_spans):
        ends = encoder_ends[alignment.encoder_spans == span]
        assert ends[-1] == decoder_ends[alignment.decoder_spans == span][-1]
        # The finest cut: no end inside the span is common to both sides.
        inner = set(ends) & set(decoder_ends[alignment.decoder_spans == span])
        assert inner == {ends[-1]}
    assert 0 <= alignment.granularity <= alignment.coverage <= 1


def test_hand_worked_alignment_of_rows():
    # Rows 1 and 4 have no decoder token: row 1 joins row 2, and row 4, the last, has no span.
    alignment = align_rows(np.asarray([0, 0, 2, 3, 3]), 5)
    assert alignment.encoder_spans.tolist() == [0, 1, 1, 2, -1]
    assert alignment.decoder_spans.tolist() == [0, 0, 1, 2, 2]
    assert alignment.num_spans == 3
    assert alignment.granularity == 1.0
    none = align_rows(np.zeros(0, dtype=np.int64), 2)
    assert none.num_spans == 0
    assert none.encoder_spans.tolist() == [-1, -1]


@given(texts())
def test_rows_align_with_all_decoder_tokens(text):
    [packed] = refrag("tiny/encoder-cased", compression=3).pack([text])
    [decoder] = plain("tiny/decoder")([text])
    alignment = align_rows(rows_of_tokens(packed.bounds, decoder.ends), packed.num_rows)
    assert alignment.coverage == (1.0 if text else 0.0)
    assert len(alignment.encoder_spans) == packed.num_rows
    assert np.unique(alignment.decoder_spans).tolist() == list(range(alignment.num_spans))


def best_seconds(encoder_ends, decoder_ends, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        align(encoder_ends, decoder_ends)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_time_is_under_a_millisecond_and_linear(record_property):
    text = PYDOC
    [encoder], [decoder] = plain("tiny/encoder")([text]), plain("tiny/decoder")([text])
    assert min(len(encoder.ends), len(decoder.ends)) > 100_000
    seconds = {
        size: best_seconds(encoder.ends[:size], decoder.ends[:size], repeats)
        for size, repeats in ((512, 200), (10_000, 20), (100_000, 10))
    }
    record_property("alignment seconds by tokens a side", str(seconds))
    print({size: f"{1e3 * value:.3f} ms" for size, value in seconds.items()})
    assert seconds[512] < 1e-3
    assert seconds[100_000] < 25 * seconds[10_000]


@pytest.mark.real_models
def test_granularity_of_the_default_models_on_the_language_reference(real_pair, record_property):
    encoder, decoder = real_pair
    names = sorted(topics)
    encoder_tokens = plain(encoder, leading_space=True)([topics[name] for name in names])
    decoder_tokens = plain(decoder)([topics[name] for name in names])
    alignments: list[Alignment] = []
    for encoder_side, decoder_side in zip(encoder_tokens, decoder_tokens, strict=True):
        alignments.append(align(encoder_side.ends, decoder_side.ends))
    sizes = [len(alignment.decoder_spans) for alignment in alignments]
    granularity = np.average([a.granularity for a in alignments], weights=sizes)
    coverage = np.average([a.coverage for a in alignments], weights=sizes)
    record_property("granularity", str(granularity))
    record_property("coverage", str(coverage))
    print(f"granularity {granularity:.4f} coverage {coverage:.4f} of {sum(sizes)} decoder tokens")
    seconds = best_seconds(encoder_tokens[0].ends[:512], decoder_tokens[0].ends[:512], 100)
    assert seconds < 1e-3
    assert granularity >= 0.85
    assert coverage > 0.99
