"""The standard streams: control characters are shown escaped on a terminal, and no line is lost at a hard exit."""

import contextlib
import io
import os
import re
import sys
from typing import NoReturn

# C0 but tab and newline, DEL, C1 (ESC, CSI and OSC are among them), and what reorders text (Unicode TR 36).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""The text with control characters as in JSON.

    >>> print(visible("bell \x07, red \x1b[31m"))
    bell \u0007, red \u001b[31m
    """
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_error(text: str) -> None:
    """Prints to standard error, in one piece, and shows control characters if it is a terminal."""
    sys.stderr.write(f"{visible(text) if sys.stderr.isatty() else text}\n")
    sys.stderr.flush()


class _Visible(io.TextIOWrapper):
    """A terminal that shows control characters."""

    def write(self, text: str) -> int:
        super().write(visible(text))
        return len(text)


def protect_stdout() -> None:
    """From here on, standard output shows control characters if it is a terminal.

    Everything that commands print there is text. Standard error is left alone: progress bars and colours need control
    characters.
    """
    if sys.stdout.isatty():
        sys.stdout = _Visible(sys.stdout.buffer, sys.stdout.encoding, sys.stdout.errors, line_buffering=True)


def hard_exit(code: int) -> NoReturn:
    """Ends this process at once; an ordinary exit would wait for the threads of libraries and for other processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk, or a closed pipe
            stream.flush()
    os._exit(code)
