"""One question, and its answer alone on standard output as it comes."""

from __future__ import annotations

import os
import signal
import sys

from refrag_lightning.inference.chat.plain_text import printable
from refrag_lightning.inference.chat.session import Session


def answer(session: Session, question: str) -> None:
    """Prints the answer to a question, piece by piece, and a line feed.

    Into a file or a pipe it goes as it is; a terminal gets no control characters.

    Args:
        session: What answers.
        question: The question; white space at its ends does not count.

    Raises:
        ValueError: The question is empty, or the pipeline refuses it.
        SystemExit: Whoever reads the answer has stopped reading, with the code of SIGPIPE.
    """
    reply = session.ask(question.strip())
    shown = printable if sys.stdout.isatty() else str
    try:
        for piece in reply:
            print(shown(piece), end="", flush=True)
        print(flush=True)
    except BrokenPipeError:
        # Python flushes standard output once more when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    finally:
        session.close()
