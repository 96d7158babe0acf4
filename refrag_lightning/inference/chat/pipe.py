"""One question, and its answer alone on standard output as it comes."""

from __future__ import annotations

import os
import signal
import sys

from refrag_lightning.inference.chat.session import Session
from refrag_lightning.plain_text import say


def answer(session: Session, question: str) -> None:
    """Prints the answer to a question, piece by piece, and a line feed.

    What a terminal would obey or nobody sees is left out, also into a file or a pipe.

    Args:
        session: What answers.
        question: The question; white space at its ends does not count.

    Raises:
        ValueError: The question is empty, or the pipeline refuses it.
        SystemExit: Whoever reads the answer has stopped reading, with the code of SIGPIPE.
    """
    reply = session.ask(question.strip())
    before = ""
    try:
        for piece in reply:
            say(piece, after=before, end="", flush=True)
            before = piece or before
        say(flush=True)
    except BrokenPipeError:
        # Python flushes standard output once more when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    finally:
        session.close()
