"""The package's command at a real pseudo-terminal, as somebody sits before it."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pexpect
from pexpect.fdpexpect import fdspawn

from tests.inference.chat.screens import screen

ROOT = Path(__file__).parents[3]
# A new session's leader takes the terminal as its own, so that Ctrl-C reaches it. In a process of
# its own, because a fork of this one would be of one with threads.
_START = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, [sys.executable, '-m', 'refrag_lightning', *sys.argv[1:]])"
)


class Terminal:
    """A running command.

    Args:
        arguments: Of `python -m refrag_lightning`.
        cache: The package's cache folder, where the history goes.
    """

    def __init__(self, arguments, cache, *, rows=30, columns=100):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        settings = {
            "TERM": "xterm-256color",
            "REFRAG_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        unwanted = ("NO_COLOR", "COLUMNS", "LINES")
        inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=inherited | settings,
            start_new_session=True,
        )
        os.close(theirs)
        self._child = fdspawn(ours, encoding="utf-8", codec_errors="replace", timeout=60)
        self.output = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._child.close()

    @property
    def text(self):
        """What stands on the screen, and above it, since the last call of `type`."""
        return "\n".join(screen(self.output))

    def type(self, keys):
        """Types; what came before is forgotten."""
        self.output = ""
        self._child.send(keys)

    def until(self, *texts, seconds=60):
        """Waits until all of the texts are on the screen; returns what is."""
        deadline = time.monotonic() + seconds
        while not all(text in self.text for text in texts):
            assert time.monotonic() < deadline, self.text
            if not self._read():
                break
        shown = self.text
        assert all(text in shown for text in texts), shown
        return shown

    def ended(self, seconds=60):
        """Waits until the command has ended; returns its exit code."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, self.text
        return self.process.wait(seconds)

    def _read(self):
        try:
            came = self._child.read_nonblocking(1 << 16, timeout=0.1)
        except pexpect.TIMEOUT:
            pass
        except (pexpect.EOF, OSError):  # Linux says EIO where nobody has the terminal open
            return False
        else:
            self.output += came
            # A terminal says where its cursor is: on its first line, there is room for all.
            self._child.send("\x1b[1;1R" * came.count("\x1b[6n"))
        return True
