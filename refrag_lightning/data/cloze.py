"""Cloze questions: a name, a date or a number cut out of a sentence, and what kind an answer is.

By patterns, without a language model, for texts in English: a name is a run of capitalised words
that does not owe its capital to the sentence's beginning; a date is a year, or a month with a day
or a year; a number is written in digits, perhaps with a currency or unit, or as a word from three
on. A pattern takes some of them wrongly, which costs a training question little; what is certain is
that the answer stands in its passage once and so is found at that place alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from refrag_lightning.data.questions import Question, QuestionSource
from refrag_lightning.data.sources import BLANK_LINES, TextSource, check_cutting, passages_of

Kind = Literal["name", "date", "number"]
KINDS: tuple[Kind, ...] = get_args(Kind)

BLANK = "____"
"""What stands in a question where its answer was."""

# Sentences of fewer or more words say too little, or take too many positions.
_SENTENCE_WORDS = range(6, 41)

_MONTH = (
    "(?:January|February|March|April|May|June|July|August|September|October|November|December"
    "|(?:Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec)\\.)"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_YEAR = r"(?:1\d{3}|20\d\d)"
_ERA = r"(?:AD|BC|CE|BCE|A\.D\.|B\.C\.)"
_DATE = re.compile(
    rf"(?<![\w.,/£$€¥₹-])(?:"
    rf"(?:{_DAY} (?:of )?{_MONTH}|{_MONTH} {_DAY})(?:,? {_YEAR})?"
    rf"|{_MONTH},? {_YEAR}"
    rf"|{_YEAR}[-–/](?:\d{{4}}|\d\d)"
    rf"|(?:AD|A\.D\.) \d{{1,4}}|\d{{1,4}} {_ERA}(?!\w)"
    rf"|{_YEAR}(?:s|’s|'s)?"
    rf")(?![\w%–/-]|[.,]\d)"
)
_SMALL = "three|four|five|six|seven|eight|nine"
_TEENS = "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_LARGE = "hundred|thousand|million|billion|trillion"
_NUMBER_WORD = (
    rf"(?:(?:{_TENS})(?:[- ](?:one|two|{_SMALL}))?|{_TEENS}|{_SMALL}"
    rf"|(?:one|two|a) (?={_LARGE}))"
)
_UNIT = (
    r"(?:%|percent|per cent|[kcm]?m|km/h|mph|miles?|feet|foot|ft|inch(?:es)?|yards?|acres?"
    r"|hectares?|[km]?g|pounds?|tons?|tonnes?|[kMG]?Hz|[kMG]?W|°[CF]?|degrees|years?|months?|weeks?"
    r"|days?|hours?|minutes?|seconds?|(?:square|cubic) (?:miles|feet|(?:kilo)?met(?:re|er)s)"
    r"|(?:kilo|centi|milli)?(?:metres?|meters?|grams?)|dollars?|euros?|shillings?|francs?)"
)
_NUMBER = re.compile(
    rf"(?<![\w.,/£$€¥₹:-])(?:"
    rf"(?:[£$€¥₹] ?)?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?(?: (?:{_LARGE}))?"
    rf"|{_NUMBER_WORD}(?: (?:{_LARGE}))*"
    rf")(?:[ -]?{_UNIT})?(?![\w%–/:-]|[.,]\d)"
)

# Words, parted by spaces, that are capitalised for another reason than being a name.
_NOT_NAMES = (
    "a about above according additionally after afterwards again against ah alas all almost alone "
    "along already also although always am among an and another any anyone anything are around as "
    "at away aye be because been before behind below besides between both but by can certainly "
    "come could despite did do does during each early either else even eventually ever every "
    "everybody everyone everything except few finally first following for former formerly from "
    "further furthermore generally go good had has have having he hence her here hers herself him "
    "himself his how however i if in indeed initially instead into is it its itself just last "
    "late later let like likewise little look madam many may maybe me meanwhile might mine more "
    "moreover most mostly much must my myself near nearly neither never nevertheless next no "
    "nobody none nor not nothing notwithstanding now o of off often oh old on once one only or "
    "originally other others otherwise our out over own perhaps please presently previously quite "
    "rather recently said says second see several shall she should similarly since sir so some "
    "somebody someone something sometimes soon still subsequently such suddenly than that the "
    "their them then there therefore these they thine third this those thou though through thus "
    "thy till to today together tomorrow too towards two typically under unfortunately unless "
    "unlike until up upon us usually very was we well were what whatever when whence whenever "
    "where whereas wherever whether which while who whoever whom whose why will with within "
    "without would yes yesterday yet you your yours yourself "
    "monday tuesday wednesday thursday friday saturday sunday january february march april june "
    "july august september october november december "
    "three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred "
    "lord lady king queen prince princess duke count captain colonel general doctor president "
    "professor father mother uncle aunt brother sister miss chapter book section part volume "
    "figure table note god heaven mr mrs ms dr st"
)
# Alone these are mostly guessed without the passage.
_ADJECTIVES = (
    "african american arab asian australian austrian belgian british canadian chinese christian "
    "dutch english european french german greek indian irish italian japanese jewish latin "
    "mexican muslim polish roman russian scottish spanish swedish swiss turkish welsh"
)
_NO_NAMES = frozenset(_NOT_NAMES.split())
_GUESSED = frozenset(_ADJECTIVES.split())
_ROMAN = re.compile(r"[IVXLCDM]+\.?")
_HONORIFIC = r"(?:Mr|Mrs|Ms|Dr|St|Lt|Col|Gen|Capt|Sgt|Prof|Rev|Hon|M|Mme|Mlle)\."
_WORD = r"[^\W\d_a-zß-öø-ÿ][\w'’-]*[\w]"
_NAME = re.compile(
    rf"(?<![\w'’.-])(?:{_HONORIFIC} )?(?:[A-Z]\. ?)*{_WORD}"
    rf"(?: (?:(?:of the|of|de la|de|von|van|du|del|di|da|la|le|der|the) )?(?:[A-Z]\. ?)*{_WORD})*"
)
_POSSESSIVE = re.compile(r"['’]s?$")
# Behind these a word is capitalised as at a sentence's beginning.
_OPENS = re.compile(r"[\"“”‘'(\[:;—–-]\s*$")

_ENDS = re.compile(r"[.!?…]['\"”’)\]]*(?=\s+[\"“‘'(\[]?[^\W_a-zß-öø-ÿ]|\s*$)")
_NO_END = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Lt|Col|Gen|Capt|Sgt|Prof|Rev|Hon|Mme|Mlle|Messrs|Jr|Sr|vs|No|Nos|Vol"
    r"|cf|ca|etc|approx|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec|Edw|Edwd|Wm|Chas|Geo|Jas|Thos|i\.e"
    r"|e\.g)|(?<![\w.])[A-Za-z]|\.[A-Za-z])\.$"
)


class ClozeQuestions(QuestionSource):
    """Sentences of texts with a blank, each with the passage that it stands in as the gold one.

    The answer, a name, date or number, stands once in the passage, and not in its title. Left out
    are headings, verse, sentences in or with a part of a quotation, and sentences of fewer than 6
    or more than 40 words.

    With `QuestionConversations`: `prompt: "{passages}Fill in the blank: {question}"`.

    Args:
        texts: The texts: passages, or books that are cut into them. Its own `held_out` must be 0.
        max_words: Cut texts into passages of at most so many words, between paragraphs or, where
            one is longer, between sentences; None takes each text whole.
        per_passage: Most questions of a passage, each of another sentence.
        kinds: What is cut out. Of a sentence with several kinds, each kind is as likely.
        seed: Of what is drawn.
        held_out: Share of the passages for validation, and the same again for test.
        limit: Most questions that are read.

    Raises:
        ValueError: If a setting is out of its range, or `texts` holds out texts of its own.
    """

    def __init__(
        self,
        texts: TextSource,
        max_words: int | None = 120,
        per_passage: int = 2,
        kinds: Sequence[Kind] = KINDS,
        seed: int = 0,
        held_out: float = 0.0,
        limit: int | None = None,
    ) -> None:
        super().__init__(held_out, limit)
        check_cutting(texts, max_words)
        if per_passage < 1:
            raise ValueError(f"per_passage ({per_passage}) must be at least 1")
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds ({list(kinds)}) must be some of {', '.join(KINDS)}")
        self.texts = texts
        self.max_words = max_words
        self.per_passage = per_passage
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self.seed = seed

    def read(self) -> Iterator[Question]:
        """Yields the questions, passage after passage, in the order of their sentences."""
        for place, passage in enumerate(passages_of(self.texts, self.max_words)):
            blanks = self._blanks(
                passage.text, passage.title, random.Random(f"{self.seed} {place}")
            )
            for number, (sentence, start, end, kind) in enumerate(blanks, start=1):
                yield Question(
                    id=f"{passage.id}-{number}",
                    question=f"{sentence[:start]}{BLANK}{sentence[end:]}",
                    answers=(sentence[start:end],),
                    passages=(replace(passage, gold=True),),
                    kind=kind,
                )

    def key(self) -> dict[str, Any]:
        """The texts' key and the settings."""
        return {
            "cloze": self.texts.key(),
            "max_words": self.max_words,
            "per_passage": self.per_passage,
            "kinds": self.kinds,
            "seed": self.seed,
            "held_out": self.held_out,
            "limit": self.limit,
        }

    def _blanks(
        self, text: str, title: str, draw: random.Random
    ) -> list[tuple[str, int, int, Kind]]:
        """Sentences of a passage, each with the answer's first and past-last character and kind."""
        sentences = list(_sentences(text))
        folded = " ".join(text.split()).casefold()
        found = []
        for number in draw.sample(range(len(sentences)), len(sentences)):
            sentence = sentences[number]
            candidates: dict[Kind, list[tuple[int, int]]] = {}
            for kind, start, end in _candidates(sentence):
                answer = sentence[start:end].casefold()
                if (
                    kind in self.kinds
                    and answer not in title.casefold()
                    and _stands_once(answer, folded)
                ):
                    candidates.setdefault(kind, []).append((start, end))
            if candidates:
                kind = draw.choice(list(candidates))
                found.append((number, (sentence, *draw.choice(candidates[kind]), kind)))
            if len(found) == self.per_passage:
                break
        return [blank for _, blank in sorted(found)]


