"""Errors that the user can fix, exit codes, and Ctrl-C while a command starts."""

import os
import signal

# Exit codes of commands, besides 0 (success) and 1 (an unexpected error).
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: the same command, started on all hosts, continues from the newest checkpoint
EXIT_INTERRUPTED = 130  # as shells report for SIGINT
EXIT_BROKEN_PIPE = 141  # as shells report for SIGPIPE


def exit_on_interrupt() -> None:
    """Lets Ctrl-C end the process with one line, until `cli.run` takes over: imports take seconds."""
    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(EXIT_INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have told it to ignore the signal
        signal.signal(signal.SIGINT, leave)


class InputError(ValueError):
    """Invalid input: a key, a value, a file or a flag.

    The message is one line that says what is wrong, where, and what is allowed. Commands print it without a traceback
    and exit with code 2.
    """


class StorageError(InputError):
    """A file cannot be written: the disk is full, read-only or failing. Other processes may not see the error."""


class ConfigError(InputError):
    """A configuration key is unknown, or its value has the wrong type, is out of range or in conflict with another."""
