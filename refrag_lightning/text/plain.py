"""PlainTokenizer: text to token ids and character offsets, with nothing read between the lines.

A Hugging Face tokenizer reads control strings such as `<|im_end|>` inside a text as control
tokens, and some put a space before the text. Neither may happen to documents and user text, which
stand in the middle of a prompt. So the tokenizer's backend is copied, without its post-processor,
and told to treat every control string as ordinary characters; the original is left as it is.

An artificial leading space is kept where the tokenizer itself would put it: at a text's beginning
and, in some families, behind added tokens. So a prompt without documents has the ids that
Hugging Face gives it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How far `PlainTokenizer.cut` looks for a place, in characters, and how many places at once.
_FAR, _AT_ONCE = 32, 8


After = Literal["nothing", "added", "text"]
"""What stands before a text: nothing, an added token (most are control tokens), or other text."""


class Encoded(NamedTuple):
    """One text's tokens: `ids` (N,), first characters `starts` (N,), past-last ones `ends` (N,).

    `ends` never falls. Tokens that split one character share its end.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class PlainTokenizer:
    """Tokenizes texts apart from each other, without special tokens.

    Args:
        tokenizer: A Hugging Face tokenizer, fast or slow. A slow one has no offsets; they are
            recovered from decoded prefixes, which takes quadratic time and needs a tokenizer whose
            decoding gives the text back.
        leading_space: Whether the tokenizer's own artificial space (SentencePiece's `▁`,
            byte-level BPE's `add_prefix_space`) stays before every text, whatever stands before it.
        control: Whether control strings become control tokens. Only for text that we wrote, such
            as the pieces of a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        leading_space: bool = False,
        control: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._control = control
        forbidden = set() if control else set(control_tokens(tokenizer))
        # By id, the last entry for all ids behind: quicker than `np.isin`, which sorts.
        self._is_forbidden = np.zeros(max(forbidden, default=-1) + 2, dtype=bool)
        self._is_forbidden[[*forbidden]] = True
        self.unknown_id = tokenizer.unk_token_id
        self._backends: dict[After, Tokenizer] = {}
        self._resumes = np.zeros(1, dtype=bool)
        if tokenizer.is_fast:
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            state.update(post_processor=None, truncation=None, padding=None)
            for token in state["added_tokens"]:
                token["special"] = token["special"] or token["id"] in forbidden
            states: dict[After, str] = {"nothing": json.dumps(state)}
            for after in () if leading_space else ("added", "text"):  # type: After
                for key in ("normalizer", "pre_tokenizer"):
                    state[key] = _without_leading_space(state[key], after)
                states[after] = json.dumps(state)
            made = {text: Tokenizer.from_str(text) for text in states.values()}
            for backend in made.values():
                backend.encode_special_tokens = not control
            self._backends = {after: made[text] for after, text in states.items()}
            if len(made) > 1 and states["added"] != states["text"]:
                # Behind a token that is found in the normalized text, no normalizer puts a space.
                by_normalizer = state["normalizer"] != json.loads(states["added"])["normalizer"]
                # The unknown token is often an added one too, but stands for any text.
                model = state["model"]
                unknown = {self.unknown_id, model.get("unk_id")}
                if model.get("unk_token") is not None:
                    unknown.add(tokenizer.backend_tokenizer.token_to_id(model["unk_token"]))
                ids = [
                    t["id"]
                    for t in state["added_tokens"]
                    if t["id"] not in unknown and not (by_normalizer and t["normalized"])
                ]
                self._resumes = np.zeros(max(ids, default=-1) + 2, dtype=bool)
                self._resumes[ids] = True

    def __call__(self, texts: Sequence[str], after: After = "text") -> list[Encoded]:
        """Returns each text's tokens.

        Args:
            texts: The texts.
            after: What stands before each of them. A slow tokenizer's own space stays everywhere.

        Raises:
            ValueError: If a text holds a lone surrogate, which no tokenizer can read.
        """
        for index, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                where = f"character {error.start} of text {index}"
                raise ValueError(f"{text[error.start]!r} at {where} is no character") from None
        if not self._backends:
            encoded = [self._encode_slowly(text) for text in texts]
        else:
            backend = self._backends.get(after, self._backends["nothing"])
            encoded = [
                _from_offsets(item.ids, item.offsets)
                for item in backend.encode_batch(list(texts), add_special_tokens=False)
            ]
            if after == "text" and len(self._resumes) > 1:
                encoded = [self._resumed(t, item) for t, item in zip(texts, encoded, strict=True)]
        if not self._control:
            encoded = [
                self._defused(text, item, after) for text, item in zip(texts, encoded, strict=True)
            ]
        return encoded

    def cut(self, text: str, num_tokens: int, *, from_end: bool = False) -> str:
        """The beginning or end of a text that has a number of tokens by itself.

        What is left of a word that is cut may be read as more or fewer tokens than before, so the
        cut is moved to the nearest character that gives the number. Where none near by does, as one
        character takes several tokens, the piece has fewer; it never has more.

        Args:
            text: The text; it is whole where it has no more tokens.
            num_tokens: How many tokens.
            from_end: Whether the end is kept, in place of the beginning.
        """
        (tokens,) = self([text])
        if num_tokens >= len(tokens.ids):
            return text
        if num_tokens < 1:
            return ""
        place = int(tokens.ends[-num_tokens - 1 if from_end else num_tokens - 1])
        near = range(max(0, place - _FAR), min(len(text), place + _FAR) + 1)
        places = sorted(near, key=lambda other: abs(other - place))
        best, most = "", 0
        for first in range(0, len(places), _AT_ONCE):
            some = places[first : first + _AT_ONCE]
            pieces = [text[other:] if from_end else text[:other] for other in some]
            for piece, read in zip(pieces, self(pieces), strict=True):
                if len(read.ids) == num_tokens:
                    return piece
                if most < len(read.ids) < num_tokens:
                    best, most = piece, len(read.ids)
        return best

    @property
    def depends_on_place(self) -> bool:
        """Whether what stands before a text can change its tokens."""
        return len({id(backend) for backend in self._backends.values()}) > 1

    def behind(self, encoded: Encoded) -> After:
        """What stands before a text that follows these tokens, which are not none."""
        return "added" if _is_in(self._resumes, encoded.ids[-1:]).any() else "text"

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what the tokens depend on; a cache of tokens is named by it."""
        if self._backends:
            state = "".join(dict.fromkeys(b.to_str() for b in self._backends.values()))
        else:
            state = json.dumps([type(self._tokenizer).__qualname__, self._tokenizer.get_vocab()])
        return hashlib.sha256(state.encode()).hexdigest()

    def _encode_slowly(self, text: str) -> Encoded:
        from refrag_lightning.text.alignment import ends_by_decoding

        def decode(ids: list[int]) -> str:
            # Cleaning up would drop spaces before marks, and the text would not come back.
            return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

        read = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids = np.asarray(read["input_ids"], dtype=np.int64)
        ends = ends_by_decoding(text, ids.tolist(), decode)
        starts = np.concatenate([[0], ends[:-1]])[: len(ends)]
        return Encoded(ids, starts, ends)

    def _resumed(self, text: str, encoded: Encoded) -> Encoded:
        """Reads what follows a text's first added token as the tokenizer reads it there."""
        places = np.flatnonzero(_is_in(self._resumes, encoded.ids[:-1]))
        if not places.size:
            return encoded
        cut = int(encoded.ends[places[0]])
        (rest,) = self([text[cut:]], "added")
        head = Encoded(*(part[: places[0] + 1] for part in encoded))
        return _joined([head, rest], [0, cut])

    def _defused(self, text: str, encoded: Encoded, after: After) -> Encoded:
        """Cuts a text inside whatever still reads as control tokens, and tokenizes the parts.

        A unigram vocabulary may hold a control string as an ordinary piece.
        """
        bad = _is_in(self._is_forbidden, encoded.ids)
        if not bad.any():
            return encoded
        starts, ends = encoded.starts[bad], encoded.ends[bad]
        short = np.flatnonzero(ends - starts < 2)
        if short.size:
            start, end = int(starts[short[0]]), int(ends[short[0]])
            raise ValueError(
                f"the tokenizer reads {text[start:end]!r} at character {start} as a control token"
            )
        # All at once: one cut after another would take quadratic time and deep recursion.
        cuts = [0, *np.unique((starts + ends) // 2).tolist(), len(text)]
        first, *rest = (text[start:end] for start, end in pairwise(cuts))
        return _joined([*self([first], after), *self(rest)], cuts[:-1])


def _is_in(members: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(N,) whether each id is a member; the last entry of `members` is for all ids behind."""
    return members[np.minimum(ids, len(members) - 1)]


def _joined(parts: Sequence[Encoded], cuts: Sequence[int]) -> Encoded:
    """The tokens of a text's parts as those of the text, which was cut at these characters."""
    return Encoded(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.starts + cut for part, cut in zip(parts, cuts, strict=True)]),
        np.concatenate([part.ends + cut for part, cut in zip(parts, cuts, strict=True)]),
    )


def _from_offsets(ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    if len(ids) > 1:
        ends = np.maximum.accumulate(ends)
        # A byte-level token may end inside a character and the next one go on beyond it. No token
        # ends there, so the first takes the end of the next one that does end with a character.
        whole = np.append(starts[1:] >= ends[:-1], True)
        last = np.where(whole, np.arange(len(ids)), len(ids) - 1)
        ends = ends[np.minimum.accumulate(last[::-1])[::-1]]
    return Encoded(np.asarray(ids, dtype=np.int64), starts, ends)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    """The control tokens, by id: special tokens, and added ones that the chat template speaks.

    A text may never yield one. The unknown token is none of them.
    """
    template = str(tokenizer.chat_template or "")
    special = set(tokenizer.all_special_ids)
    tokens = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        spoken = any(map(str.isalnum, token.content)) and token.content in template
        if token.special or spoken or index in special:
            tokens[index] = token
    for index in special.difference(tokens):
        tokens[index] = AddedToken(str(tokenizer.convert_ids_to_tokens(index)), special=True)
    tokens.pop(tokenizer.unk_token_id, None)
    return tokens


def _without_leading_space(component: dict[str, Any] | None, after: After) -> dict[str, Any] | None:
    """Takes out of a normalizer or pre-tokenizer's settings the space that it would not put.

    Behind an added token most put one as at the beginning; only Metaspace knows `first`.
    """
    if component is None or (component["type"] == "Prepend" and after == "text"):
        return None
    component = dict(component)
    if component["type"] == "Sequence":
        key = "normalizers" if "normalizers" in component else "pretokenizers"
        parts = (_without_leading_space(part, after) for part in component[key])
        component[key] = [part for part in parts if part is not None]
    elif component["type"] == "Metaspace":
        if after == "text" or component["prepend_scheme"] == "first":
            component["prepend_scheme"] = "never"
    elif component["type"] == "ByteLevel" and after == "text":
        component["add_prefix_space"] = False
    return component
