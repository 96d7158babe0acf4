"""Corpora: cuts against tokenizing the prefixes, stretches against brute force, the cache."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.data import corpus as corpus_file
from refrag_lightning.data.corpus import Corpus, open_corpus, write_corpus
from refrag_lightning.data.sources import TextSource
from tests.strategies import texts as random_texts
from tests.text.loading import refrag

TEXTS = [
    "The Seine flows  through Paris,\n\nand on to the sea near Le Havre.",
    "Größe, naïve café: 世界 👍 end",
    "Rivers: the Loire is longer; it rises in the south.",
]


class Lines(TextSource):
    """Texts given directly."""

    def __init__(self, lines, name="lines", **options):
        super().__init__(**options)
        self.lines, self.name, self.readings = lines, name, 0

    def read(self):
        self.readings += 1
        yield from self.lines

    def key(self):
        return {"lines": self.name, "held_out": self.held_out}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache for corpora; the tiny models stay where they are."""
    monkeypatch.setattr("refrag_lightning.data.corpus.cache_dir", lambda: tmp_path)
    return tmp_path


def _corpus(folder, texts, **settings):
    path = folder / "corpus.arrow"
    write_corpus(texts, refrag(**settings), path)
    return Corpus(path)


def test_cuts_of_a_text_by_hand(tmp_path):
    text = _corpus(tmp_path, [f"  {TEXTS[0]}\n"])[0]
    words = [text.between(a, a + 1) for a in range(len(text.places) - 1)]
    # White space stands before its word, and around the text it is left out.
    assert words[:6] == ["The", " Seine", " flows", "  through", " Paris,", "\n\nand"]
    assert words[6:] == [" on", " to", " the", " sea", " near", " Le", " Havre."]


@pytest.mark.parametrize("decoder", ["tiny/decoder", "tiny/gemma", "tiny/llama3"])
def test_counts_are_those_of_the_tokenizers_on_the_text_before(tmp_path, decoder):
    tokenizer = refrag(decoder=decoder)
    for text, whole in zip(_corpus(tmp_path, TEXTS, decoder=decoder), TEXTS, strict=True):
        assert text.between(0, len(text.places) - 1) == whole
        for cut in range(1, len(text.places)):
            before = text.between(0, cut)
            ids = tokenizer.encoder(before, add_special_tokens=False)["input_ids"]
            assert text.encoder[cut] == len(ids)
            # Tokens that end at the cut: the text after it changes none of them here.
            assert text.decoder[cut] == len(tokenizer.plain_decoder([before])[0].ids)


@given(texts=st.lists(random_texts(), max_size=4))
def test_a_corpus_has_every_text_whole(tmp_path_factory, texts):
    corpus = _corpus(tmp_path_factory.mktemp("corpus"), texts)
    tokenizer = refrag()
    stripped = [text.strip() for text in texts]
    kept = [text for text in stripped if tokenizer.plain_encoder([text])[0].ids.size]
    assert len(corpus) == len(kept)
    for number, whole in enumerate(kept):
        text = corpus[number]
        pieces = [text.between(a, b) for a, b in pairwise(range(len(text.places)))]
        assert "".join(pieces) == whole
        # Every piece has something to read.
        assert (np.diff(text.encoder) > 0).all() and (np.diff(text.decoder) >= 0).all()
        assert all(piece.strip() for piece in pieces)
        assert corpus.totals("encoder")[number] == tokenizer.plain_encoder([whole])[0].ids.size
        assert corpus.totals("decoder")[number] == tokenizer.plain_decoder([whole])[0].ids.size


def test_long_words_are_cut_inside_and_no_others(tmp_path):
    long = "https://example.org/" + "a1b2-" * 40
    text = _corpus(tmp_path, [f"See {long} for unconstitutional things."])[0]
    pieces = [text.between(a, b) for a, b in pairwise(range(len(text.places)))]
    assert pieces[0] == "See" and pieces[-3:] == [" for", " unconstitutional", " things."]
    assert "".join(pieces[1:-3]) == f" {long}" and len(pieces) > 40
    # Chinese has no white space: any place between tokens will do.
    text = _corpus(tmp_path, ["世界" * 30])[0]
    assert np.diff(text.encoder).max() == 1


