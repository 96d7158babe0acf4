"""Conversations in files."""

import json

import pytest

from refrag_lightning.inference.chat.session import Session
from refrag_lightning.inference.chat.transcript import save
from refrag_lightning.text.documents import Document
from tests.inference.chat.conftest import SAYS


@pytest.fixture
def session(pipeline):
    session = Session(pipeline, "runs/seine", "Be brief.", {"max_new_tokens": 40})
    session.add([Document("The Seine.", title="Rivers", attributes={"source": "rivers.md"})])
    list(session.ask("Where?\nIn France?"))
    return session


def test_markdown_is_what_was_said(session, tmp_path):
    session.turns[0].stopped = True
    lines = save(session, tmp_path / "chat.md").read_text().splitlines()
    assert [line for line in lines if line][:-1] == [
        "# Chat with runs/seine",
        "System:",
        "> Be brief.",
        "Documents:",
        "1. Rivers",
        "## Where?",
        "> In France?",
        f"> {SAYS}",
        "*(stopped)*",
        "- \\[1] Rivers",
    ]
    assert lines[-1].startswith("*1 document, ") and lines[-1].endswith("*")


def test_json_has_every_row(session, tmp_path):
    told = json.loads(save(session, tmp_path / "chat.json").read_text())
    assert told["model"] == "runs/seine" and told["options"] == {"max_new_tokens": 40}
    assert told["documents"] == [
        {"id": "1", "title": "Rivers", "source": "rivers.md", "text": "The Seine."}
    ]
    (turn,) = told["turns"]
    assert turn["question"] == "Where?\nIn France?" and turn["answer"] == SAYS
    assert turn["citations"][0]["document_id"] == "1"
    rows = turn["trace"]["documents"][0]["rows"]
    assert "".join(row["text"] for row in rows) == "The Seine."


def test_a_file_of_somebody_else_is_left_alone(session, tmp_path):
    path = tmp_path / "chat.md"
    save(session, path)
    session.clear()
    save(session, path)
    assert "Where?" not in path.read_text()
    other = tmp_path / "other.md"
    other.write_text("mine")
    with pytest.raises(ValueError, match=r"other\.md is there already"):
        save(session, other)
    assert other.read_text() == "mine"
    with pytest.raises(ValueError, match=r"ends neither in \.md nor"):
        save(session, tmp_path / "chat.doc")
