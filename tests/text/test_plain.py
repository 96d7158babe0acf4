from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from refrag_lightning.text.alignment import anchors
from refrag_lightning.text.plain import PlainTokenizer
from tests.strategies import CONTROL_STRINGS, INJECTIONS, texts
from tests.text.loading import DECODERS, ENCODERS, hugging_face, plain
from tests.text.spaces import KINDS, said, spaced


def control_ids(name):
    tokenizer = hugging_face(name)
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def tokens_with_control_strings():
    control = [string for strings in CONTROL_STRINGS.values() for string in strings]
    return st.lists(st.sampled_from([*control, *INJECTIONS, " ", "a", "\n"]), max_size=8).map(
        "".join
    )


@given(texts() | tokens_with_control_strings())
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_no_text_yields_a_control_token(name, text):
    [tokens] = plain(name)([text])
    allowed = {hugging_face(name).unk_token_id} if name == "tiny/encoder" else set()
    assert not (control_ids(name) - allowed) & set(tokens.ids.tolist())


@pytest.mark.parametrize("name", DECODERS)
def test_every_control_string_of_a_family_is_ordinary_text(name):
    tokenizer = hugging_face(name)
    contents = [token.content for token in tokenizer.added_tokens_decoder.values()]
    assert set(CONTROL_STRINGS[name]) == set(contents)
    for content in contents:
        # The tokenizer itself reads it as one control token.
        assert len(tokenizer(content, add_special_tokens=False)["input_ids"]) == 1
        for text in (content, f"a{content}b", f" {content} ", content * 3, f"\n{content}\n"):
            [tokens] = plain(name)([text])
            assert not control_ids(name) & set(tokens.ids.tolist())
            assert tokenizer.decode(tokens.ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", DECODERS)
def test_templates_read_control_strings(name):
    tokenizer = hugging_face(name)
    text = "".join(CONTROL_STRINGS[name])
    [tokens] = PlainTokenizer(tokenizer, control=True)([text])
    assert tokens.ids.tolist() == tokenizer.convert_tokens_to_ids(list(CONTROL_STRINGS[name]))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_the_original_tokenizer_stays_as_it_is(name):
    tokenizer = hugging_face(name)
    text = "a " + "".join(token.content for token in tokenizer.added_tokens_decoder.values())
    before = tokenizer.backend_tokenizer.to_str(), tokenizer(text)["input_ids"]
    PlainTokenizer(tokenizer)([text])
    PlainTokenizer(tokenizer, control=True)([text])
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer(text)["input_ids"]) == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


@pytest.mark.real_models
@given(text=texts())
def test_the_default_decoder_yields_no_control_token(real_pair, text):
    _, decoder = real_pair
    tokenizer = hugging_face(decoder)
    strings = "<|im_end|>\n<|im_start|>system\n<|endoftext|><file_sep><repo_name>"
    [tokens] = plain(decoder)([text + strings])
    assert not control_ids(decoder) & set(tokens.ids.tolist())
    # SmolLM2's vocabulary lacks some bytes, so not every text comes back whole.
    decoded = tokenizer.decode(tokens.ids, clean_up_tokenization_spaces=False)
    assert str(decoded).endswith(strings)


@given(texts())
@pytest.mark.parametrize("name", [*DECODERS, "tiny/encoder-cased"])
def test_offsets_tile_the_text(name, text):
    [tokens] = plain(name)([text])
    assert (np.diff(tokens.ends) >= 0).all()
    assert tokens.ends[-1:].tolist() == ([len(text)] if text else [])
    # Where a token starts, another one ends, unless both are parts of one character.
    for start, previous_end, end in zip(
        tokens.starts[1:], tokens.ends[:-1], tokens.ends[1:], strict=True
    ):
        assert start == previous_end or (start < previous_end == end)


def metaspace(scheme):
    """A tokenizer in the manner of SentencePiece, whose `▁` before a text is artificial."""
    characters = {c: n + 1 for n, c in enumerate("▁abc")}
    tokenizer = Tokenizer(
        models.BPE(vocab={"<unk>": 0, **characters, "▁a": 9}, merges=[("▁", "a")])
    )
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme=scheme)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("scheme", ["always", "first", "prepend"])
def test_the_artificial_leading_space_is_off(scheme):
    tokenizer = metaspace(scheme)
    texts = ["a", "ab a", " a", ""]
    off = [t.ids.tolist() for t in PlainTokenizer(tokenizer)(texts)]
    assert off == [[2], [2, 3, 9], [9], []]
    kept = [t.ids.tolist() for t in PlainTokenizer(tokenizer, leading_space=True)(texts)]
    assert kept[:2] == [[9], [9, 3, 9]]
    assert PlainTokenizer(tokenizer)(texts)[1].ends.tolist() == [1, 2, 4]
    assert PlainTokenizer(tokenizer, leading_space=True)(texts)[1].ends.tolist() == [1, 2, 4]


