from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.text.documents import Document
from refrag_lightning.text.packing import cut_windows, pack, rows_of_tokens
from refrag_lightning.text.sentences import sentence_ends
from tests.strategies import PYDOC, texts
from tests.text.loading import ENCODERS, encoded, plain, refrag

TOKENS = ("encoder", "decoder")
CHUNK_BY = (*TOKENS, "sentence")
pytestmark = pytest.mark.filterwarnings("ignore:the encoder.s tokenizer cannot read")


def pack_with(name, text, *, compression, chunk_by, **settings):
    [encoder] = plain(name, leading_space=True)([text])
    [decoder] = plain("tiny/decoder")([text])
    packed = pack(
        text, encoder, compression=compression, chunk_by=chunk_by, decoder=decoder, **settings
    )
    return packed, encoder, decoder


# "The Seine, wow": the tokens The|Seine|,|w|ow; a gap goes to the row after it.
SEINE = "The Seine, wow"
SEINE_TOKENS = encoded((0, 3), (4, 9), (9, 10), (11, 12), (12, 14))


def test_hand_worked_rows_of_two():
    packed = pack(SEINE, SEINE_TOKENS, compression=2)
    assert packed.bounds.tolist() == [0, 9, 12, 14]
    assert packed.token_rows.tolist() == [0, 0, 1, 1, 2]
    assert packed.row_sizes.tolist() == [2, 2, 1]
    assert packed.encoder_ids.tolist() == [10, 11, 12, 13, 14]
    assert packed.lost.tolist() == [0, 0, 0]
    # Decoder tokens "The| Sei|ne,| w|ow": "ne," ends in the second row and belongs to it.
    assert rows_of_tokens(packed.bounds, np.asarray([3, 7, 10, 12, 14])).tolist() == [0, 0, 1, 1, 2]


def test_hand_worked_rows_counted_by_the_decoder():
    # Decoder tokens "Th|e| Sei|ne,| wow" in twos: "The" | " Seine," | " wow".
    decoder = encoded((0, 2), (2, 3), (3, 7), (7, 10), (10, 14))
    packed = pack(SEINE, SEINE_TOKENS, compression=2, chunk_by="decoder", decoder=decoder)
    assert packed.bounds.tolist() == [0, 3, 10, 14]
    assert packed.token_rows.tolist() == [0, 1, 1, 2, 2]
    # One by one, "Th" and " Sei" have no encoder token and join the next row.
    packed = pack(SEINE, SEINE_TOKENS, compression=1, chunk_by="decoder", decoder=decoder)
    assert packed.bounds.tolist() == [0, 3, 10, 14]
    # A row without an encoder token at the end joins the one before.
    decoder = encoded((0, 10), (10, 14), (14, 16))
    packed = pack(
        SEINE + "\x00\x00", SEINE_TOKENS, compression=1, chunk_by="decoder", decoder=decoder
    )
    assert packed.bounds.tolist() == [0, 10, 16]
    assert packed.token_rows.tolist() == [0, 0, 0, 1, 1]


def test_long_rows_are_split_where_rows_are_counted_by_the_decoder():
    decoder = encoded((0, 12), (12, 14))
    packed = pack(
        SEINE, SEINE_TOKENS, compression=1, chunk_by="decoder", decoder=decoder, max_row_tokens=3
    )
    assert packed.bounds.tolist() == [0, 10, 12, 14]
    assert packed.token_rows.tolist() == [0, 0, 0, 1, 2]
    # "The|Seine" and ",|w" fill two rows of two tokens.
    packed = pack(
        SEINE, SEINE_TOKENS, compression=1, chunk_by="decoder", decoder=decoder, max_row_tokens=2
    )
    assert packed.bounds.tolist() == [0, 9, 12, 14]


