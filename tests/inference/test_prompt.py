"""From a request to segments: places, numbers, and ids that are those of the tokenizer."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.inference.prompt import converse, question_of, write
from refrag_lightning.inference.request import Request
from refrag_lightning.retrieval.passages import Passage
from refrag_lightning.text.documents import Document, DocumentSyntaxError
from refrag_lightning.text.plain import control_tokens
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.inference.pipelines import RIVERS, LayoutStore, parts, pipeline, real_ids
from tests.strategies import CONTROL_STRINGS, INJECTIONS, conversations, documents, random_prompt
from tests.text.loading import DECODERS, hugging_face

pytestmark = pytest.mark.filterwarnings("ignore:the encoder.s tokenizer cannot read")

PASSAGES = (
    Passage("rivers#2", "rivers", "Seine", "It flows.", 40, 49, "rivers.md"),
    Passage("lakes", "lakes", "Lakes", "They do not.", 0, 12, "lakes.md"),
)


def content(request, *passages):
    """What the last message says, documents as `id:text`."""
    parts = converse(request, passages).contents[-1]
    return [p if isinstance(p, str) else f"{p.document.id}:{p.document.text}" for p in parts]


def test_documents_stand_before_the_question():
    request = Request.of("Where?", ["a", "b"])
    assert content(request, *PASSAGES) == ["1:a", "2:b", "3:It flows.", "4:They do not.", "Where?"]


def test_the_prompt_says_where_documents_stand():
    request = Request.of(
        "Where?", ["a"], prompt="Read:\n{passages}Answer in a few words: {question}"
    )
    assert content(request) == ["Read:\n", "1:a", "Answer in a few words: Where?"]
    behind = Request.of("Where?", ["a"], prompt="{question}\n{passages}")
    assert content(behind) == ["Where?\n", "1:a"]


def test_without_documents_the_message_stays_as_it_is():
    assert content(Request.of("Where?")) == ["Where?"]


def test_given_ids_stay_and_the_others_get_free_numbers():
    given = [Document("a", "2"), Document("b"), Document("c", "x"), Document("d")]
    assert content(Request.of("?", given), PASSAGES[0]) == [
        *("2:a", "1:b", "x:c", "3:d", "4:It flows."),
        "?",
    ]


def test_documents_of_messages_keep_their_numbers():
    messages = [
        {"role": "user", "content": "<doc>a</doc><doc id=7>b</doc> Where?"},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "<doc>c</doc> And there?"},
    ]
    conversation = converse(Request.of(messages, ["d"]))
    found = [(p.document.id, p.document.text) for p in conversation.documents]
    # Those of messages by their position, d by what is free.
    assert found == [("1", "a"), ("7", "b"), ("2", "d"), ("3", "c")]


def test_where_documents_come_from():
    given = Document("a", "2", attributes={"source": "a.txt"})
    one, two = converse(Request.of("?", [given]), PASSAGES[:1], [0.5]).documents
    assert (one.kind, one.document_id, one.source, one.score) == ("given", "2", "a.txt", None)
    assert (two.kind, two.document_id, two.passage_id) == ("searched", "rivers", "rivers#2")
    assert (two.source, two.start, two.score) == ("rivers.md", 40, 0.5)
    assert two.document == Document("It flows.", "1", "Seine")


def test_expand_by_place_and_by_id():
    def expanded(expand):
        request = Request.of("?", [Document("a", "x"), Document("b", "y")], expand=expand)
        return [p.expand for p in converse(request).documents]

    assert expanded("all") == ["all", "all"]
    assert expanded(["none", [0, 2]]) == ["none", [0, 2]]
    assert expanded({"y": "all"}) == ["none", "all"]
    with pytest.raises(ValueError, match="no document 'z' in the prompt"):
        expanded({"z": "all"})
    with pytest.raises(ValueError, match="expand holds 1 entries for 2 documents"):
        expanded(["all"])


def test_what_is_searched_for_is_the_last_users_text():
    messages = [
        {"role": "user", "content": "Before?"},
        {"role": "user", "content": "<doc>a</doc> Where? "},
        {"role": "assistant", "content": "Here."},
    ]
    assert question_of(Request.of(messages)) == "Where?"
    assert question_of(Request.of([{"role": "user", "content": [RIVERS[0], "So?"]}])) == "So?"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request.of("?", [Document("a", "1"), Document("b", "1")]), "two have the id '1'"),
        (Request.of([{"role": "system", "content": "a"}], ["b"]), "hold none of the user's"),
        (Request.of([{"role": "user"}]), "message 0 needs a text or a list as content, got None"),
        (Request.of([{"role": "user", "content": [3]}]), "message 0 holds 3"),
    ],
)
def test_wrong_requests(request_, message):
    with pytest.raises(ValueError, match=message):
        converse(request_)


def test_broken_tags_are_errors_unless_they_are_text():
    with pytest.raises(DocumentSyntaxError, match="stray </doc>"):
        converse(Request.of("a </doc> b"))
    assert content(Request.of("a </doc> b", strict=False)) == ["a </doc> b"]
    # A list's strings are taken as they are.
    messages = [{"role": "user", "content": ["a </doc> b"]}]
    assert content(Request.of(messages)) == ["a </doc> b"]


def test_leaving_out_documents_joins_the_texts_around_them():
    request = Request.of("Where?", ["a", "b"], prompt="Read: {passages}{question}")
    conversation = converse(request)
    [some] = conversation.map({0: None}).contents
    assert [p if isinstance(p, str) else p.document.text for p in some] == ["Read: ", "b", "Where?"]
    assert conversation.map({0: None, 1: None}).contents == (["Read: Where?"],)


def test_the_plain_layout():
    decoder = hugging_face("tiny/decoder")
    tokenizer = RefragTokenizer(hugging_face("tiny/encoder"), decoder, compression=4)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "She."},
        {"role": "user", "content": "Where?"},
    ]
    template, decoder.chat_template = decoder.chat_template, None
    try:
        request = Request.of(messages, [Document("Seine.", title="Rivers")])
        segments = write(converse(request), tokenizer, request)
    finally:
        decoder.chat_template = template
    assert "".join(s.text for s in segments) == (
        "Be brief.\n\nWho?\nAnswer: She.\n\n[1] Rivers\nSeine.\nWhere?\nAnswer:"
    )
    assert {s.kind for s in segments} == {"text", "header", "document", "footer"}


# The ids that are fed: those of the tokenizer's own contract.


def check(name, conversation, attached, pipe):
    """Compares a request's tensors with `apply_chat` on the same conversation."""
    _, tokenizer = parts(name)
    messages = converse(Request.of(conversation, attached)).as_messages()
    batch = pipe.prepare(conversation, attached).batch
    assert real_ids(batch) == real_ids(tokenizer.apply_chat(messages))
    if not attached:
        assert real_ids(batch) == real_ids(tokenizer.apply_chat(conversation))

    def special(some):
        controls = control_tokens(hugging_face(name))
        return [token for token in real_ids(some) if token in controls]

    # The template's, and not one more.
    harmless = [{**message, "content": ["a"]} for message in messages]
    assert special(batch) == special(tokenizer.apply_chat(harmless))


