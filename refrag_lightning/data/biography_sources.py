"""Texts, questions and conversations on invented people: every answer is in the documents.

The parts of a source are different people: training, validation and test have groups of their own.
See `refrag_lightning.biographies`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from refrag_lightning.biographies import Biographies, BiographyQuestion
from refrag_lightning.data.conversations import Conversation, ConversationSource, Place, Turn
from refrag_lightning.data.questions import Passage, Question, QuestionSource
from refrag_lightning.data.rows import HeldOut, Split
from refrag_lightning.data.sources import TextSource

# Where the groups of a split begin: far enough apart for any number of them.
_FIRST_GROUP: dict[Split, int] = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}


@dataclass(frozen=True)
class _Group:
    """A group of people: what can be read and asked about it."""

    id: str
    texts: tuple[Passage, ...]
    names: tuple[str, ...]
    questions: tuple[BiographyQuestion, ...]


@dataclass
class BiographyWorld:
    """Which people there are, and how their biographies are written.

    Attributes:
        seed: Draws the world.
        num_people: People in a group, whose biographies are read together.
        facts_a_sentence: Fewest and most facts told in one sentence.
        wordings: How many wordings of each fact and question are used.
        left_out: Share of the facts that a biography leaves out.
        strangers: Questions a group on someone whose biography is not at hand.
        num_first: First names that there are.
        num_last: Last names that there are.
        num_places: Towns that there are, and as many streets.
        num_employers: Employers that there are.
    """

    seed: int = 0
    num_people: int = 1
    facts_a_sentence: tuple[int, int] = (1, 3)
    wordings: int = 3
    left_out: float = 0.0
    strangers: int = 0
    num_first: int = 200
    num_last: int = 400
    num_places: int = 100
    num_employers: int = 80

    def __post_init__(self) -> None:
        if self.num_people < 1:
            raise ValueError(f"num_people ({self.num_people}) must be at least 1")
        if self.strangers < 0:
            raise ValueError(f"strangers ({self.strangers}) must not be negative")
        self._world = Biographies(
            self.seed,
            num_first=self.num_first,
            num_last=self.num_last,
            num_places=self.num_places,
            num_employers=self.num_employers,
            facts_a_sentence=self.facts_a_sentence,
            left_out=self.left_out,
            wordings=self.wordings,
        )

    def groups(self, split: Split, count: int) -> Iterator[tuple[_Group, random.Random]]:
        """Yields groups of a split, each with what further choices on it are drawn from."""
        for number in range(count):
            rng = random.Random(f"{self.seed} {split} {number}")
            people = self._world.group(_FIRST_GROUP[split] + number, self.num_people)
            texts = tuple(
                Passage(self._world.text(person, rng), str(n)) for n, person in enumerate(people)
            )
            questions = self._world.questions(people, rng)
            questions += [self._world.stranger(people, rng) for _ in range(self.strangers)]
            names = tuple(person.name for person in people)
            yield _Group(f"{split}-{number}", texts, names, tuple(questions)), rng


class _OfPeople(HeldOut):
    """Base of the sources here: the groups of each split, and the key.

    Args:
        world: The people; the default ones if None.
        num_groups: Groups for training.
        eval_groups: Groups for validation, and as many for test.
        limit: Most items that are read.
        settings: What else decides the items; part of the key.
    """

    def __init__(
        self,
        world: BiographyWorld | None,
        num_groups: int,
        eval_groups: int,
        limit: int | None,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(0.0, limit)
        self.world = world or BiographyWorld()
        self.num_groups = num_groups
        self.eval_groups = eval_groups
        self.settings = settings

    def groups(self, split: Split) -> Iterator[tuple[_Group, random.Random]]:
        """Yields the groups of a split, each with what is drawn from."""
        count = self.num_groups if split == "train" else self.eval_groups
        return self.world.groups(split, count)

    def key(self) -> dict[str, Any]:
        """The settings; the seed says the rest."""
        return {
            "biographies": asdict(self.world),
            "num_groups": self.num_groups,
            "eval_groups": self.eval_groups,
            "limit": self.limit,
            **self.settings,
        }


class BiographyTexts(_OfPeople, TextSource):
    """Biographies of invented people, one text a group of people.

    Validation and test have people of their own, whatever their number.

    Args:
        world: The people.
        num_groups: Groups for training.
        eval_groups: Groups for validation, and as many for test.
    """

    def __init__(
        self,
        world: BiographyWorld | None = None,
        num_groups: int = 10000,
        eval_groups: int = 100,
    ) -> None:
        super().__init__(world, num_groups, eval_groups, None, {"items": "texts"})

    def read(self) -> Iterator[str]:
        """Yields the training texts."""
        return self.texts("train")

    def texts(self, split: Split) -> Iterator[str]:
        """Yields the texts of one split; no person stands in two."""
        for group, _ in self.groups(split):
            yield " ".join(passage.text for passage in group.texts)


class BiographyQuestions(_OfPeople, QuestionSource):
    """Questions on biographies, each with the biographies of its group as passages.

    Args:
        world: The people.
        num_groups: Groups for training.
        eval_groups: Groups for validation, and as many for test.
        questions_a_group: Questions drawn for each group; all if None.
        shuffle: Put each question's passages into a drawn order.
        limit: Most questions that are read.
    """

    def __init__(
        self,
        world: BiographyWorld | None = None,
        num_groups: int = 10000,
        eval_groups: int = 100,
        questions_a_group: int | None = None,
        shuffle: bool = True,
        limit: int | None = None,
    ) -> None:
        settings = {"questions_a_group": questions_a_group, "shuffle": shuffle}
        super().__init__(world, num_groups, eval_groups, limit, settings)
        self.questions_a_group = questions_a_group
        self.shuffle = shuffle

    def read(self) -> Iterator[Question]:
        """Yields the training questions."""
        return self._questions("train")

    def questions(self, split: Split) -> Iterator[Question]:
        """Yields the questions of one split; no person stands in two."""
        return self._split(self._questions(split), "train")

    def _questions(self, split: Split) -> Iterator[Question]:
        for group, rng in self.groups(split):
            for number, asked in enumerate(_drawn(group.questions, self.questions_a_group, rng)):
                passages = [
                    Passage(text.text, text.id, gold=place in asked.people)
                    for place, text in enumerate(group.texts)
                ]
                if self.shuffle:
                    rng.shuffle(passages)
                yield Question(
                    id=f"{group.id}-{number}",
                    question=asked.text,
                    answers=(asked.answer,),
                    passages=tuple(passages),
                    kind=asked.kind,
                    detail=asked.detail,
                )


class BiographyConversations(_OfPeople, ConversationSource):
    """Conversations of many questions on the same biographies: many targets for one reading.

    Args:
        world: The people.
        num_groups: Groups for training.
        eval_groups: Groups for validation, and as many for test.
        questions_a_group: Questions in each conversation; all if None.
        retell: How many of the group's people the user asks in the end to be told about again,
            from the documents: reconstruction, with the right document found by the name.
        prompt: Comes before a question.
        retell_prompt: The user's message that asks for a biography, with `{name}`.
        limit: Most conversations that are read.
    """

    def __init__(
        self,
        world: BiographyWorld | None = None,
        num_groups: int = 10000,
        eval_groups: int = 100,
        questions_a_group: int | None = None,
        retell: int = 0,
        prompt: str = "",
        retell_prompt: str = "Repeat the text about {name}.",
        limit: int | None = None,
    ) -> None:
        if "{name}" not in retell_prompt:
            raise ValueError(f"retell_prompt ({retell_prompt!r}) must have {{name}}")
        if retell < 0 or (not retell and questions_a_group == 0):
            raise ValueError(
                f"retell ({retell}) and questions_a_group ({questions_a_group}) leave nothing to "
                "be said"
            )
        settings = {
            "questions_a_group": questions_a_group,
            "retell": retell,
            "prompts": [prompt, retell_prompt],
        }
        super().__init__(world, num_groups, eval_groups, limit, settings)
        self.questions_a_group = questions_a_group
        self.retell = retell
        self.prompt = prompt
        self.retell_prompt = retell_prompt

    def read(self) -> Iterator[Conversation]:
        """Yields the training conversations."""
        return self._conversations("train")

    def conversations(self, split: Split) -> Iterator[Conversation]:
        """Yields the conversations of one split; no person stands in two."""
        return self._split(self._conversations(split), "train")

    def _conversations(self, split: Split) -> Iterator[Conversation]:
        for group, rng in self.groups(split):
            told = sorted(rng.sample(range(len(group.names)), min(self.retell, len(group.names))))
            asked = _drawn(group.questions, self.questions_a_group, rng)
            pairs = [(self.prompt + question.text, question.answer) for question in asked]
            # Behind the questions: they could be answered from what was told again.
            pairs += [
                (self.retell_prompt.replace("{name}", group.names[n]), group.texts[n].text)
                for n in told
            ]
            turns: list[Turn] = []
            for said, answer in pairs:
                place = () if turns else (Place.PASSAGES,)
                turns += [Turn("user", (*place, said)), Turn("assistant", (answer,))]
            people = {place for question in asked for place in question.people} | {*told}
            yield Conversation(
                group.id,
                tuple(turns),
                tuple(
                    Passage(text.text, text.id, gold=place in people)
                    for place, text in enumerate(group.texts)
                ),
                references=(pairs[-1][1],),
                task="answer" if asked else "reconstruct",
            )


def _drawn(
    questions: tuple[BiographyQuestion, ...], count: int | None, rng: random.Random
) -> list[BiographyQuestion]:
    """Some of the questions, in a drawn order."""
    return rng.sample(questions, len(questions) if count is None else min(count, len(questions)))
