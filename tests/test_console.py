"""What models and files say cannot drive a terminal; what is not a terminal gets it unchanged."""

import io
import os
import pty
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from illada_jax.api import Generation
from illada_jax.console import visible
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.tracing import terminal

# Set the clipboard (OSC 52), clear the screen, C1's CSI, ring, erase, overwrite a line, reverse the text.
HOSTILE = "a\x1b]52;c;aGk=\x07b\x1b[2Jc\x9b31md\x08\x7fe\rf\x00g\u202eh\u2066i\tj\nk"
SHOWN = ("a\\u001b]52;c;aGk=\\u0007b\\u001b[2Jc\\u009b31md\\u0008\\u007fe\\u000df\\u0000g\\u202eh\\u2066i\tj\nk")


def on_terminal(code, stream):
    """(Exit code, output) of a Python program whose `stream` (stdout or stderr) is a terminal."""
    ours, its = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL,
                               **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: its})
    os.close(its)
    output = b""
    try:
        while part := os.read(ours, 4096):
            output += part
    except OSError:  # Linux: the other side is closed
        pass
    os.close(ours)
    return process.wait(), output.decode().replace("\r\n", "\n")


PRINTS = "from illada_jax import cli; from tqdm import tqdm; cli.run(lambda _: {})"


@pytest.mark.parametrize(("call", "stream"), [
    (f"print({HOSTILE!r})", "stdout"), (f"tqdm.write({HOSTILE!r})", "stdout"),
    (f"(_ for _ in ()).throw(cli.InputError({HOSTILE!r}))", "stderr"),
    (f"(_ for _ in ()).throw(RuntimeError({HOSTILE!r}))", "stderr"),
    (f"(_ for _ in ()).throw(FileNotFoundError(2, 'gone', {HOSTILE!r}))", "stderr")])
def test_a_terminal_shows_control_characters(call, stream):
    assert SHOWN in on_terminal(PRINTS.format(call), stream)[1]


def test_a_pipe_gets_every_character():
    done = subprocess.run([sys.executable, "-c", PRINTS.format(f"print({HOSTILE!r})")], capture_output=True)
    assert done.stdout.decode() == HOSTILE + "\n"
    done = subprocess.run([sys.executable, "-c", PRINTS.format(f"(_ for _ in ()).throw(cli.InputError({HOSTILE!r}))")],
                          capture_output=True)
    assert done.stderr.decode() == f"error: {HOSTILE}\n" and done.returncode == 2


@given(st.text())
def test_no_control_character_is_left_and_the_rest_is_unchanged(text):
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert visible(shown) == shown
    kept = [c for c in text if visible(c) == c]
    assert "".join(c for c in text if c in kept) == "".join(kept) and (shown == text) == (len(kept) == len(text))


def test_a_watched_text_draws_no_control_characters():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("x" + HOSTILE)
    generation = Generation(ids[1:], 1, "length", [0] * (len(ids) - 1), [0.0] * (len(ids) - 1), ids,
                            [-1] + [0] * (len(ids) - 1), text=HOSTILE)
    for now in (0, 1):
        drawn = terminal.frame(generation, tokenizer, now).plain
        assert not [c for c in drawn if unicodedata.category(c) == "Cc" and c not in "\t\n"], repr(drawn)
    screen = io.StringIO()
    Console(width=200, file=screen, force_terminal=True).print(terminal.frame(generation, tokenizer, 1))
    assert "\x1b]" not in screen.getvalue() and "\x07" not in screen.getvalue()