def random_conversation(rng):
    """A conversation of one to three turns, with documents in it or beside it."""
    turns = [random_prompt(rng) for _ in range(rng.choice([1, 1, 3]))]
    for number, turn in enumerate(turns):
        for place, part in enumerate(turn):
            if not isinstance(part, str):
                turn[place] = Document(part.text, f"{number}-{part.id}", part.title)
        if rng.random() < 0.3:
            turn.insert(rng.randrange(len(turn) + 1), rng.choice(INJECTIONS))
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": _merged(turn)}
        for number, turn in enumerate(turns)
    ]
    if rng.random() < 0.2:
        return messages, []
    attached = [Document(p.text, "", p.title) for p in random_prompt(rng) if not isinstance(p, str)]
    injected = rng.choice([*INJECTIONS, *(s for some in CONTROL_STRINGS.values() for s in some)])
    attached.append(Document(f"It says {injected} here.", title=injected))
    return messages, attached


def _merged(turn):
    merged = []
    for part in turn:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


@pytest.mark.parametrize("name", DECODERS)
def test_a_thousand_conversations_give_the_tokenizers_ids(name):
    # A third of the thousand for each kind of chat template.
    rng = random.Random(11)
    pipe = pipeline(name, window=1 << 20, store=LayoutStore(*parts(name)))
    for _ in range(334):
        check(name, *random_conversation(rng), pipe)


@pytest.mark.parametrize("name", DECODERS)
@given(conversation=conversations(), attached=st.lists(documents(with_id=False), max_size=2))
def test_adversarial_conversations_give_the_tokenizers_ids(name, conversation, attached):
    attached = [Document(d.text, "", d.title) for d in attached]
    pipe = pipeline(name, window=1 << 20, store=LayoutStore(*parts(name)))
    check(name, conversation, attached, pipe)
