"""Cloze questions, kinds of answers, and texts to be written again."""

import json

import pytest

from refrag_lightning.data.cloze import ClozeQuestions, answer_kind
from refrag_lightning.data.conversations import QuestionConversations, RetellConversations, fill
from refrag_lightning.data.questions import Passage
from refrag_lightning.data.sources import JsonLinesSource, PydocSource, passages_of
from refrag_lightning.text.documents import Document

RIVER = (
    "The Seine rises near Dijon and flows through Paris to the sea. "
    "The bridge of Mr. J. B. Moreau was opened on 3 May 1876 by the mayor. "
    "It was 340 metres long and took three hundred workmen.\n\n"
    "He said that “Every man must go. Nobody knows where Lyon is in this land. Come.”\n\n"
    "Chapter Four About Rouen\n\n"
    "O Brest by the water,\nO Nantes by the sea,\nO Tours in the morning and evening with me.\n\n"
    "Paris likes the bridge because it leads all people home."
)


def texts(tmp_path, *records, **options):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return JsonLinesSource(str(path), **options)


def blanks(source):
    return {(q.kind, q.answers[0], q.question) for q in source.read()}


def all_blanks(tmp_path, text, title=""):
    """What is cut out of a text with any seed."""
    source = texts(tmp_path, {"id": "a", "title": title, "text": text})
    found = set()
    for seed in range(20):
        found |= blanks(ClozeQuestions(source, None, per_passage=9, seed=seed))
    return found


def test_what_is_cut_out(tmp_path):
    found = all_blanks(tmp_path, RIVER)
    assert {(kind, answer) for kind, answer, _ in found} == {
        ("name", "Seine"),
        ("name", "Dijon"),
        ("name", "Mr. J. B. Moreau"),
        ("date", "3 May 1876"),
        ("number", "340 metres"),
        ("number", "three hundred"),
    }
    assert (
        "date",
        "3 May 1876",
        "The bridge of Mr. J. B. Moreau was opened on ____ by the mayor.",
    ) in found


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("However, Anna’s dog Rex ran over to the old house.", {"Anna", "Rex"}),
        ("In Wells the church is older than the whole town.", {"Wells"}),
        ("Then the United Nations sent help to the small island.", {"United Nations"}),
        (
            "The Duke of York met Ludwig van Beethoven at the door.",
            {"Duke of York", "Ludwig van Beethoven"},
        ),
        ("It grew by 12.5% from the autumn to £1,200,000 in all.", {"12.5%", "£1,200,000"}),
        ("They were at war with all others in 1914–18 and again.", {"1914–18"}),
        ("It was in the 1990s that I’d seen them on Monday there.", {"1990s"}),
        ("It was Paris that he loved and Paris that he left behind.", set()),
        ("Louis (who was then still king of the land.", set()),
        ("Louis ate Brie.", set()),
    ],
)
def test_candidates(tmp_path, text, answers):
    assert {answer for _, answer, _ in all_blanks(tmp_path, text)} == answers


def test_an_answer_stands_once_in_its_passage_and_not_in_the_title(tmp_path):
    records = [
        {"id": n, "title": "Dijon", "text": f"{RIVER}\n\nIt met Oscar and Rita at {n} o’clock."}
        for n in range(30)
    ]
    questions = list(ClozeQuestions(texts(tmp_path, *records), max_words=60, seed=3).read())
    assert len({q.id for q in questions}) == len(questions) > 60
    for question in questions:
        (passage,) = question.passages
        (answer,) = question.answers
        assert passage.gold and passage.text.count(answer) == 1 and "Dijon" not in answer
        assert question.question.replace("____", answer) in " ".join(passage.text.split())
        assert answer not in question.question and question.kind == answer_kind(answer)
        assert len(passage.text.split()) <= 60


def test_the_same_seed_gives_the_same_questions_of_different_sentences(tmp_path):
    source = texts(tmp_path, *({"id": n, "text": RIVER} for n in range(9)))
    first = list(ClozeQuestions(source, None, per_passage=2).read())
    assert first == list(ClozeQuestions(source, None, per_passage=2).read())
    assert first != list(ClozeQuestions(source, None, per_passage=2, seed=1).read())
    assert len(first) == 18
    for one, other in zip(first[::2], first[1::2], strict=True):
        assert one.question[-20:] != other.question[-20:]
    numbers = ClozeQuestions(source, None, per_passage=9, kinds=["number"])
    assert {q.kind for q in numbers.read()} == {"number"}
    assert ClozeQuestions(source).key() != ClozeQuestions(source, seed=1).key()