def test_hand_worked_rows_of_one_sentence():
    # "A b. Cd! \x00. e": the tokens A|b|.|C|d|!|e; of the third sentence the encoder reads nothing,
    # so it joins the last one.
    text = "A b. Cd! \x00. e"
    tokens = encoded((0, 1), (2, 3), (3, 4), (5, 6), (6, 7), (7, 8), (12, 13))
    packed = pack(text, tokens, compression=2, chunk_by="sentence")
    assert packed.bounds.tolist() == [0, 4, 8, 13]
    assert packed.token_rows.tolist() == [0, 0, 0, 1, 1, 1, 2]
    # Sentences of three tokens are longer than 2 * 1 and become two parts, 2 + 1.
    packed = pack(text, tokens, compression=1, chunk_by="sentence")
    assert packed.bounds.tolist() == [0, 3, 4, 7, 8, 13]
    assert packed.token_rows.tolist() == [0, 0, 1, 2, 2, 3, 4]
    # With a multiple of 3 they fit again; but not into what the encoder reads.
    packed = pack(text, tokens, compression=1, chunk_by="sentence", max_sentence=3)
    assert packed.bounds.tolist() == [0, 4, 8, 13]
    packed = pack(
        text, tokens, compression=1, chunk_by="sentence", max_sentence=3, max_row_tokens=1
    )
    assert packed.row_sizes.tolist() == [1] * 7


def test_hand_worked_lost_characters():
    # "a 漢 b\x00": the unknown token 漢 is lost, the NUL has no token at all, spaces never count.
    tokens = encoded((0, 1), (2, 3), (4, 5), ids=[5, 1, 6])
    packed = pack("a 漢 b\x00", tokens, compression=2, unknown_id=1)
    assert packed.lost.tolist() == [1, 1]
    packed = pack("a 漢 b\x00", tokens, compression=2)
    assert packed.lost.tolist() == [0, 1]


def test_lost_characters_of_a_real_tokenizer():
    # The uncased encoder was trained on English: it has no piece for the Chinese characters.
    [packed] = refrag(compression=100).pack(["an apple a day keeps the doctor away " * 5 + "漢字"])
    assert packed.lost.sum() == 2
    with pytest.warns(UserWarning, match="cannot read 2 of the 8 characters"):
        refrag().pack(["a day 漢字"])
    # A byte-level one reads everything.
    [packed] = refrag("tiny/encoder-cased").pack(["a 漢字 👍"])
    assert packed.lost.sum() == 0


