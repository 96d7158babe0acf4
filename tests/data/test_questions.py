import gzip
import json

import datasets
import pytest

from refrag_lightning.data.questions import HubQuestions, JsonLinesQuestions, Passage, Question

ROW = {
    "id": "q7",
    "question": "Which river?",
    "answers": ["the Seine", "Seine"],
    "passages": [
        {"id": "1", "title": "Loire", "text": "The Loire is long.", "gold": False},
        {"id": "2", "title": "Seine", "text": "The Seine is in Paris.", "gold": True},
    ],
}


def write(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def hub(monkeypatch, rows, **options):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_list(rows)
    )
    return list(HubQuestions("org/set", streaming=False, **options).questions("train"))


def test_json_lines(tmp_path):
    path = write(tmp_path / "q.jsonl.gz", [ROW, {"question": "Why?", "answers": "so"}])
    first = next(JsonLinesQuestions(path).questions("train"))
    assert first == Question(
        "q7",
        "Which river?",
        ("the Seine", "Seine"),
        (
            Passage("The Loire is long.", "1", "Loire", False),
            Passage("The Seine is in Paris.", "2", "Seine", True),
        ),
    )
    both = list(JsonLinesQuestions(path, passages=None).questions("train"))
    assert both[1] == Question(f"row 2 of {path!r}", "Why?", ("so",))


def test_splits_are_disjoint_and_the_key_follows_file_and_settings(tmp_path):
    rows = [ROW | {"id": str(n), "passages": [f"Passage {n}."]} for n in range(8)]
    path = write(tmp_path / "q.jsonl.gz", rows)
    source = JsonLinesQuestions(path, held_out=0.25, limit=8)
    ids = {split: [q.id for q in source.questions(split)] for split in ("train", "val", "test")}
    assert ids == {"train": ["0", "1", "4", "5"], "test": ["2", "6"], "val": ["3", "7"]}
    before = source.key()
    assert JsonLinesQuestions(path, held_out=0.25, limit=8).key() == before
    assert JsonLinesQuestions(path, held_out=0.25).key() != before
    write(tmp_path / "q.jsonl.gz", [ROW])
    assert source.key() != before


def test_no_held_out_gold_passage_is_trained_on(tmp_path):
    # Gold passages 0 to 7 in three rounds, so not side by side, each with other distractors.
    rows = []
    for n in range(24):
        gold = {"text": f"Passage  {n % 8}.", "gold": True}
        others = [{"text": f"Passage {(n % 8 + step + n // 8) % 8}."} for step in (1, 2, 3)]
        rows.append(ROW | {"id": str(n), "passages": [*others, gold]})
    source = JsonLinesQuestions(write(tmp_path / "q.jsonl.gz", rows), held_out=0.25)
    questions = {split: list(source.questions(split)) for split in ("train", "test", "val")}
    gold = {
        split: {p.text[-2:] for q in part for p in q.passages if p.gold}
        for split, part in questions.items()
    }
    assert gold == {
        "train": {"0.", "1.", "4.", "5."},
        "test": {"2.", "6."},
        "val": {"3.", "7."},
    }
    assert [len(part) for part in questions.values()] == [12, 6, 6]
    read = {p.text[-2:] for q in questions["train"] for p in q.passages}
    assert read == gold["train"]
    # Without held-out questions nothing is left out.
    everything = list(JsonLinesQuestions(str(tmp_path / "q.jsonl.gz")).questions("train"))
    assert [len(q.passages) for q in everything] == [4] * 24


def test_a_question_with_a_held_out_passage_among_its_gold_ones_is_left_out(tmp_path):
    gold = [["a"], ["b"], ["c"], ["d"], ["a", "d"]]
    rows = [
        ROW | {"id": str(n), "passages": [{"text": text, "gold": True} for text in texts]}
        for n, texts in enumerate(gold)
    ]
    source = JsonLinesQuestions(write(tmp_path / "q.jsonl.gz", rows), held_out=0.25)
    with pytest.warns(UserWarning, match=r"1 training items of .* are left out: one of their gold"):
        assert [q.id for q in source.questions("train")] == ["0", "1"]


def test_questions_on_the_same_passages_are_in_one_split(tmp_path):
    # Passages a, b, c and d of two, three, one and one questions; the last two have none.
    passages = [["a"], ["a"], ["b"], ["b"], ["b"], ["c"], ["d"], [], []]
    rows = [ROW | {"id": str(n), "passages": p} for n, p in enumerate(passages)]
    source = JsonLinesQuestions(write(tmp_path / "q.jsonl.gz", rows), held_out=0.25)
    ids = {split: [q.id for q in source.questions(split)] for split in ("train", "test", "val")}
    assert ids == {"train": ["0", "1", "2", "3", "4", "7", "8"], "test": ["5"], "val": ["6"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Why?"}, r"row 1 of '.*' has no field 'answers', only \['question'\]"),
        ({"question": 3, "answers": "x"}, r"'question' in row 1 of '.*' is no text: 3"),
        ({"question": "?", "answers": []}, r"'answers' in row 1 of '.*' holds no answer: \[\]"),
        (
            {"question": "?", "answers": "x", "passages": [{"title": "t"}]},
            r"row 1 of '.*' has no field 'text', only \['title'\]",
        ),
        ([1], r"row 1 of '.*' is no JSON object"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place(tmp_path, row, message):
    path = write(tmp_path / "q.jsonl.gz", [row])
    with pytest.raises(ValueError, match=message):
        list(JsonLinesQuestions(path).questions("train"))


def test_a_hub_set_as_squad_has_it(monkeypatch):
    row = {
        "id": "s1",
        "context": "The Seine is in Paris.",
        "question": "Where is the Seine?",
        "answers": {"text": ["in Paris", "Paris"], "answer_start": [13, 16]},
    }
    (question,) = hub(monkeypatch, [row], passages="context")
    assert question.answers == ("in Paris", "Paris")
    assert question.passages == (Passage("The Seine is in Paris.", gold=True),)
    (question,) = hub(monkeypatch, [row], answers="answers.text", passages=None)
    assert question.answers == ("in Paris", "Paris") and question.passages == ()


def test_passages_as_a_mapping_of_lists(monkeypatch):
    row = {
        "question": "?",
        "answers": ["x"],
        "passages": {"title": ["A", "B"], "text": ["a", "b"], "gold": [False, True]},
    }
    (question,) = hub(monkeypatch, [row])
    assert question.passages == (Passage("a", "", "A"), Passage("b", "", "B", True))