@given(
    first=st.integers(0, 12),
    num_tokens=st.integers(1, 30),
    unit=st.sampled_from(["encoder", "decoder"]),
)
def test_stretches_against_brute_force(tmp_path_factory, first, num_tokens, unit):
    text = _corpus(tmp_path_factory.mktemp("corpus"), TEXTS[:1])[0]
    counts = text.counts(unit).tolist()
    if first < len(counts) - 1:
        fits = [c for c in range(len(counts)) if counts[c] - counts[first] <= num_tokens]
        assert text.after(first, num_tokens, unit) == max([*fits, first + 1])
    if first > 0:
        fits = [c for c in range(len(counts)) if counts[first] - counts[c] <= num_tokens]
        assert text.before(first, num_tokens, unit) == min([*fits, first - 1])


@pytest.mark.parametrize("unit", ["encoder", "decoder"])
def test_drawn_places_have_room_and_are_everywhere(tmp_path, unit):
    sentence = "The quick brown fox jumps over the lazy dog. "
    corpus = _corpus(tmp_path, ["Too short.", sentence * 10, sentence * 4])
    random = np.random.default_rng(0)
    wholes = [corpus[number].between(0, len(corpus[number].places) - 1) for number in range(3)]
    places = {1: set(), 2: set()}
    for _ in range(5000):
        text, first = corpus.draw(random, context=12, continuation=9, unit=unit)
        end = text.after(first, 12, unit)
        assert text.decoder[-1] - text.decoder[end] >= 9
        number = wholes.index(text.between(0, len(text.places) - 1))
        places[number].add(first)
    # Every word of the long text that leaves room begins a context at some time.
    counts = corpus[1].counts(unit)
    room = counts[-1] - 12 - np.ceil(9 * counts[-1] / corpus[1].decoder[-1])
    assert places[1] == {cut for cut in range(len(counts)) if counts[cut] < room}


def test_texts_are_drawn_by_their_room(tmp_path):
    corpus = _corpus(tmp_path, ["river " * 50, "stone " * 20])
    totals = corpus.totals("encoder")
    random = np.random.default_rng(0)
    drawn = [
        len(corpus.draw(random, context=10, continuation=0, unit="encoder")[0].places) > 30
        for _ in range(2000)
    ]
    expected = (totals[0] - 10) / (totals.sum() - 20)
    # Four standard deviations of the share.
    assert np.mean(drawn) == pytest.approx(expected, abs=4 * np.sqrt(expected / 2000))


def test_no_text_is_long_enough(tmp_path):
    corpus = _corpus(tmp_path, TEXTS)
    longest = corpus.totals("encoder").max()
    with pytest.raises(ValueError, match=rf"no text has the 500 encoder .* {longest} encoder"):
        corpus.draw(np.random.default_rng(0), context=500, continuation=5, unit="encoder")


def test_batches_of_the_file_make_no_difference(tmp_path, monkeypatch):
    whole = _corpus(tmp_path, TEXTS)
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(corpus_file, "_BATCH", 1)
    parts = _corpus(tmp_path / "parts", TEXTS)
    for corpus in (parts, pickle.loads(pickle.dumps(parts))):
        assert len(corpus) == len(whole) == 3
        for one, other in zip(whole, corpus, strict=True):
            assert bytes(one.data) == bytes(other.data)
            for name in ("places", "encoder", "decoder"):
                assert np.array_equal(getattr(one, name), getattr(other, name))


def test_cache_is_filled_once_and_keyed(cache):
    lines = Lines(TEXTS)
    first = open_corpus(lines, "train", refrag())
    again = open_corpus(lines, "train", refrag())
    assert lines.readings == 1 and first.path == again.path
    # Neither the rate nor what counts as a row changes where a text may be cut.
    open_corpus(lines, "train", refrag(compression=8, chunk_by="decoder"))
    assert lines.readings == 1
    paths = {
        open_corpus(lines, "train", tokenizer).path
        for tokenizer in (refrag("tiny/encoder-cased"), refrag(decoder="tiny/gemma"))
    }
    held_out = Lines(TEXTS, held_out=1 / 3)
    paths |= {open_corpus(held_out, split, refrag()).path for split in ("train", "val", "test")}
    assert len(paths | {first.path}) == 6


def test_interrupted_cache_is_not_taken_for_a_whole_one(cache):
    class Breaks(Lines):
        def read(self):
            yield TEXTS[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_corpus(Breaks(TEXTS), "train", refrag())
    assert len(open_corpus(Lines(TEXTS), "train", refrag())) == 3


def test_a_split_without_text_is_an_error(cache):
    with pytest.raises(ValueError, match=r'"lines".* has no text for val'):
        open_corpus(Lines(TEXTS), "val", refrag())
    with pytest.raises(ValueError, match="has no text for train"):
        open_corpus(Lines(["", " \n"], "blank"), "train", refrag())
