"""Code shared by all commands: parsing of absl flags, one-line errors, exit codes, and common flags."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from illada_jax import console
from illada_jax.errors import EXIT_BAD_INPUT, EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, InputError

if TYPE_CHECKING:
    from illada_jax import api

flags.disclaim_key_flags()  # shared flags belong to the --help of the command that adds them

# Errors of the storage, not of the program.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO,
                   errno.ESTALE)


def run(main: Callable[[list[str]], int | None], positional: bool = False) -> None:
    """Parses flags, runs `main(argv)` and exits. Arguments that are not flags are an error unless `positional`.

    The exit code is 0 on success, the number that `main` returns, or one of the EXIT_ codes: an InputError, an unknown
    flag or an invalid config override is one line on stderr and EXIT_BAD_INPUT. After an error the process is gone at
    once: neither libraries' threads nor other processes can hold it.
    """

    def run_main(argv: list[str]) -> int | None:
        if len(argv) > 1 and not positional:
            raise InputError(f"unexpected argument {argv[1]!r}: options are given as --name=value, see --help")
        code = main(argv)
        sys.stdout.flush()
        return code

    console.protect_stdout()
    sys.unraisablehook = _report_unraisable
    try:
        app.run(run_main, flags_parser=_parse)
    except BrokenPipeError:
        # The reader has closed the pipe, as `| head` does: further output is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception as error:
        code = report(error)
    if hosts := sys.modules.get("illada_jax.parallel.hosts"):  # `prepare` does not import JAX
        hosts.disconnect()
    console.hard_exit(code)


def report(error: Exception) -> int:
    """Prints an error, in one line if the user can fix it, else with a traceback. Returns the exit code."""
    if isinstance(error, InputError):
        text, code = f"error: {error}", EXIT_BAD_INPUT
    elif isinstance(error, OSError) and (error.filename or error.errno in _STORAGE_ERRORS):
        text, code = f"error: {error.filename or 'a file'}: {error.strerror}", EXIT_BAD_INPUT
    else:
        text, code = "".join(traceback.format_exception(error)).rstrip(), 1
    console.print_error(text)
    return code


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Drops the errors of TensorStore's threads that come after a failed read: Orbax has reported the first."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class ModelFlags:
    """The flags of every command that loads a model, added to the calling command."""

    def __init__(self):
        self.checkpoint = _shared(
            flags.DEFINE_string, "checkpoint", None,
            "a workdir, one checkpoint in it, a Hugging Face directory or Hub id, demo or demo-chat")
        self.dtype = _shared(flags.DEFINE_enum, "dtype", "float32", ["float32", "bfloat16"],
                             "dtype of params and compute")
        self.quantize = quantize_flag()
        self.mesh = _shared(flags.DEFINE_string, "mesh", "",
                            "devices of this host to shard the model over, such as fsdp=4,tensor=2; default: the first")
        self.special_ids = special_id_flags()

    def load(self, default: str = "") -> "api.LanguageModel":
        """Loads the model named by the flags, or else `default`. Raises InputError if there is neither."""
        # Imported here because `prepare` shares this module and starts ten times faster without JAX.
        import jax

        from illada_jax import api
        from illada_jax.parallel.mesh import parse_mesh

        checkpoint = self.checkpoint.value or default
        if not checkpoint:
            raise InputError("--checkpoint is required, for example --checkpoint=workdirs/quickstart")
        if not self.checkpoint.value:
            hint(f"using the small model {default}; --checkpoint=… selects another")
        # With several processes the first of all devices may belong to another host.
        mesh = parse_mesh(self.mesh.value or ("data=1" if jax.process_count() > 1 else ""))
        return api.load(checkpoint, self.dtype.value, mesh, self.quantize.value, given_ids(self.special_ids))


def quantize_flag() -> flags.Flag:
    """Adds --quantize to the calling command."""
    return _shared(flags.DEFINE_enum, "quantize", "none", ["none", "int8"], "round the matrices to eight bits")


def special_id_flags() -> dict[str, flags.Flag]:
    """Adds --mask_id, --bos_id, … of a Hugging Face directory to the calling command."""
    text = "id of {} in a Hugging Face directory; overrides its config and tokenizer"
    return {token: _shared(flags.DEFINE_integer, f"{token}_id", None, text.format(token.upper()))
            for token in ("mask", "bos", "eos", "pad", "eot")}


def given_ids(special_ids: dict[str, flags.Flag]) -> dict[str, int]:
    """The special ids given on the command line, by name."""
    return {token: flag.value for token, flag in special_ids.items() if flag.value is not None}


def processes_flag() -> flags.Flag:
    """Adds --processes to the calling command."""
    return _shared(flags.DEFINE_string, "processes", "",
                   "several processes: auto (TPU pods, GKE, SLURM), or ADDRESS:PORT,NUM_PROCESSES,PROCESS_ID")


def _shared(define: Callable[..., object], name: str, *arguments: Any) -> flags.Flag:
    """A flag that several commands have, defined once even if one process imports several of them."""
    if name in flags.FLAGS:
        flags.declare_key_flag(name)
    else:
        define(name, *arguments)
    return flags.FLAGS[name]


def hint(text: str) -> None:
    """Prints a suggestion or a chosen default to a terminal, never into a pipe or a log."""
    if sys.stderr.isatty():
        print(f"({text})", file=sys.stderr)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # absl has shown the help, and exits with 1
        sys.stdout.flush()
        sys.exit(0)
    except flags.Error as error:
        # The error of the config file itself is more helpful than absl's, which says that it cannot be parsed.
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, InputError):
            raise cause from error
        raise InputError(f"{str(error).splitlines()[0]} (see --help)") from error
    except SyntaxError as error:
        raise InputError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    # ml_collections raises these for an invalid override or a missing config file.
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        raise InputError(str(error).splitlines()[0].strip("\"'")) from error

    # Libraries log a lot at level INFO; --verbosity=0 shows it.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest
