from __future__ import annotations

import copy
import json
import random
import re
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from refrag_lightning.hub import ModelNotFoundError, resolve
from refrag_lightning.text.documents import Document, DocumentSyntaxError
from refrag_lightning.text.plain import PlainTokenizer
from refrag_lightning.text.segments import render
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.strategies import CONTROL_STRINGS, INJECTIONS, PYDOC, conversations, parts, random_prompt
from tests.text.loading import DECODERS, ENCODERS, hugging_face, plain, refrag
from tests.text.spaces import KINDS, said, spaced

pytestmark = pytest.mark.filterwarnings("ignore:the encoder.s tokenizer cannot read")

RIVERS = 'Where? <doc id="7" title="Rivers">The Seine flows through Paris.</doc> Answer:'


def real_ids(batch, text=0):
    """What the decoder reads of a text: token ids, and -1 - slot where a vector stands."""
    real = batch["attention_mask"][text] == 1
    ids, slots = batch["input_ids"][text][real], batch["slot_ids"][text][real]
    return torch.where(slots < 0, ids, -1 - slots).tolist()


def segment_ids(name, texts):
    """Each text's ids as the Hugging Face tokenizer itself gives them."""
    tokenizer = hugging_face(name)
    return [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in texts
    ]


def assert_equal(batch, other):
    assert sorted(batch) == sorted(other)
    for key in batch:
        assert torch.equal(batch[key], other[key]), key


# Rows and tokens of a prompt.


def test_hand_worked_prompt():
    tokenizer = refrag(compression=2)
    batch = tokenizer(RIVERS)
    ids = dict(
        zip(
            ("before", "header", "footer", "after"),
            segment_ids("tiny/decoder", ["Where? ", "[7] Rivers\n", "\n", " Answer:"]),
            strict=True,
        )
    )
    num_rows = batch.num_rows
    assert real_ids(batch) == [
        *ids["before"],
        *ids["header"],
        *(-1 - n for n in range(num_rows)),
        *ids["footer"],
        *ids["after"],
    ]
    encoder = hugging_face("tiny/encoder")
    document = encoder("The Seine flows through Paris.", add_special_tokens=False)["input_ids"]
    assert num_rows == (len(document) + 1) // 2
    cls, sep = encoder.cls_token_id, encoder.sep_token_id
    assert batch["encoder_input_ids"][0].tolist() == [cls, *document[:2], sep]
    rows = [
        batch["encoder_input_ids"][n][batch["encoder_row_ids"][n] == n].tolist()
        for n in range(num_rows)
    ]
    assert [*chain(*rows)] == document
    assert batch["row_states_mask"].tolist() == [False] * num_rows
    assert {row.document_id for row in batch.trace[0]} == {"7"}
    assert batch.compression == 2


def test_expanded_rows_stand_among_the_others():
    tokenizer = refrag(compression=3, header="", footer="")
    text = "The Seine flows through Paris."
    [packed] = tokenizer.pack([text])
    [decoder] = plain("tiny/decoder")([text])
    batch = tokenizer(f"<doc>{text}</doc>", expand=[1])
    start, end = packed.bounds[1:3]
    own = [int(i) for i, e in zip(decoder.ids, decoder.ends, strict=True) if start < e <= end]
    assert own
    others = [-1 - n for n in range(2, packed.num_rows)]
    assert real_ids(batch) == [-1, *own, *others]
    assert [row.state for row in batch.trace[0]][:3] == ["vector", "tokens", "vector"]


