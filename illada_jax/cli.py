"""What every command shares: absl flags in, one-line errors and exit codes out."""

import errno
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from illada_jax.errors import InputError, StorageError

EXIT_BAD_INPUT = 2
EXIT_BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended
# What is wrong with the storage, and not with the program.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE)


def run(main: Callable[[list[str]], int | None], positional: bool = False) -> None:
    """Parses flags, runs `main(argv)` and exits.

    The exit code is 0 on success, what `main` returns if that is a number, and 2 for bad input: an InputError, an
    unknown flag or a config override that does not fit is one line on stderr.

    Args:
      main: the command; argv[0] is its name.
      positional: the command takes arguments that are no flags.
    """

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1 and not positional:
            raise InputError(f"unexpected argument {argv[1]!r}: options are given as --name=value, see --help")
        return main(argv)

    def caught(argv: list[str]) -> int | None:
        try:
            code = guarded(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            return _closed()
        except InputError as error:
            return _fail(error)
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
            return _fail(StorageError(f"{error.filename or 'a file'}: {error.strerror}"))

    try:
        app.run(caught, flags_parser=_parse)
    except InputError as error:
        sys.exit(_fail(error))


def hint(text: str) -> None:
    """What could be typed next, or was chosen: for a person at a terminal, not for a pipe or a log."""
    if sys.stderr.isatty():
        print(f"({text})", file=sys.stderr)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # absl shows the help, and calls that a failure
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            sys.exit(_closed())
        sys.exit(0)
    except flags.Error as error:
        # What a config file raised itself says more than that it cannot be parsed.
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, InputError):
            raise cause from error
        raise InputError(f"{str(error).splitlines()[0]} (see --help)") from error
    except SyntaxError as error:
        raise InputError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    # ml_collections reports an override that does not fit, or a config file that is not there, with these.
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        raise InputError(str(error).splitlines()[0].strip("\"'")) from error

    # Libraries tell much at the level INFO: --verbosity=0 shows it.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


def _closed() -> int:
    """Whoever read standard output has gone, as `| head` does: nothing is left to say, at the exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE


def _fail(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return EXIT_BAD_INPUT
