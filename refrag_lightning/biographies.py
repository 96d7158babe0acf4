"""Biographies of invented people: text that no language model can know, and questions on it.

Everything is drawn from a seed: names of people, places and employers are put together from
syllables, and what is true of a person is drawn anew for each. An answer can only come from the
documents at hand, and each kind of detail (name, place, date, number, employer) can be scored
apart.

    world = Biographies(seed=0)
    people = world.group(7, size=2)          # two people who may know each other
    text = world.text(people[0], random.Random(1))
    questions = world.questions(people, random.Random(2))

Numbers of people are without limit: person n of a seed is always the same one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Detail = Literal["name", "place", "date", "number", "employer"]

UNKNOWN = "unknown"
"""The answer to a question that the documents do not answer."""


@dataclass(frozen=True)
class Fact:
    """One thing that can be true of a person.

    Attributes:
        name: What it is called here.
        detail: The kind of its value.
        clauses: Wordings that follow the person's name, with `{value}`.
        questions: Wordings of the question, with `{name}`.
        of_teacher: The question on the teacher of `{name}`, which takes two documents.
    """

    name: str
    detail: Detail
    clauses: tuple[str, ...]
    questions: tuple[str, ...]
    of_teacher: str = ""


FACTS = (
    Fact(
        "birthplace",
        "place",
        ("was born in {value}", "comes from {value}", "is a native of {value}"),
        ("Where was {name} born?", "Where does {name} come from?"),
        "Where was the teacher of {name} born?",
    ),
    Fact(
        "birthday",
        "date",
        ("was born on {value}", "has a birthday on {value}", "came into the world on {value}"),
        ("When was {name} born?", "What is the birthday of {name}?"),
        "When was the teacher of {name} born?",
    ),
    Fact(
        "home",
        "place",
        ("lives at {value}", "has a house at {value}", "settled at {value}"),
        ("Where does {name} live?", "Where is the home of {name}?"),
        "Where does the teacher of {name} live?",
    ),
    Fact(
        "employer",
        "employer",
        ("works for {value}", "is employed by {value}", "earns a living at {value}"),
        ("Who does {name} work for?", "Who is the employer of {name}?"),
        "Who does the teacher of {name} work for?",
    ),
    Fact(
        "hens",
        "number",
        ("keeps {value} hens", "owns {value} hens", "looks after {value} hens"),
        ("How many hens does {name} keep?", "How many hens does {name} own?"),
        "How many hens does the teacher of {name} keep?",
    ),
    Fact(
        "teacher",
        "name",
        ("was taught by {value}", "learned the trade from {value}", "had {value} as a teacher"),
        ("Who taught {name}?", "Who was the teacher of {name}?"),
    ),
    Fact(
        "prize",
        "date",
        ("won the larch prize in {value}", "received the larch prize in {value}"),
        ("When did {name} win the larch prize?", "In which year did {name} win the larch prize?"),
        "When did the teacher of {name} win the larch prize?",
    ),
    Fact(
        "dog",
        "name",
        ("has a dog called {value}", "walks a dog called {value}", "calls the dog {value}"),
        ("What is the dog of {name} called?", "How is the dog of {name} called?"),
        "What is the dog of the teacher of {name} called?",
    ),
)
"""The eight facts of every person.