def check_against_segments(tokenizer, name, prompts):
    """Checks expand="all" on each prompt against the tokenization of its segments.

    It also equals the one-shot tokenization of the rendered text, but for two cases. A token of the
    one-shot tokenization straddles a segment's edge; or a segment ends in several white space
    characters: GPT-2's `\\s+(?!\\S)` leaves the last of them to what follows, so " \\n" is
    " " and "\\n" before a word, and one token alone.

    Returns:
        Shares of the prompts of the first case, of the second, and of the others.
    """
    counts = {"a token straddles": 0, "white space before an edge": 0, "equal to one-shot": 0}
    for first in range(0, len(prompts), 50):
        some = prompts[first : first + 50]
        batch = tokenizer(some, expand="all")
        assert (batch["slot_ids"] == -1).all()
        assert batch["encoder_input_ids"].numel() == 0
        for number, prompt in enumerate(some):
            segments = render(prompt, header=tokenizer.header, footer=tokenizer.footer)
            texts = [segment.text for segment in segments]
            ids = real_ids(batch, number)
            assert ids == [*chain(*segment_ids(name, texts))]
            [whole] = plain(name)(["".join(texts)])
            assert whole.ids.tolist() == segment_ids(name, ["".join(texts)])[0]
            edges = np.cumsum([len(text) for text in texts])
            straddles = (whole.starts[:, None] < edges) & (edges < whole.ends[:, None])
            if straddles.any():
                counts["a token straddles"] += 1
            elif ids == whole.ids.tolist():
                counts["equal to one-shot"] += 1
            else:
                assert any(re.search(r"\s\s\Z", text) for text in texts[:-1]), texts
                counts["white space before an edge"] += 1
    return {case: count / len(prompts) for case, count in counts.items()}


def test_all_rows_expanded_give_the_segments_ids():
    rng = random.Random(5)
    prompts = [random_prompt(rng) for _ in range(200)]
    shares = check_against_segments(refrag(), "tiny/decoder", prompts)
    assert shares["a token straddles"] > 0
    assert shares["equal to one-shot"] > 0.3


@pytest.mark.real_models
def test_all_rows_expanded_give_the_default_models_segments_ids(real_pair, record_property):
    rng = random.Random(7)
    prompts = [random_prompt(rng) for _ in range(1000)]
    shares = check_against_segments(refrag(*real_pair, compression=8), real_pair[1], prompts)
    record_property("shares of 1,000 texts", str(shares))
    print(f"shares of {len(prompts)} texts: {shares}")
    assert shares["equal to one-shot"] > 0.3


@given(parts())
@pytest.mark.parametrize("name", ["tiny/decoder", "tiny/gemma"])
def test_all_rows_expanded_give_the_segments_ids_of_any_prompt(name, prompt):
    tokenizer = refrag("tiny/encoder", name)
    texts = [s.text for s in render(prompt, header=tokenizer.header, footer=tokenizer.footer)]
    opening = [2] if name == "tiny/gemma" else []
    ids = real_ids(tokenizer([prompt], expand="all"))
    assert ids == [*opening, *chain(*segment_ids(name, texts))]


@given(st.lists(parts(), min_size=1, max_size=3), st.sampled_from(["none", "all"]))
@pytest.mark.parametrize("context", ["row", "document"])
def test_a_batch_is_its_texts_and_padding(context, prompts, expand):
    tokenizer = refrag(context=context)
    for side in ("left", "right"):
        batch = tokenizer(prompts, expand=expand, padding_side=side)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        assert batch["input_ids"].shape == (len(prompts), max(lengths))
        for number, prompt in enumerate(prompts):
            n = lengths[number]
            real = slice(len(batch["input_ids"][number]) - n, None) if side == "left" else slice(n)
            assert (batch["attention_mask"][number][real] == 1).all()
            assert batch["position_ids"][number][real].tolist() == list(range(n))
            padding = batch["attention_mask"][number] == 0
            assert (batch["position_ids"][number][padding] == 0).all()
            assert (batch["slot_ids"][number][padding] == -1).all()
            assert (batch["input_ids"][number][padding] == tokenizer.decoder.pad_token_id).all()
            # The same tokens at the same places as alone; rows have other numbers.
            alone = tokenizer([prompt], expand=expand)
            together = [i if i >= 0 else None for i in real_ids(batch, number)]
            assert together == [i if i >= 0 else None for i in real_ids(alone)]
            assert [(r.start, r.end, r.state) for r in batch.trace[number]] == [
                (r.start, r.end, r.state) for r in alone.trace[0]
            ]


# Sharing and given states.


def encoded_rows(batch):
    return {int(row) for row in batch["encoder_row_ids"].unique()} - {-1}


def rows_of(batch, text):
    return {row.row for row in batch.trace[text]}


