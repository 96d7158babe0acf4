"""Conversations from chat data: documents, passages, names of fields and roles, errors."""

import json

import datasets
import pytest

from refrag_lightning.data.chat_sources import HubConversations, JsonLinesConversations
from refrag_lightning.data.conversations import Place, Turn
from refrag_lightning.text.documents import Document


def read(tmp_path, rows, **options):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(JsonLinesConversations(str(path), **options).conversations("train"))


def test_documents_in_chat_data(tmp_path):
    messages = [
        {"role": "user", "content": 'Read <doc title="A">one</doc> and <doc>two</doc>.'},
        {"role": "assistant", "content": "I write <doc>myself</doc>.", "train": False},
        {"role": "user", "content": "And <doc>three</doc> but not <doc."},
        {"role": "assistant", "content": "Yes."},
    ]
    (conversation,) = read(tmp_path, [{"id": "c1", "messages": messages, "kind": "k"}])
    assert conversation.id == "c1" and conversation.kind == "k" and conversation.task == "chat"
    assert [turn.content for turn in conversation.turns] == [
        ("Read ", Document("one", "1", "A"), " and ", Document("two", "2"), "."),
        ("I write <doc>myself</doc>.",),
        ("And ", Document("three", "3"), " but not <doc."),
        ("Yes.",),
    ]
    assert [turn.train for turn in conversation.turns] == [True, False, True, True]


def test_passages_of_chat_data_stand_before_the_first_users_message(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "Seine"},
    ]
    row = {"messages": messages, "passages": [{"text": "The Seine."}], "references": "Seine"}
    (conversation,) = read(tmp_path, [row])
    assert conversation.turns[1].content == (Place.PASSAGES, "Which?")
    assert conversation.references == ("Seine",)
    row["messages"] = messages[2:]
    with pytest.raises(ValueError, match=r"row 1 of .* has passages, but no user's message"):
        read(tmp_path, [row])


def test_other_names_of_fields_and_roles(monkeypatch):
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "Hello?"},
                {"from": "gpt", "value": "Hello."},
            ]
        }
    ]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_list(rows)
    )
    source = HubConversations("org/set", messages="conversations", role="from", content="value")
    (conversation,) = source.conversations("train")
    assert conversation.turns == (Turn("user", ("Hello?",)), Turn("assistant", ("Hello.",)))
    assert conversation.is_learnable and conversation.ends_with_answer


def test_contents_in_parts(tmp_path):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    (conversation,) = read(tmp_path, [{"messages": [{"role": "user", "content": parts}]}])
    assert conversation.turns == (Turn("user", ("Hello",)),)
    assert not conversation.is_learnable


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "has no field 'messages'"),
        ({"messages": "x"}, "'messages' in row 1 of .* is no list of messages: 'x'"),
        ({"messages": [{"role": "user"}]}, "row 1 of .* has no field 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' in row 1 .* is no text"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [row])
