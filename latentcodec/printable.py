"""Text from outside, such as file names and other libraries' errors, as a terminal and a line of a file can take it."""

from __future__ import annotations

import re
from pathlib import Path

# All controls but tab and line feed; separators of lines and paragraphs; overrides of the direction of writing.
CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069]")

ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|r)")
UNDECODED = re.compile("[\udc80-\udcff]")  # a byte of a file name that is not UTF-8, as Python has it


def printable(text: str) -> str:
    """`text` as UTF-8 and a terminal can take it; line breaks and tabs stay.

    Bytes of a file name that are not UTF-8, and characters that move a terminal's cursor, clear its screen or turn
    the direction of writing, become backslash escapes.
    """
    utf8 = text.encode(errors="backslashreplace").decode()
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), utf8)


def existing(text: str) -> Path:
    """The file or folder that `text` names, be it its path or what `printable` made of it."""
    path = Path(text)
    return path if path.exists() else Path(ESCAPE.sub(_unescaped, text))


def _unescaped(match: re.Match[str]) -> str:
    character = match[0].encode().decode("unicode_escape")
    return character if CONTROL.match(character) or UNDECODED.match(character) else match[0]


def one_line(text: str) -> str:
    """`printable` text without line breaks: what a message or a list with a line for each file can hold."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