def test_a_row_that_two_texts_share_is_encoded_once():
    tokenizer = refrag(compression=4)
    document = PYDOC[:300]
    batch = tokenizer([f"a <doc>{document}</doc>", f"<doc id=x>{document}</doc> b"])
    alone = tokenizer(f"<doc>{document}</doc>")
    assert rows_of(batch, 0) == rows_of(batch, 1)
    assert batch.num_rows == alone.num_rows
    assert torch.equal(batch["encoder_input_ids"], alone["encoder_input_ids"])
    # A row is shared where its tokens are, whatever the document.
    prefix = tokenizer([f"<doc>{document}</doc>", f"<doc>{document[:100]} otherwise</doc>"])
    assert len(rows_of(prefix, 0) & rows_of(prefix, 1)) >= 3
    # Each distinct row stands once among the encoder's sequences.
    sequences = [tuple(ids) for ids in prefix["encoder_input_ids"].tolist()]
    assert len(set(sequences)) == len(sequences) == prefix.num_rows


def test_documents_are_shared_between_texts_under_context_document():
    tokenizer = refrag(context="document")
    same, other = "The Seine flows through Paris. " * 3, "The Seine is long."
    batch = tokenizer([[Document(same), Document(same)], [Document(same), Document(other)]])
    trace = batch.trace
    num_rows = len(trace[0]) // 2
    assert [row.row for row in trace[0]] == 2 * list(range(num_rows))
    assert rows_of(batch, 0) < rows_of(batch, 1)
    assert batch["encoder_input_ids"].shape[0] == 2
    # A row's vector depends on its window, so equal rows of other documents are other rows.
    assert len(trace[1]) == batch.num_rows


def test_given_states_take_the_place_of_encoding():
    tokenizer = refrag(compression=4)
    texts = [RIVERS, f"<doc>{PYDOC[:200]}</doc>", "none", RIVERS]
    plain_batch = tokenizer(texts)
    num_rows = plain_batch.num_rows
    states = torch.randn(num_rows, 1, 8)
    encoder_keys = {"encoder_input_ids", "encoder_attention_mask", "encoder_row_ids"}

    every = tokenizer(texts, row_states=states)
    assert every["row_states_mask"].all()
    assert every["encoder_input_ids"].shape == (0, 0)

    mask = torch.arange(num_rows) % 3 == 0
    some = tokenizer(texts, row_states=states, row_states_mask=mask)
    given = {row for row in range(num_rows) if row % 3 == 0}
    assert encoded_rows(some) == set(range(num_rows)) - given
    for batch in (every, some):
        assert torch.equal(batch["row_states"], states)
        for key in set(plain_batch) - encoder_keys - {"row_states_mask"}:
            assert torch.equal(batch[key], plain_batch[key])
    # With rows expanded as well, only those are encoded that stand as vectors and are not given.
    expand = [[0, 1], [], [], []]
    both = tokenizer(texts, expand=expand, row_states=states, row_states_mask=mask)
    shared = rows_of(both, 0)
    wanted = {int(row) for row in both["slot_ids"].unique() if row >= 0}
    assert shared <= wanted  # the last text still has them as vectors
    assert encoded_rows(both) == wanted - given


# Chat, and the openings of prompts.


def control_ids(name):
    return {hugging_face(name).convert_tokens_to_ids(string) for string in CONTROL_STRINGS[name]}


def test_a_conversation_is_what_the_template_makes_of_it():
    messages = [
        {"role": "user", "content": "Where is Paris?"},
        {"role": "assistant", "content": "On the Seine."},
        {"role": "user", "content": "And Rome?"},
    ]
    for name in DECODERS:
        tokenizer = hugging_face(name)
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        batch = refrag("tiny/encoder", name).apply_chat(messages)
        ids = real_ids(batch)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == rendered
        control = control_ids(name)
        one_shot = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert [i for i in ids if i in control] == [i for i in one_shot if i in control]
    with_prompt = refrag().apply_chat(messages)
    without = refrag().apply_chat([messages], add_generation_prompt=False)
    n = len(real_ids(without))
    assert real_ids(with_prompt)[:n] == real_ids(without)
    assert len(real_ids(with_prompt)) > n