@given(text=texts(), compression=st.integers(1, 9))
@pytest.mark.parametrize("chunk_by", CHUNK_BY)
@pytest.mark.parametrize("name", ENCODERS)
def test_rows_tile_the_document_and_have_their_tokens(name, chunk_by, text, compression):
    packed, encoder, decoder = pack_with(name, text, compression=compression, chunk_by=chunk_by)
    if not text:
        assert packed.num_rows == 0
        return
    assert packed.bounds[0] == 0
    assert packed.bounds[-1] == len(text)
    assert (np.diff(packed.bounds) >= 0).all()
    assert packed.encoder_ids.tolist() == encoder.ids.tolist()
    assert packed.row_sizes.sum() == len(encoder.ids)
    if len(encoder.ids):
        assert (packed.row_sizes > 0).all()
    if chunk_by == "encoder":
        assert (packed.row_sizes[:-1] == compression).all()
        assert packed.row_sizes[-1:].max(initial=0) <= compression
    elif chunk_by == "decoder":
        counted = decoder.ends[compression - 1 :: compression]
        assert set(packed.bounds[1:-1]) <= set(counted)
    else:
        # A row ends where a sentence does, or inside one that is too long.
        assert packed.row_sizes.max(initial=0) <= 2 * compression
        whole, _, _ = pack_with(name, text, compression=10_000, chunk_by=chunk_by)
        assert set(whole.bounds) <= set(packed.bounds)
        assert set(whole.bounds) <= {0, *sentence_ends(text)}
        # By tokens: a row that ends inside a character ends where the next one does.
        first_tokens = np.searchsorted(whole.token_rows, np.arange(whole.num_rows))
        first_rows = packed.token_rows[first_tokens] if len(encoder.ids) else [0]
        for sizes in np.split(packed.row_sizes, first_rows[1:]):
            assert sizes.max(initial=0) - sizes.min(initial=sizes.max(initial=0)) <= 1
            assert len(sizes) == max(1, -(-sizes.sum() // (2 * compression)))


@pytest.mark.parametrize("compression", [1, 3, 8])
@pytest.mark.parametrize("chunk_by", TOKENS)
@pytest.mark.parametrize("name", ENCODERS)
def test_rows_of_english_have_exactly_k_counted_tokens(name, chunk_by, compression):
    text = PYDOC[:5000]
    packed, _, decoder = pack_with(name, text, compression=compression, chunk_by=chunk_by)
    counts = packed.row_sizes
    if chunk_by == "decoder":
        rows = rows_of_tokens(packed.bounds, decoder.ends)
        counts = np.bincount(rows, minlength=packed.num_rows)
        # A row that no encoder token ends in has joined the next one.
        assert (counts[:-1] % compression == 0).all()
        if compression == 8:
            assert (counts[:-1] == compression).mean() > 0.95
    else:
        assert (counts[:-1] == compression).all()
    assert 0 < counts[-1] <= 2 * compression


@given(text=texts(), compression=st.integers(1, 6), seed=st.integers(0, 99))
@pytest.mark.parametrize("chunk_by", CHUNK_BY)
@pytest.mark.parametrize("name", ENCODERS)
def test_any_set_of_expanded_rows_keeps_its_decoder_tokens_once(
    name, chunk_by, text, compression, seed
):
    tokenizer = refrag(name, compression=compression, chunk_by=chunk_by, header="", footer="")
    [decoder] = plain("tiny/decoder")([text])
    [packed] = tokenizer.pack([text])
    # The row of a token by the definition: the one that holds its last character.
    spans = list(zip(packed.bounds[:-1], packed.bounds[1:], strict=True))
    row_of = [
        next(n for n, (start, end) in enumerate(spans) if start <= last < end)
        for last in decoder.ends - 1
    ]
    rng = random.Random(seed)
    chosen = {row for row in range(packed.num_rows) if rng.random() < 0.5}
    others = set(range(packed.num_rows)) - chosen
    for rows in (chosen, others):
        batch = tokenizer([[Document(text)]], expand=[sorted(rows)])
        is_token = batch["slot_ids"][0] < 0
        expected = [i for i, row in zip(decoder.ids.tolist(), row_of, strict=True) if row in rows]
        assert batch["input_ids"][0][is_token].tolist() == expected
        # The other rows stand between them, in order, each once.
        slots = batch["slot_ids"][0][~is_token].tolist()
        compressed = [row.row for row in batch.trace[0] if row.state == "vector"]
        assert slots == compressed


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(9, 20))
def test_windows_are_filled_greedily_and_never_exceed_the_maximum(sizes, max_tokens):
    windows = cut_windows(np.asarray(sizes, dtype=np.int64), max_tokens)
    assert len(windows) == len(sizes)
    expected, used, window = [], 0, 0
    for size in sizes:
        if used + size > max_tokens:
            used, window = 0, window + 1
        used += size
        expected.append(window)
    assert windows.tolist() == expected


@pytest.mark.parametrize("chunk_by", CHUNK_BY)
def test_windows_depend_on_the_document_alone(chunk_by):
    tokenizer = refrag(context="document", max_encoder_length=32, compression=5, chunk_by=chunk_by)
    document = Document(PYDOC[1000:2000])
    other = Document(PYDOC[5000:5300])

    def windows(batch, rows):
        rows_RT = batch["encoder_row_ids"]
        first = min(rows)
        found = []
        for ids, row_ids in zip(batch["encoder_input_ids"], rows_RT, strict=True):
            if set(row_ids.tolist()) - {-1} <= rows and (row_ids >= 0).any():
                real = [
                    (i, r - first if r >= 0 else r)
                    for i, r in zip(ids.tolist(), row_ids.tolist(), strict=True)
                ]
                while real[-1] == (tokenizer.encoder.pad_token_id, -1):
                    real.pop()
                found.append(real)
        return found

    alone = tokenizer([[document]])
    beside = tokenizer([["Question? ", other, "and"], [document, other, "x"]])
    rows = {row.row for row in beside.trace[1] if row.document == 0}
    expected = windows(alone, {row.row for row in alone.trace[0]})
    assert windows(beside, rows) == expected
    assert len(expected) > 3
    assert alone["encoder_input_ids"].shape[1] <= 32
    # A row stands whole in one window.
    for row in alone.trace[0]:
        assert ((alone["encoder_row_ids"] == row.row).any(dim=1)).sum() == 1


@pytest.mark.parametrize("context", ["row", "document"])
@pytest.mark.parametrize("chunk_by", CHUNK_BY)
@pytest.mark.parametrize("name", ENCODERS)
def test_the_empty_document_has_no_row(name, chunk_by, context):
    tokenizer = refrag(name, chunk_by=chunk_by, context=context, header="", footer="")
    for expand in ("none", "all"):
        batch = tokenizer("ab<doc></doc>cd", expand=expand)
        assert batch.num_rows == 0
        assert batch["input_ids"].tolist()[0] == [
            *plain("tiny/decoder")(["ab"])[0].ids,
            *plain("tiny/decoder")(["cd"])[0].ids,
        ]


@pytest.mark.parametrize("chunk_by", TOKENS)
@pytest.mark.parametrize("name", ENCODERS)
def test_rows_of_one_character(name, chunk_by):
    packed, encoder, _ = pack_with(name, "a!b?", compression=1, chunk_by=chunk_by)
    assert [encoder.ends.tolist(), packed.bounds.tolist()] == [[1, 2, 3, 4], [0, 1, 2, 3, 4]]
    packed, _, _ = pack_with(name, "a", compression=1, chunk_by=chunk_by)
    assert packed.bounds.tolist() == [0, 1]


@pytest.mark.parametrize("chunk_by", CHUNK_BY)
def test_a_document_that_the_encoder_reads_nothing_of(chunk_by):
    # The uncased encoder drops control characters.
    packed, encoder, _ = pack_with("tiny/encoder", "\x07\x1b", compression=1, chunk_by=chunk_by)
    assert encoder.ids.size == 0
    assert packed.lost.sum() == 2
    tokenizer = refrag(chunk_by=chunk_by, header="", footer="")
    with pytest.warns(UserWarning, match="cannot read"):
        compressed = tokenizer("<doc>\x07\x1b</doc>")
    assert compressed["input_ids"].shape == (1, 0)
    assert [row.state for row in compressed.trace[0]] == ["empty"]
    with pytest.warns(UserWarning, match="cannot read"):
        expanded = tokenizer("<doc>\x07\x1b</doc>", expand="all")
    assert expanded["input_ids"][0].tolist() == plain("tiny/decoder")(["\x07\x1b"])[0].ids.tolist()


@given(text=texts(), max_row_tokens=st.integers(1, 5))
@pytest.mark.parametrize("name", ENCODERS)
def test_no_row_has_more_tokens_than_the_encoder_reads(name, text, max_row_tokens):
    packed, encoder, _ = pack_with(
        name, text, compression=5, chunk_by="decoder", max_row_tokens=max_row_tokens
    )
    assert packed.row_sizes.max(initial=0) <= max_row_tokens
    whole, _, _ = pack_with(name, text, compression=5, chunk_by="decoder")
    assert set(whole.bounds) <= set(packed.bounds)
    assert packed.bounds[-1] == len(text)
    assert packed.row_sizes.sum() == len(encoder.ids)


def test_a_word_of_200_letters_by_the_decoder():
    # One decoder row may be many encoder tokens, and the other way round.
    for name in ENCODERS:
        packed, encoder, decoder = pack_with(
            name, "x" * 200, compression=8, chunk_by="decoder", max_row_tokens=16
        )
        assert packed.row_sizes.sum() == len(encoder.ids)
        assert (packed.row_sizes > 0).all()
        rows = rows_of_tokens(packed.bounds, decoder.ends)
        assert (np.diff(rows) >= 0).all()


def test_compression_below_one_is_refused():
    with pytest.raises(ValueError, match=r"compression \(0\) must be at least 1"):
        pack("a", encoded((0, 1)), compression=0)
