"""The chat at a terminal: a line is typed, a command is done or a question answered, and so on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refrag_lightning.inference.chat import commands, transcript
from refrag_lightning.inference.chat.attach import attached
from refrag_lightning.inference.chat.commands import Call
from refrag_lightning.inference.chat.keyboard import ctrl_c, prompt_line, unseen_keys
from refrag_lightning.inference.chat.screen import Screen
from refrag_lightning.inference.chat.session import Reply, Session


def run(session: Session, screen: Screen, *, history: Path) -> None:
    """Chats until Ctrl-D or `/quit`.

    What the user gets wrong is told in one line, and so is what the model refuses or has no memory
    for; the chat goes on.

    Args:
        session: What answers and what is known so far.
        screen: What shows it.
        history: File of what was typed before.
    """
    line = prompt_line(history, lambda: screen.state(session))
    while True:
        try:
            typed = line.prompt()
            if not typed.strip():
                continue
            call = commands.read(typed)
            if call is None:
                _answer(session, screen, typed)
            elif call.name == "/quit":
                return
            else:
                _do(session, screen, call)
        except EOFError:
            return
        except KeyboardInterrupt:
            screen.note("interrupted")
        except (ValueError, OSError, RuntimeError) as error:
            screen.error(error)


def _answer(session: Session, screen: Screen, question: str) -> None:
    reply = session.ask(question)
    with _stoppable(reply):
        screen.stream(reply)
    screen.summary(reply.turn)


def _do(session: Session, screen: Screen, call: Call) -> None:
    """Does a command other than `/quit`."""
    match call.name:
        case "/help":
            screen.help()
        case "/docs":
            screen.documents(session, *call.arguments)
        case "/add":
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                documents = attached(call.arguments)
            screen.added(session.add(documents))
            for warning in told:
                screen.note(str(warning.message))
        case "/trace":
            screen.trace(session.last, *call.arguments)
        case "/full":
            reply = session.ask_with_full_text()
            with _stoppable(reply):
                screen.beside(session.last, reply)
        case "/clear":
            wrong = [word for word in call.arguments if word != "all"]
            if wrong:
                raise ValueError(f"/clear takes nothing or 'all' behind it, got {wrong[0]!r}")
            session.clear(documents=bool(call.arguments))
            screen.note("forgot the conversation" + (" and the documents" * bool(call.arguments)))
        case "/save":
            if len(call.arguments) > 1:
                raise ValueError(f"/save takes one file, got {' '.join(call.arguments)!r}")
            screen.note(f"wrote {transcript.save(session, Path(call.arguments[0]))}")
        case _:
            raise AssertionError(call.name)


@contextmanager
def _stoppable(reply: Reply) -> Iterator[None]:
    """Has Ctrl-C stop an answer and nothing else; its reply keeps what had come."""
    try:
        with unseen_keys(), ctrl_c(reply.stop):
            yield
    except KeyboardInterrupt:
        reply.give_up()