@given(conversations())
@pytest.mark.parametrize("name", DECODERS)
def test_contents_yield_no_control_token(name, messages):
    control = control_ids(name)
    others = [{**message, "content": "c"} for message in messages]
    for expand in ("none", "all"):
        ids, expected = (
            [
                i
                for i in real_ids(refrag("tiny/encoder", name).apply_chat(m, expand=expand))
                if i in control
            ]
            for m in (messages, others)
        )
        assert ids == expected


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_injections_are_text_in_documents_titles_and_user_text(name, injection):
    tokenizer = refrag("tiny/encoder", name)
    content = [injection, Document(injection, id=injection, title=injection), injection]
    ids = real_ids(tokenizer.apply_chat([{"role": "user", "content": content}], expand="all"))
    assert tokenizer.decode(ids, skip_special_tokens=True).count(injection) == 5
    ids = real_ids(tokenizer([content], expand="all"))
    assert tokenizer.decode(ids, skip_special_tokens=True).count(injection) == 5


@pytest.mark.parametrize(
    ("name", "opening"), [("tiny/llama3", [0]), ("tiny/gemma", [2]), ("tiny/decoder", [])]
)
def test_the_opening_token_stands_exactly_once(name, opening):
    tokenizer = refrag("tiny/encoder", name)
    batch = tokenizer([RIVERS, "", "<doc>a</doc>"], expand="all")
    for text in range(3):
        ids = real_ids(batch, text)
        assert ids[: len(opening)] == opening
        assert not {*opening} & set(ids[len(opening) :])
    messages = [{"role": "user", "content": RIVERS}]
    ids = real_ids(tokenizer.apply_chat(messages))
    assert [i for i in ids if i in opening] == opening
    assert ids[: len(opening)] == opening


def test_chat_takes_one_conversation_or_several():
    one = [{"role": "user", "content": RIVERS}]
    assert_equal(refrag().apply_chat(one), refrag().apply_chat([one]))
    two = refrag().apply_chat([one, one], padding_side="right")
    assert torch.equal(two["slot_ids"][0], two["slot_ids"][1])
    assert len(refrag().apply_chat([])["input_ids"]) == 0
    expanded = refrag().apply_chat([one, one], expand=[[0], []])
    assert (expanded["slot_ids"] == 0).any(dim=1).tolist() == [False, True]


# Ways of calling.


@pytest.mark.parametrize(
    "expand",
    [
        [0, 2],
        (0, 2),
        [2, 0, 0],
        np.asarray([0, 2]),
        torch.tensor([0, 2]),
        [[0, 2]],
        [np.array([0, 2])],
    ],
)
def test_ways_to_expand_rows_of_a_single_text(expand):
    tokenizer = refrag(compression=2)
    assert [row.state for row in tokenizer(RIVERS, expand=expand).trace[0]][:4] == [
        "tokens",
        "vector",
        "tokens",
        "vector",
    ]
    assert_equal(tokenizer(RIVERS, expand=[]), tokenizer(RIVERS))
    assert_equal(tokenizer(RIVERS, expand=[[]]), tokenizer(RIVERS))
    num_rows = tokenizer(RIVERS).num_rows
    assert_equal(tokenizer(RIVERS, expand=range(num_rows)), tokenizer(RIVERS, expand="all"))


def test_rows_are_counted_through_a_texts_documents():
    tokenizer = refrag(compression=2)
    text = "<doc>a b c</doc><doc></doc> and <doc>d e</doc>"
    batch = tokenizer([text, text], expand=[[1, 2], []])
    assert [[(r.document, r.state) for r in trace] for trace in batch.trace] == [
        [(0, "vector"), (0, "tokens"), (2, "tokens")],
        [(0, "vector"), (0, "vector"), (2, "vector")],
    ]


def test_texts_as_strings_and_as_lists_are_the_same():
    tokenizer = refrag()
    document = Document("The Seine flows through Paris.", "7", "Rivers")
    assert_equal(tokenizer(RIVERS), tokenizer([RIVERS]))
    assert_equal(tokenizer(RIVERS), tokenizer([["Where? ", document, " Answer:"]]))


@pytest.mark.parametrize("expand", ["none", "all"])
@pytest.mark.parametrize("context", ["row", "document"])
def test_texts_without_documents(context, expand):
    batch = refrag(context=context)(["Hello", "Hello world"], expand=expand)
    assert batch["encoder_input_ids"].shape == (0, 0)
    assert batch["row_states_mask"].shape == (0,)
    assert batch.num_rows == 0
    assert (batch["slot_ids"] == -1).all()
    empty = torch.zeros(0, 1, 4)
    assert refrag(context=context)(["Hello"], row_states=empty)["row_states"].shape == (0, 1, 4)


