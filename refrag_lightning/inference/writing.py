"""From tokens to text as they come: whole characters only, and no beginning of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what decoders put where bytes are no character, or not yet one


class Detokenizer:
    """Decodes tokens one after another.

    A token alone cannot be decoded: it may be half a character, or begin with a space only where
    something stands before it. So the last tokens that gave text are decoded again together with
    those behind them, and what is new is the difference.

    Args:
        tokenizer: The decoder's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._first = 0  # the tokens from here on are decoded again,
        self._done = 0  # and those before here gave their text already

    def add(self, token: int) -> str:
        """The text that a further token completes; "" while a character is incomplete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._first : self._done])
        now = self._decode(self._ids[self._first :])
        if now.endswith(_HALF) or len(now) <= len(before):
            return ""
        self._first, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What the last tokens say, at the end: as they are decoded, incomplete or not.

        A U+FFFD there may be one that the model wrote, or half a character, which nothing completes
        any more; either way the answer is what the tokenizer decodes.
        """
        before = self._decode(self._ids[self._first : self._done])
        now = self._decode(self._ids[self._first :])
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up would change text that is said already.
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class StopStrings:
    """Looks for stop strings in a text that comes in pieces.

    Args:
        stop: The strings.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """What can be said now: no stop string, nor what may be the beginning of one.

        After a stop string, nothing more comes.
        """
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(text.find(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if places:
            # Of two that begin at the same place, the longer one.
            place, _, self.found = min(places)
            self._held = ""
            return text[:place]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def rest(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held


class TextWriter:
    """Writes an answer token by token, and says when it is over.

    White space around the answer is not said: some chat templates have a space before it, and the
    decoder writes that too. What stands at the end so far waits for what follows.

    Args:
        tokenizer: The decoder's tokenizer.
        say: Takes each piece of text.
        end_ids: Tokens that end an answer.
        max_new_tokens: Most tokens.
        stop: Stop strings.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str], None],
        *,
        end_ids: frozenset[int],
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._say = say
        self._end_ids = end_ids
        self._max_new_tokens = max_new_tokens
        self._pieces: list[str] = []
        self._spaces = ""
        self.num_tokens = 0
        self.finish: str | None = None

    @property
    def text(self) -> str:
        """What was said so far."""
        return "".join(self._pieces)

    def write(self, token: int) -> None:
        """Takes the next token; nothing may come after the one that sets `finish`."""
        assert self.finish is None
        if token in self._end_ids:
            self.end("stop")
            return
        self.num_tokens += 1
        self._out(self._stop.add(self._detokenizer.add(token)))
        if self._stop.found is not None:
            self.finish = "stop_string"
        elif self.num_tokens == self._max_new_tokens:
            self.end("length")

    def end(self, finish: str) -> None:
        """Ends the answer, and says what was held back."""
        assert self.finish is None
        self._out(self._stop.add(self._detokenizer.rest()))
        self.finish = finish if self._stop.found is None else "stop_string"
        self._out(self._stop.rest())

    def _out(self, piece: str) -> None:
        piece = self._spaces + piece if self._pieces else piece.lstrip()
        said = piece.rstrip()
        self._spaces = piece[len(said) :]
        if said:
            self._pieces.append(said)
            self._say(said)


def _overlap(text: str, stop: str) -> int:
    """The longest beginning of `stop`, not the whole, that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