def answer_kind(text: str) -> Literal["name", "date", "number", "other"]:
    """What kind of answer a text is, by the patterns that cloze questions are made with.

    - date: dates, years, weekdays and months, and nothing but words such as "in" or "early" beside
    - number: begins with a number, perhaps behind "about" or the like, that is no year, and at most
      three words follow, none of them capitalised
    - name: every word has a capital, but for articles and prepositions
    - other: everything else
    """
    answer = " ".join(text.split()).strip("\"'“”‘’.,;:!?()[] ")
    rest = _DATE_PART.sub(" ", answer)
    if rest != answer and not _BESIDE_DATE.sub("", rest).strip(" ,.–-"):
        return "date"
    bare = _BEFORE_NUMBER.sub("", answer)
    number = _NUMBER.match(bare) or _NUMBER_RANGE.match(bare) or _OTHER_NUMBER.match(bare)
    year = _DATE.match(bare)
    if number and (year is None or year.end() < number.end()):
        after = bare[number.end() :].split()
        if len(after) <= 3 and not any(word[0].isupper() for word in after):
            return "number"
    words = [word for word in re.split(r"[\s–—/]+", answer) if word not in _SMALL_WORDS]
    if any(map(_has_capital, words)) and all(_has_capital(w) or w[0].isdigit() for w in words if w):
        return "name"
    return "other"