def test_a_document_that_stays_compressed_is_not_read_by_the_decoder(monkeypatch):
    tokenizer = RefragTokenizer(
        hugging_face("tiny/encoder"), hugging_face("tiny/decoder"), compression=4
    )
    seen = []
    read = PlainTokenizer.__call__

    def listen(plain, texts, *after):
        if plain is tokenizer.plain_decoder:
            seen.extend(texts)
        return read(plain, texts, *after)

    monkeypatch.setattr(PlainTokenizer, "__call__", listen)
    tokenizer([RIVERS, "<doc>expanded</doc>"], expand=[[], [0]])
    assert "expanded" in seen
    assert "The Seine flows through Paris." not in seen


def test_broken_tags():
    with pytest.raises(DocumentSyntaxError, match="never closed at line 1, column 3"):
        refrag()("a <doc>b")
    assert (
        real_ids(refrag()("a <doc>b", strict=False)) == segment_ids("tiny/decoder", ["a <doc>b"])[0]
    )


def test_decoding():
    tokenizer = refrag()
    batch = tokenizer(["Hello world", "Paris"], padding_side="right")
    assert tokenizer.batch_decode(batch["input_ids"]) == ["Hello world", "Paris"]
    assert tokenizer.decode(batch["input_ids"][0]) == "Hello world"
    kept = tokenizer.decode(batch["input_ids"][1], skip_special_tokens=False)
    assert kept.startswith("Paris<|endoftext|>")


def test_lost_characters_are_warned_about_and_marked():
    with pytest.warns(UserWarning, match="cannot read 4 of the 11 characters of the document"):
        batch = refrag(compression=2)("<doc>a day 漢字仮名 </doc>")
    assert sum(row.lost for row in batch.trace[0]) == 4


# Settings.