@pytest.mark.parametrize("text", ["the river", " the", "  the<br>river<br> a", "<br>the", "\n", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_hugging_faces_wherever_a_text_stands(kind, text):
    tokenizer = spaced(*kind)
    plain = PlainTokenizer(tokenizer)

    def own(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert plain([text], "nothing")[0].ids.tolist() == own(text)
    assert plain([text], "added")[0].ids.tolist() == own("<s>" + text)[1:]
    assert plain([text], "added")[0].ids.tolist() == own("<br>" + text)[1:]
    (inside,) = plain([text])
    before, found, behind = text.partition("<br>")
    assert inside.ids.tolist() == [
        *plain([before])[0].ids,
        *(own(found + behind) if found else []),
    ]
    assert said(tokenizer, plain([before])[0].ids) == before
    for after in ("nothing", "added", "text"):
        (tokens,) = plain([text], after)
        assert tokens.ends[-1:].tolist() == ([len(text)] if text else [])
        for start, previous_end, end in zip(
            tokens.starts[1:], tokens.ends[:-1], tokens.ends[1:], strict=True
        ):
            assert start == previous_end or (start < previous_end == end)


@pytest.mark.parametrize("after", ["nothing", "added", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_yields_a_control_token_wherever_it_stands(kind, after):
    tokenizer = spaced(*kind)
    for text in ("</s>the<s>", "<turn></s>", "the</s></s> <br></s>the"):
        (tokens,) = PlainTokenizer(tokenizer)([text], after)
        control = {"<s>", "</s>", "<turn>", "<text>"}
        assert not control & {*tokenizer.convert_ids_to_tokens(tokens.ids)}
        assert tokens.ends[-1] == len(text)


def test_an_added_token_in_the_normalized_text_has_no_space_behind_it():
    tokenizer = spaced("bpe", "prepend")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.add_tokens([AddedToken("<mark>", normalized=True)])
    plain = PlainTokenizer(tokenizer)
    whole = tokenizer("<mark>the", add_special_tokens=False)["input_ids"]
    (first,) = plain(["<mark>"], "nothing")
    (rest,) = plain(["the"], plain.behind(first))
    assert [*first.ids, *rest.ids] == whole


def test_a_tokenizer_without_a_space_of_its_own_reads_a_text_once():
    assert not plain("tiny/decoder").depends_on_place
    assert not PlainTokenizer(spaced("unigram", "never")).depends_on_place
    assert PlainTokenizer(spaced("unigram", "first")).depends_on_place
    first, never = (metaspace(scheme) for scheme in ("first", "never"))
    assert PlainTokenizer(first).fingerprint != PlainTokenizer(never).fingerprint


def test_the_byte_level_prefix_space_is_off():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    space, letter = alphabet.index("Ġ"), alphabet.index("a")
    assert PlainTokenizer(wrapped)(["a"])[0].ids.tolist() == [letter]
    assert PlainTokenizer(wrapped, leading_space=True)(["a"])[0].ids.tolist() == [space, letter]


@pytest.mark.parametrize(
    "post_processor",
    [
        processors.ByteLevel(trim_offsets=True),
        processors.RobertaProcessing(("a", 0), ("a", 0), trim_offsets=True),
    ],
)
def test_spaces_belong_to_the_tokens_that_have_them(post_processor):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1, "Ġa": 2}, merges=[("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = post_processor
    [tokens] = PlainTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))(["a a  a"])
    assert tokens.starts.tolist() == [0, 1, 3, 4]
    assert tokens.ends.tolist() == [1, 3, 4, 6]


def test_a_byte_level_token_that_goes_on_beyond_a_character():
    # "é" is the bytes C3 A9, "Ã" and "©" in the byte alphabet; the merge joins A9 with the b.
    vocabulary = {"a": 0, "b": 1, "Ã": 2, "©": 3, "©b": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("©", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    [tokens] = PlainTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))(["aéba"])
    assert tokens.ids.tolist() == [0, 2, 4, 0]
    # No token ends between é and b, so the first byte of é ends with the b.
    assert tokens.ends.tolist() == [1, 3, 3, 4]
    found = anchors(np.asarray([1, 2, 3, 4]), tokens.ends)
    assert [found[0].tolist(), found[1].tolist()] == [[0, 2, 3], [0, 2, 3]]


def unigram():
    """A vocabulary with control strings as ordinary pieces, as T5's and XLM-R's have them."""
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), ("a</s>b", -1.0)]
    pieces += [(c, -3.0) for c in "<s/>ab ▁"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("text", ["</s>", "a </s> b", "<s></s>", "</s></s>a", "<<s>>", "</</s>s>"])
def test_control_strings_among_a_unigram_vocabulary_are_cut(text):
    tokenizer = unigram()
    assert {1, 2} & set(tokenizer.backend_tokenizer.encode(text).ids)
    [tokens] = PlainTokenizer(tokenizer)([text])
    assert not {1, 2} & set(tokens.ids.tolist())
    read = "".join(text[s:e] for s, e in zip(tokens.starts, tokens.ends, strict=True))
    assert read == text
    assert "".join(tokenizer.convert_ids_to_tokens(tokens.ids.tolist())) == text


def test_many_control_strings_of_a_unigram_vocabulary_are_cut_at_once():
    [tokens] = PlainTokenizer(unigram())(["</s>" * 20_000])
    assert not {1, 2} & set(tokens.ids.tolist())
    assert tokens.ends[-1] == 80_000


def test_a_single_character_control_token_cannot_be_cut():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("§", -1.0)], unk_id=0))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="§")
    assert PlainTokenizer(wrapped)(["aa"])[0].ids.tolist() == [1, 1]
    with pytest.raises(ValueError, match="reads '§' at character 1 as a control token"):
        PlainTokenizer(wrapped)(["a§"])


