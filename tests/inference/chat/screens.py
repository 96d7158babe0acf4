"""What a terminal shows after it got some output, as far as these tests need it."""

import re

_CODES = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>()][A-Z0-9]?|[\r\n\x08])")


def screen(output):
    """The lines that stand on the screen and above it, blanks at their ends left out.

    Knows text, line feeds, and the moves and erasures that rich and prompt_toolkit make.
    """
    lines = [""]
    row = column = 0
    for part in _CODES.split(output):
        if part == "\n":
            row += 1
        elif part == "\r":
            column = 0
        elif part == "\x08":
            column = max(0, column - 1)
        elif found := re.fullmatch(r"\x1b\[([0-9]*)([ABCDJK])", part):
            number, code = int(found[1] or (0 if found[2] in "JK" else 1)), found[2]
            if code == "A":
                row = max(0, row - number)
            elif code == "B":
                row += number
            elif code == "C":
                column += number
            elif code == "D":
                column = max(0, column - number)
            elif code == "K":
                lines += [""] * (row + 1 - len(lines))
                lines[row] = lines[row][:column] if number == 0 else ""
            elif number == 0:
                lines += [""] * (row + 1 - len(lines))
                lines[row:] = [lines[row][:column]]
        elif part and not part.startswith("\x1b"):
            lines += [""] * (row + 1 - len(lines))
            before = lines[row].ljust(column)
            lines[row] = before[:column] + part + before[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]
