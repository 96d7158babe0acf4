"""Texts that an attacker would put into a title, an answer or a file's name."""

import re

PROBES = {
    "title": "\x1b]0;owned\x07",
    "title_st": "\x1b]0;owned\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "link": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "clear": "\x1b[2J\x1b[H",
    "hidden": "\x1b[8mhidden\x1b[0m",
    "dcs": "\x1bPq#0;2;0;0;0\x1b\\",
    "apc": "\x1b_Gf=32;AAAA\x1b\\",
    "c1": "\x9b2J\x9d0;owned\x9c\x90q\x9c\x85",
    "return": "all is well\rerror",
    "backspace": "bad\x08\x08\x08good\x7f",
    "bidi": "\u202eevil\u202c \u2066x\u2069 \u200e\u200f\u061c",
    "zero_width": "pass\u200bword \ufeff\u2060\u200c\u200d\xad\u3164",
    "tags": "x\U000e0001\U000e0041\U000e0042\U000e007f",
    "surrogate": "x\ud800y\udcff",
}
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff"
    "\U000e0000-\U000e007f\ud800-\udfff]|(?<=[a-zA-Z ])[\u200c\u200d]"
)
# All but lone surrogates, which no file and no index can hold.
EVERYTHING = " ".join(probe for name, probe in PROBES.items() if name != "surrogate")


def harmful(text: str) -> str:
    """What of a text a terminal would obey or nobody would see; "" if nothing."""
    return "".join(found[0] for found in _HARMFUL.finditer(text)).replace("\n", "")