No two of them have values of the same form: a date and a year, a full name and a first name, a town
and an address. So questions on one person test what was read, and it takes two people to test whose
it was.
"""

_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_ONSETS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "sk",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
_CODAS = ["", "l", "m", "n", "r", "s", "th", "x"]
_LAST = [
    "berg",
    "croft",
    "dale",
    "field",
    "holm",
    "ley",
    "mark",
    "ric",
    "son",
    "vel",
    "wick",
    "worth",
]
_TOWN = ["burg", "bury", "ford", "haven", "mouth", "port", "ton", "vale", "ville", "wich"]
_STREET = ["bank", "bridge", "gate", "green", "hill", "park", "well", "wood"]
_TRADE = ["Bakery", "Foundry", "Mills", "Museum", "Press", "Railway", "Shipyard", "Weavers"]


@dataclass(frozen=True)
class Person:
    """Someone invented.

    Attributes:
        name: First and last name.
        values: The value of each fact, by the fact's name. A fact that the biography leaves out
            is not among them.
    """

    name: str
    values: dict[str, str] = field(hash=False)


@dataclass(frozen=True)
class BiographyQuestion:
    """A question on some people.

    Attributes:
        text: The question.
        answer: The only right answer, as the biographies write it, or `UNKNOWN`.
        kind: `one` (a fact of one person), `two` (it takes two documents) or `unanswerable`.
        detail: The kind of the value asked for.
        people: Which of the people have to be read.
    """

    text: str
    answer: str
    kind: Literal["one", "two", "unanswerable"]
    detail: Detail
    people: tuple[int, ...]


class Biographies:
    """A world of invented people.

    Args:
        seed: Draws the words of the world and everything in it.
        num_first: First names that there are.
        num_last: Last names that there are.
        num_places: Towns that there are, and as many streets.
        num_employers: Employers that there are.
        facts_a_sentence: Fewest and most facts told in one sentence.
        left_out: Share of the facts that a biography leaves out, which makes their questions
            unanswerable.
        wordings: How many wordings of each fact and question are used.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        num_first: int = 200,
        num_last: int = 400,
        num_places: int = 100,
        num_employers: int = 80,
        facts_a_sentence: tuple[int, int] = (1, 3),
        left_out: float = 0.0,
        wordings: int = 3,
    ) -> None:
        low, high = facts_a_sentence
        if not 1 <= low <= high <= len(FACTS):
            raise ValueError(
                f"facts_a_sentence ({facts_a_sentence}) must be two numbers from 1 to "
                f"{len(FACTS)}, the smaller one first"
            )
        if not 0 <= left_out < 1:
            raise ValueError(f"left_out ({left_out}) must be from 0 to below 1")
        if wordings < 1:
            raise ValueError(f"wordings ({wordings}) must be at least 1")
        self.seed = seed
        self.facts_a_sentence = (low, high)
        self.left_out = left_out
        self.wordings = wordings
        rng = random.Random(f"words {seed}")
        self.firsts = _words(num_first, lambda: _syllable(rng) + _syllable(rng))
        self.lasts = _words(num_last, lambda: _syllable(rng) + rng.choice(_LAST))
        self.places = _words(num_places, lambda: _syllable(rng) + rng.choice(_TOWN))
        self.streets = _words(num_places, lambda: _syllable(rng) + rng.choice(_STREET))
        trades = _words(num_employers, lambda: _syllable(rng) + _syllable(rng))
        self.employers = [f"{word} {rng.choice(_TRADE)}" for word in trades]

    def words(self) -> list[str]:
        """Every word, number and mark that biographies, questions and answers are written with."""
        phrases = [*self.firsts, *self.lasts, *self.places, *self.streets, *self.employers]
        phrases += [*_MONTHS, UNKNOWN, "Street"]
        for fact in FACTS:
            phrases += [text.format(value="", name="") for text in (*fact.clauses, *fact.questions)]
            phrases.append(fact.of_teacher.format(name=""))
        phrases += map(str, [*range(1, 100), *range(1900, 2020)])
        found = re.findall(r"\w+", " ".join([*phrases, "and"]))
        return [*sorted(set(found)), ".", ",", "?"]

    def group(self, number: int, size: int = 1) -> list[Person]:
        """Group `number` of people, no two of the same name, always the same ones.

        Each of them but the last was, as often as not, taught by the next one, so that questions
        on two documents have an answer.

        Args:
            number: Which group.
            size: How many people.
        """
        rng = random.Random(f"group {self.seed} {number} {size}")
        firsts = _draw(rng, self.firsts, size)
        lasts = _draw(rng, self.lasts, size)
        names = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
        people = []
        for place, name in enumerate(names):
            values = {fact.name: self._value(rng, fact) for fact in FACTS}
            if place + 1 < size and rng.random() < 0.5:
                values["teacher"] = names[place + 1]
            kept = {key: value for key, value in values.items() if rng.random() >= self.left_out}
            people.append(Person(name, kept or values))
        return people

    def text(self, person: Person, rng: random.Random) -> str:
        """A biography: what is true of a person in drawn order and wording.

        Args:
            person: The person.
            rng: Draws the order, the sentences and the wordings.
        """
        facts = [fact for fact in FACTS if fact.name in person.values]
        rng.shuffle(facts)
        clauses = [
            rng.choice(fact.clauses[: self.wordings]).format(value=person.values[fact.name])
            for fact in facts
        ]
        sentences = []
        while clauses:
            count = rng.randint(*self.facts_a_sentence)
            told, clauses = clauses[:count], clauses[count:]
            joined = ", ".join(told[:-1]) + " and " + told[-1] if len(told) > 1 else told[0]
            sentences.append(f"{person.name} {joined}.")
        return " ".join(sentences)

    def questions(self, people: Sequence[Person], rng: random.Random) -> list[BiographyQuestion]:
        """All questions on some people, in drawn wordings: each fact of each, and those on two.

        Args:
            people: Whose biographies are at hand.
            rng: Draws the wordings.
        """
        return [*self._single(people, rng), *self._on_teachers(people, rng)]

    def stranger(self, people: Sequence[Person], rng: random.Random) -> BiographyQuestion:
        """A question on someone of whom no biography is at hand."""
        names = {person.name for person in people}
        while True:
            name = f"{rng.choice(self.firsts)} {rng.choice(self.lasts)}"
            if name not in names:
                break
        fact = rng.choice(FACTS)
        text = rng.choice(fact.questions[: self.wordings]).format(name=name)
        return BiographyQuestion(text, UNKNOWN, "unanswerable", fact.detail, ())

    def _single(self, people: Sequence[Person], rng: random.Random) -> Iterator[BiographyQuestion]:
        for place, person in enumerate(people):
            for fact in FACTS:
                text = rng.choice(fact.questions[: self.wordings]).format(name=person.name)
                answer = person.values.get(fact.name)
                kind: Literal["one", "unanswerable"] = "unanswerable" if answer is None else "one"
                yield BiographyQuestion(text, answer or UNKNOWN, kind, fact.detail, (place,))

    def _on_teachers(
        self, people: Sequence[Person], rng: random.Random
    ) -> Iterator[BiographyQuestion]:
        places = {person.name: place for place, person in enumerate(people)}
        for place, person in enumerate(people):
            teacher = places.get(person.values.get("teacher", ""))
            if teacher is None:
                continue
            for fact in FACTS:
                answer = people[teacher].values.get(fact.name)
                if fact.of_teacher and answer is not None:
                    text = fact.of_teacher.format(name=person.name)
                    yield BiographyQuestion(text, answer, "two", fact.detail, (place, teacher))

    def _value(self, rng: random.Random, fact: Fact) -> str:
        if fact.name == "birthday":
            return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1900, 1979)}"
        if fact.name == "home":
            return f"{rng.randint(2, 99)} {rng.choice(self.streets)} Street"
        if fact.name == "prize":
            return str(rng.randint(1980, 2019))
        if fact.name == "teacher":
            return f"{rng.choice(self.firsts)} {rng.choice(self.lasts)}"
        if fact.name == "dog":
            return rng.choice(self.firsts)
        if fact.detail == "number":
            return str(rng.randint(2, 99))
        return rng.choice(self.places if fact.detail == "place" else self.employers)


def _syllable(rng: random.Random) -> str:
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)


def _words(count: int, make: Callable[[], str]) -> list[str]:
    """`count` different capitalised words, in the order in which they were made."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[make().capitalize()] = None
    return list(words)


def _draw(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    """`count` words, different ones as far as they go."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(words, min(count - len(drawn), len(words)))
    return drawn