def test_added_tokens_that_the_template_speaks_are_control_tokens():
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate("<turn>ab")}, merges=[]))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.add_tokens([AddedToken("<turn>", special=False), AddedToken("ab", special=False)])
    turn, ab = (wrapped.convert_tokens_to_ids(token) for token in ("<turn>", "ab"))
    assert PlainTokenizer(wrapped)(["<turn>ab"])[0].ids.tolist() == [turn, ab]
    wrapped.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    ids = PlainTokenizer(wrapped)(["<turn>ab"])[0].ids.tolist()
    assert turn not in ids
    assert ids[-1] == ab
    assert PlainTokenizer(wrapped, control=True)(["<turn>ab"])[0].ids.tolist() == [turn, ab]


class CharacterPairs(PreTrainedTokenizer):
    """A tokenizer in Python, without offsets: two characters a token, by code points."""

    @property
    def vocab_size(self):
        return 0x110000

    def get_vocab(self):
        return {"<eos>": 0, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return [text[n : n + 2] for n in range(0, len(text), 2)]

    def _convert_token_to_id(self, token):
        if token == "<eos>":
            return 0
        return sum(ord(c) << (8 * n) for n, c in enumerate(token))

    def _convert_id_to_token(self, index):
        if index == 0:
            return "<eos>"
        return "".join(chr((index >> shift) & 255) for shift in (0, 8) if index >> shift)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.mark.parametrize("text", ["", "a", "abcde", "say <eos> . , twice<eos>", "  x  ", "don 't"])
def test_a_slow_tokenizer_has_its_ends_recovered(text):
    tokenizer = CharacterPairs(eos_token="<eos>")
    assert not tokenizer.is_fast
    [tokens] = PlainTokenizer(tokenizer)([text])
    assert tokens.ends.tolist() == [*range(2, len(text), 2), *[len(text)][: len(text)]]
    assert tokens.starts.tolist() == list(range(0, len(text), 2))
    assert 0 not in tokens.ids.tolist()


@given(texts())
@example("")
def test_a_batch_equals_its_texts_one_by_one(text):
    together = plain("tiny/decoder")([text, "other", text])
    [alone] = plain("tiny/decoder")([text])
    for tokens in (together[0], together[2]):
        assert tokens.ids.tolist() == alone.ids.tolist()
        assert tokens.starts.tolist() == alone.starts.tolist()
        assert tokens.ends.tolist() == alone.ends.tolist()
    assert tokens.ids.dtype == tokens.starts.dtype == tokens.ends.dtype == np.int64


@pytest.mark.parametrize("name", ["tiny/encoder", "tiny/decoder"])
def test_a_lone_surrogate_is_named(name):
    with pytest.raises(ValueError, match=r"'\\ud83d' at character 2 of text 1 is no character"):
        plain(name)(["fine", "ab\ud83d"])


@pytest.mark.parametrize("from_end", [False, True], ids=["beginning", "end"])
@pytest.mark.parametrize("name", DECODERS)
@given(text=texts(), num_tokens=st.integers(0, 12))
def test_a_cut_text_never_has_more_tokens(name, from_end, text, num_tokens):
    tokenizer = plain(name)
    piece = tokenizer.cut(text, num_tokens, from_end=from_end)
    assert text.endswith(piece) if from_end else text.startswith(piece)
    whole, cut = (len(read.ids) for read in tokenizer([text, piece]))
    assert cut <= num_tokens and (piece == text or cut < whole or not num_tokens)


@pytest.mark.parametrize("from_end", [False, True], ids=["beginning", "end"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_cut_text_has_the_number_of_tokens(name, from_end):
    tokenizer = plain(name)
    text = (
        "Unquestionably, the Seine (775 km) flows through Paris; antidisestablishmentarians, too."
    )
    for num_tokens in range(len(tokenizer([text])[0].ids) + 1):
        piece = tokenizer.cut(text, num_tokens, from_end=from_end)
        assert len(tokenizer([piece])[0].ids) == num_tokens
    assert tokenizer.cut(text, 1000, from_end=from_end) == text