SETTINGS: dict[str, Any] = {
    "chunk_by": "decoder",
    "context": "document",
    "header": "{title} «{id}»: ",
    "footer": "",
    "max_encoder_length": 100,
    "padding_side": "right",
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_saved_tokenizer_is_the_same(tmp_path, encoder, decoder):
    tokenizer = RefragTokenizer(
        hugging_face(encoder), hugging_face(decoder), compression=5, **SETTINGS
    )
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    loaded = RefragTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.settings == tokenizer.settings
    assert loaded.settings == {
        "compression": 5,
        "rates": [5],
        "max_sentence": 2,
        "num_slots": 1,
        **SETTINGS,
    }
    rng = random.Random(3)
    prompts = [random_prompt(rng) for _ in range(20)]
    for expand in ("none", "all"):
        assert_equal(loaded(prompts, expand=expand), tokenizer(prompts, expand=expand))
    messages = [{"role": "user", "content": RIVERS + INJECTIONS[0]}]
    assert_equal(loaded.apply_chat(messages), tokenizer.apply_chat(messages))
    other = RefragTokenizer.from_pretrained(tmp_path / "new" / "folder", compression=3)
    assert other.settings == {**tokenizer.settings, "compression": 3, "rates": [3]}
    saved = json.loads((tmp_path / "new" / "folder" / "refrag_tokenizer.json").read_text("utf-8"))
    assert saved == tokenizer.settings


def test_a_folder_without_a_tokenizer_of_this_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no refrag_tokenizer\.json"):
        RefragTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_loading_by_name_reads_the_encoders_positions(encoder, tmp_path):
    tokenizer = RefragTokenizer.from_encoder_decoder(encoder, "tiny/decoder", compression=8)
    # RoBERTa's two positions more are not for tokens.
    assert tokenizer.max_encoder_length == 512
    tokenizer = RefragTokenizer.from_encoder_decoder(
        encoder, "tiny/decoder", compression=8, max_encoder_length=64, context="document"
    )
    batch = tokenizer([[Document(PYDOC[:3000])]])
    assert batch["encoder_input_ids"].shape[1] <= 64
    # The tokenizer may not know its model's limit.
    config = AutoConfig.from_pretrained(resolve(encoder, weights=False).path)
    config.max_position_embeddings = 40 + config.max_position_embeddings - 512
    config.save_pretrained(tmp_path)
    unlimited = hugging_face(encoder).__class__.from_pretrained(
        resolve(encoder, weights=False).path, model_max_length=int(1e30)
    )
    unlimited.save_pretrained(tmp_path)
    tokenizer = RefragTokenizer.from_encoder_decoder(str(tmp_path), "tiny/decoder", compression=8)
    assert tokenizer.max_encoder_length == 40


def test_an_unknown_name_is_an_error():
    with pytest.raises(ModelNotFoundError, match="tiny/nothing"):
        RefragTokenizer.from_encoder_decoder("tiny/nothing", "tiny/decoder", compression=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_by": "word"}, r"chunk_by \('word'\) must be one of"),
        ({"max_sentence": 0}, r"max_sentence \(0\)"),
        ({"context": "text"}, r"context \('text'\) must be one of"),
        ({"padding_side": "both"}, r"padding_side \('both'\) must be one of"),
        ({"num_slots": 0}, r"num_slots \(0\) must be 1 to compression \(4\)"),
        ({"num_slots": 5}, r"num_slots \(5\) must be 1 to compression \(4\)"),
        ({"num_slots": 2, "chunk_by": "decoder"}, r"num_slots \(2\) must be 1 with chunk_by"),
        ({"num_slots": 2, "chunk_by": "sentence"}, r"num_slots \(2\) must be 1 with chunk_by"),
        ({"num_slots": 2, "rates": (4, 8)}, r"num_slots \(2\) must be 1 with several rates"),
        ({"rates": (2, 8)}, r"compression \(4\) must be one of rates \(\[2, 8\]\)"),
        ({"rates": (0, 4)}, r"compression \(0\) must be at least 1"),
        ({"rates": (4, 511)}, r"a row of compression \(511\) tokens does not fit the encoder"),
        ({"compression": 511}, r"a row of compression \(511\) tokens does not fit the encoder"),
        ({"compression": 4, "max_encoder_length": 5}, r"\(4\) tokens .* reads 3 tokens beside"),
        ({"compression": 0}, r"compression \(0\)"),
        ({"compression": -1}, r"compression \(-1\)"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        refrag(**{"compression": 4, **settings})


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (RIVERS, {"expand": "some"}, r"expand \('some'\) must be 'none', 'all', a share or a list"),
        (RIVERS, {"expand": [99]}, "expand: text 0 has [0-9]+ rows, no row 99"),
        (RIVERS, {"expand": [-1]}, "expand: text 0 has [0-9]+ rows, no row -1"),
        (["a", RIVERS], {"expand": [[0], []]}, "expand: text 0 has 0 rows, no row 0"),
        ([RIVERS, RIVERS], {"expand": [[0]]}, "expand holds 1 entries for 2 texts"),
        (RIVERS, {"padding_side": "middle"}, r"padding_side \('middle'\) must be one of"),
        (RIVERS, {"row_states": torch.zeros(1, 1, 4)}, "row_states holds 1 rows, but the texts"),
        (RIVERS, {"row_states_mask": torch.zeros(1)}, "given without row_states"),
        (["a\ud83d"], {}, "is no character"),
        ([["a", Document("\ud83d")]], {}, "is no character"),
        ([[3]], {}, "parts are strings and documents, got 3"),
    ],
)
def test_calls_that_cannot_be(texts, options, message):
    with pytest.raises(ValueError, match=message):
        refrag()(texts, **options)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_without_documents_has_hugging_faces_ids(kind, opens):
    decoder = spaced(*kind, opens=opens)
    tokenizer = RefragTokenizer(None, decoder, compression=1)
    for text in ("the river", " the river", "  a town", "\nthe", "<br>the old<br> river"):
        assert tokenizer(text)["input_ids"][0].tolist() == decoder(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_without_documents_has_hugging_faces_ids(kind):
    decoder = spaced(*kind)
    tokenizer = RefragTokenizer(None, decoder, compression=1)
    contents = ["the river", " the river", "the town<br>the town", "a"]
    roles = ["user", "assistant"] * 2
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]
    for turns, opened in ((messages[:3], True), (messages, False)):
        options = {"add_generation_prompt": opened}
        rendered = decoder.apply_chat_template(turns, tokenize=False, **options)
        expected = decoder.apply_chat_template(turns, tokenize=True, return_dict=False, **options)
        assert expected == decoder(rendered, add_special_tokens=False)["input_ids"]
        got = tokenizer.apply_chat(turns, **options)["input_ids"][0].tolist()
        assert got == expected


@pytest.mark.parametrize("header", ["[{id}] {title}\n", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_a_prompts_beginning_has_an_artificial_space(kind, header):
    decoder = spaced(*kind)
    tokenizer = RefragTokenizer(
        hugging_face("tiny/encoder"), decoder, compression=2, header=header, footer=""
    )
    river = Document("the river flows through the town")
    for mixed in ([river, "the town"], ["", river, river, "the town"], ["a", river, "the town"]):
        texts = [part if isinstance(part, str) else part.text for part in mixed]
        lengths = []
        for expand in ("all", "none"):
            batch = tokenizer([mixed], expand=expand)
            tokens = batch["input_ids"][0][batch["slot_ids"][0] < 0]
            lengths.append(len(tokens))
            written = said(decoder, tokens)
            if expand == "all" and not header:
                space = "" if kind[1] == "never" else " "
                assert written == space + "".join(texts)
            # Behind a document stands the same, whether that is read as rows or as text.
            assert written.endswith("the town") and not written.endswith(" the town")
        assert lengths[0] > lengths[1]


def test_rows_of_a_document_that_opens_a_text_keep_their_tokens():
    decoder = spaced("bpe", "prepend")
    tokenizer = RefragTokenizer(
        hugging_face("tiny/encoder"), decoder, compression=2, header="", footer=""
    )
    text = " the river flows through the town"
    whole = tokenizer([[Document(text)]], expand="all")
    assert whole["input_ids"][0].tolist() == decoder(text)["input_ids"]
    first = tokenizer([[Document(text)]], expand=[0])
    own = first["input_ids"][0][first["slot_ids"][0] < 0].tolist()
    assert own == decoder(text)["input_ids"][: len(own)] and own
    later = tokenizer([[Document(text)]], expand=[1])
    assert not said(decoder, later["input_ids"][0][later["slot_ids"][0] < 0]).startswith("  ")


@pytest.mark.parametrize("marker", ["[/INST]", "<text>"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_behind_a_space_is_what_hugging_face_reads_there(kind, marker):
    decoder = copy.deepcopy(spaced(*kind))
    decoder.chat_template = (
        "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'user' -%}"
        f"{{{{- '[INST]<br>' + m['content'] + '<br>{marker}' -}}}}"
        "{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
    )
    tokenizer = RefragTokenizer(None, decoder, compression=1)
    asked = [{"role": "user", "content": "the town"}]
    answered = [*asked, {"role": "assistant", "content": "the river"}]
    prompt = tokenizer.apply_chat(asked)["input_ids"][0].tolist()
    whole = tokenizer.apply_chat(answered, add_generation_prompt=False)["input_ids"][0].tolist()
    options = {"tokenize": True, "return_dict": False}
    assert prompt == decoder.apply_chat_template(asked, add_generation_prompt=True, **options)
    assert whole == decoder.apply_chat_template(answered, **options)
    assert whole[: len(prompt)] == prompt
    assert said(decoder, whole[len(prompt) :]).lstrip() == "the river</s>"


def test_a_decoder_without_padding_token_pads_with_its_end():
    decoder = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<end>": 2}, merges=[])),
        eos_token="<end>",
    )
    tokenizer = RefragTokenizer(hugging_face("tiny/encoder"), decoder, compression=4)
    assert tokenizer(["ab", "a"])["input_ids"].tolist() == [[0, 1], [2, 0]]
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.apply_chat([{"role": "user", "content": "a"}])


@pytest.mark.real_models
def test_the_default_models_rows_of_eight(real_pair):
    tokenizer = RefragTokenizer.from_encoder_decoder(*real_pair, compression=8)
    assert tokenizer.assembler.max_encoder_tokens == 510
    batch = tokenizer(RIVERS)
    encoder = tokenizer.encoder
    document = encoder("The Seine flows through Paris.", add_special_tokens=False)["input_ids"]
    assert batch["encoder_input_ids"].tolist() == [[101, *document, 102]]
    decoded = tokenizer.decode(tokenizer(RIVERS, expand="all")["input_ids"][0])
    assert decoded == "Where? [7] Rivers\nThe Seine flows through Paris.\n Answer:"