_DATE_PART = re.compile(
    rf"{_DATE.pattern}|\b{_MONTH}(?!\w)|\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"
    r"|\b\w+(?:st|nd|rd|th)[ -](?=century|centuries)"
    r"|\b\d{1,2}/\d{1,2}/\d{2,4}\b|\b\d{4}-\d\d-\d\d\b"
)
_BESIDE_DATE = re.compile(
    r"(?i)\b(?:in|on|at|by|of|the|from|to|until|since|between|and|or|about|around|circa|c|ca|early"
    r"|mid|late|before|prior|after|during|year|years|summer|winter|spring|autumn|fall|century"
    rf"|centuries|decade|{_DAY}|{_ERA})(?!\w)"
)
_BEFORE_NUMBER = re.compile(
    r"(?i)^(?:(?:about|around|over|under|above|below|nearly|almost|approximately|roughly|some|only"
    r"|up to|at least|at most|(?:more|less|fewer) than)\s+)+"
)
_NUMBER_RANGE = re.compile(rf"\d[\d,.]*[-–]\d[\d,.]*(?: ?{_UNIT})?(?![\w-])")
_OTHER_NUMBER = re.compile(
    r"(?i)(?:zero|one|two|half|once|twice|a dozen|(?:dozens|hundreds|thousands|millions|billions)"
    rf"(?: of)?|{_NUMBER_WORD})(?:[ -](?:{_LARGE}))*(?![\w-])"
)
_SMALL_WORDS = frozenset(
    re.findall(r"\S+", "the a an of de la le du del di da von van der and & in on at for to")
)