def test_cloze_questions_are_held_out_by_passage(tmp_path):
    records = [{"id": n, "text": RIVER.replace("Dijon", f"Dijon{n}x")} for n in range(8)]
    source = ClozeQuestions(texts(tmp_path, *records), None, per_passage=3, held_out=0.25)
    passages = {
        split: {q.passages[0].text for q in source.questions(split)}
        for split in ("train", "val", "test")
    }
    assert [len(passages[split]) for split in ("train", "val", "test")] == [4, 2, 2]
    assert len(set.union(*passages.values())) == 8


def test_a_cloze_question_as_a_conversation(tmp_path):
    source = ClozeQuestions(texts(tmp_path, {"id": "a", "text": RIVER}), None, kinds=["date"])
    prompt = "{passages}Fill in the blank: {question}"
    (conversation,) = QuestionConversations(source, prompt).conversations("train")
    user, assistant = fill(conversation, conversation.passages)
    assert user["content"][1].startswith("Fill in the blank: The bridge of")
    assert assistant["content"] == ["3 May 1876"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_passage": 0}, r"per_passage \(0\)"),
        ({"kinds": ["place"]}, r"kinds \(\['place'\]\) must be some of name, date, number"),
        ({"kinds": []}, r"kinds \(\[\]\)"),
        ({"max_words": 0}, r"max_words \(0\)"),
        ({"texts": PydocSource(held_out=0.1)}, r"held_out of the texts \(0.1\) must be 0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ClozeQuestions(**{"texts": PydocSource(held_out=0), **options})


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("date", "1804|May 2013|21 February 1804|the 1980s|17th century|in the 2nd century|July"),
        (
            "date",
            "between 1881 and 1885|by the early 1980s|prior to June 1592|Monday|1914–18|44 BC",
        ),
        ("number", "15 °C|1500 °C|over 2,000|$37.6 billion|four years|60%|27-30|two|twice|zero"),
        ("number", "18 million volumes|thousands|3.5 billion years ago|12.9-kilometre|a dozen"),
        ("name", "Hero of Alexandria|the Timucua|DC|World War II|Olivia d'Abo|Apollo 11|Tokyo"),
        ("name", '7 Eleven|"The New Colossus"|Madison, Wisconsin|Joseph Heller.|U2|St. Johns'),
        ("other", "sunlight|second most commonly|the ulnar nerve|1855 colonial constitution||…"),
    ],
)
def test_answer_kind(kind, answers):
    assert {answer: answer_kind(answer) for answer in answers.split("|")} == dict.fromkeys(
        answers.split("|"), kind
    )


def test_texts_are_cut_between_paragraphs_sentences_and_words(tmp_path):
    text = "One two.\n\nThree four five.\n\n\nA b c d. E f. G h i j k l m.\nN.\n"
    source = texts(tmp_path, {"id": "x", "title": "T", "text": text}, {"text": " short one "})
    assert [(p.text, p.id, p.title) for p in passages_of(source, 5)][:-1] == [
        ("One two.\n\nThree four five.", "x-1", "T"),
        ("A b c d.", "x-2", "T"),
        ("E f.", "x-3", "T"),
        ("G h i j k", "x-4", "T"),
        ("l m. N.", "x-5", "T"),
    ]
    whole = list(passages_of(source, None))
    assert whole[0] == Passage(text.strip(), "x", "T") and whole[1].text == "short one"
    assert len(list(passages_of(texts(tmp_path, *[{"text": "a"}] * 3, limit=2), 5))) == 2
    section = next(PydocSource(held_out=0).passages())
    assert section.id == "text 1" and section.text


def test_retelling(tmp_path):
    source = texts(tmp_path, {"id": "x", "title": "T", "text": "One two.\n\nThree."})
    first, second = RetellConversations(source, 2, "{passages}Again!").conversations("train")
    assert fill(first, []) == [
        {"role": "user", "content": [Document("One two.", "1", "T"), "Again!"], "train": True},
        {"role": "assistant", "content": ["One two."], "train": True},
    ]
    assert second.answer == "Three." and second.task == "reconstruct"
    # Other passages may not come beside the one that is written again.
    assert first.passages == ()
    with pytest.raises(ValueError, match=r"prompt \('Again!'\) must have \{passages\} once"):
        RetellConversations(source, prompt="Again!")


def test_the_same_text_is_retold_in_one_split(tmp_path):
    source = texts(tmp_path, *({"text": f"Text {n % 4}."} for n in range(8)))
    told = RetellConversations(source, held_out=0.25)
    answers = {s: {c.answer for c in told.conversations(s)} for s in ("train", "test", "val")}
    assert answers == {"train": {"Text 0.", "Text 1."}, "test": {"Text 2."}, "val": {"Text 3."}}
