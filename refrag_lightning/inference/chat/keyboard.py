"""What stands between the keys and the chat: the prompt line, and Ctrl-C during an answer."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document as Line
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus, is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from refrag_lightning.inference.chat.commands import COMMANDS

_STYLE = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "placeholder": "ansibrightblack",
        "auto-suggestion": "ansibrightblack",
        "bottom-toolbar": "noreverse ansibrightblack",
        "completion-menu": "bg:default default",
        "completion-menu.completion.current": "noreverse bold ansicyan",
        "completion-menu.meta.completion": "bg:default ansibrightblack",
        "completion-menu.meta.completion.current": "bg:default default",
    }
)
_MARK, _FURTHER = "› ", "  "


class CommandCompleter(Completer):
    """Completes `/commands`, and the files behind those that take one."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Line, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        """Yields what can stand at the cursor."""
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        name, space, words = before.partition(" ")
        for command in COMMANDS:
            if not space and command.name.startswith(name):
                yield Completion(command.name, -len(name), display_meta=command.summary)
            elif space and command.name == name and "FILE" in command.argument:
                path = Line(words.rpartition(" ")[2])
                yield from self._files.get_completions(path, complete_event)


def history_at(path: Path) -> History:
    """The history of what was typed, in a file that only its owner can read.

    Where the file cannot be written, it lasts as long as the process.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def prompt_line(history: Path, state: Callable[[], str]) -> PromptSession[str]:
    """The line at which questions are typed.

    Enter sends; Alt-Enter begins another line, and a pasted text keeps its lines. Ctrl-C clears
    the line, Ctrl-D on an empty one raises EOFError.

    Args:
        history: File of what was typed before.
        state: Gives the text at the bottom of the screen.
    """
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER) & ~is_searching

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return PromptSession(
        message=[("class:prompt", _MARK)],
        prompt_continuation=_FURTHER,
        multiline=True,
        history=history_at(history),
        auto_suggest=AutoSuggestFromHistory(),
        completer=CommandCompleter(),
        # The menu takes lines of the screen, so only where there is something to complete.
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
        placeholder=[("class:placeholder", "Ask a question, or /help")],
        bottom_toolbar=lambda: [("class:bottom-toolbar", state())],
        key_bindings=keys,
        style=_STYLE,
        enable_suspend=True,
        include_default_pygments_style=False,
    )


@contextmanager
def ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Has Ctrl-C call `stop`, and once that was done raise KeyboardInterrupt.

    The second is for what `stop` cannot reach, such as a long prompt that is still being read.
    """
    stopped = False

    def pressed(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        stop()

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def unseen_keys() -> Iterator[None]:
    """Keeps what is typed meanwhile off the screen; it is there at the next prompt."""
    try:
        import termios
    except ImportError:  # no terminal of that kind on this system
        yield
        return
    try:
        place = sys.stdin.fileno()
        before = termios.tcgetattr(place)
    except (OSError, ValueError, termios.error):
        yield
        return
    quiet = termios.tcgetattr(place)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(place, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)