def _has_capital(word: str) -> bool:
    return any(character.isupper() for character in word)


def _sentences(text: str) -> Iterator[str]:
    """Yields a passage's sentences of fair length that stand outside of quotations."""
    for paragraph in BLANK_LINES.split(text):
        lines = paragraph.splitlines()
        if len(lines) > 1 and len(paragraph) < 60 * len(lines):
            continue  # verse, or a list
        start = 0
        depth = 0
        for end in _ENDS.finditer(paragraph):
            sentence = paragraph[start : end.end()].strip()
            if _NO_END.search(sentence) and end.end() < len(paragraph):
                continue
            start = end.end()
            before = depth
            depth += sentence.count("“") - sentence.count("”")
            straight = sentence.count('"')
            if straight % 2:
                depth = 1 - depth
            if (
                before == depth == 0
                and sentence[0] not in "\"“‘'"
                and sentence.count("(") == sentence.count(")")
                and BLANK not in sentence
                and len(sentence.split()) in _SENTENCE_WORDS
            ):
                yield " ".join(sentence.split())


def _candidates(sentence: str) -> Iterator[tuple[Kind, int, int]]:
    """Yields what may be cut out of a sentence: its kind, first and past-last character."""
    taken: list[tuple[int, int]] = []
    for kind, pattern in (("date", _DATE), ("number", _NUMBER)):
        for found in pattern.finditer(sentence):
            if not any(found.start() < end and start < found.end() for start, end in taken):
                taken.append(found.span())
                yield kind, *found.span()  # type: ignore[misc]
    for found in _NAME.finditer(sentence):
        start, end = found.span()
        end -= len(found[0]) - len(_POSSESSIVE.sub("", found[0]))
        words = sentence[start:end].split(" ")
        opening = start == 0 or _OPENS.search(sentence[:start]) is not None
        while (
            words
            and words[0].strip(".'’").casefold() in _NO_NAMES
            and not (
                len(words) > 1
                and not opening
                and words[0].casefold() not in ("i", "the", "a", "an")
            )
        ):
            start += len(words.pop(0)) + 1
            opening = False
        if not words or words[0][0].islower() or re.match(r"I['’]", words[0]):
            continue
        if len(words) == 1 and (opening or words[0].casefold() in _GUESSED):
            continue
        if _ROMAN.fullmatch(sentence, start, end) or sentence.isupper():
            continue
        if any(start < last and first < end for first, last in taken):
            continue
        yield "name", start, end


def _stands_once(answer: str, text: str) -> bool:
    """Whether a text has an answer once, as whole words; both case-folded."""
    count = text.count(answer)
    if count > 1:
        count = len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", text))
    return count == 1
