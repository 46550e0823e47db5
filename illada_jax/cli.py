"""Code shared by all commands: parsing of absl flags, one-line errors, exit codes, and common flags."""

import difflib
import errno
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import config_flags

from illada_jax import console
from illada_jax.config import Config, Experiment, from_dict
from illada_jax.errors import EXIT_BAD_INPUT, EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, ConfigError, InputError
from illada_jax.files import cache_directory

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
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of `errors.exit_on_interrupt`
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
        self.chat_template = chat_template_flag()

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
        use_compilation_cache()
        # With several processes the first of all devices may belong to another host.
        mesh = parse_mesh(self.mesh.value or ("data=1" if jax.process_count() > 1 else ""))
        named = {"chat_template": self.chat_template.value} if self.chat_template.value else {}
        return api.load(checkpoint, self.dtype.value, mesh, self.quantize.value, given_ids(self.special_ids), **named)


class ConfigFlag:
    """The flag --config with its overrides, added to the calling command."""

    def __init__(self, example: str):
        config_flags.DEFINE_config_file("config", None, "experiment file; fields are set with --config.section.name")
        self._example = example

    def read(self) -> tuple[Config, str]:
        """The typed config, and the stem of its file. Raises InputError."""
        flag = flags.FLAGS["config"]
        if flag.value is None and not flag.present:
            raise InputError(f"--config is required, for example --config={self._example}")
        path = pathlib.Path(flag.config_filename.partition(":")[0])
        if not path.is_file():
            raise InputError(f"--config={flag.config_filename}: {_no_config(path, self._example)}")
        if not isinstance(flag.value, Experiment):
            raise ConfigError(f"{path}: get_config() must return a config that illada_jax.config.defaults() made")
        values, given = flag.value.to_dict(), flag.override_values
        # The length of a run is one or the other: what the command line gives replaces the file's.
        if given.get("train.steps") and "train.epochs" not in given:
            values["train"]["epochs"] = values["eval"]["every_epochs"] = 0
        if given.get("train.epochs") and "train.steps" not in given:
            values["train"]["steps"] = 0
        try:
            return from_dict(values), path.stem
        except ConfigError as error:
            overridden = any(str(error).startswith(f"config.{key} ") for key in given)
            raise ConfigError(f"{'' if overridden else f'{path}: '}{error}") from error


def _no_config(path: pathlib.Path, example: str) -> str:
    """The message for a config file that does not exist."""
    # Beside the package: the experiments of a checkout, which may be installed, and not the current directory.
    root = pathlib.Path(__file__).parent.parent
    known = [str(found.relative_to(root)) for found in (root / "experiments").glob("*.py")]
    near = difflib.get_close_matches(str(path), known, n=1)
    if not near:
        return f"no such file; one is {example}"
    return f"no such file; did you mean {near[0] if pathlib.Path(near[0]).is_file() else root / near[0]}?"


def use_compilation_cache(directory: str = "") -> None:
    """Keeps compiled programs in a directory for the next process; call it before anything is compiled.

    By default that which JAX_COMPILATION_CACHE_DIR names, or else `compiled` in the package's cache, where even small
    programs are kept: loading a model compiles many. JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    import jax  # here because `prepare` shares this module and starts ten times faster without JAX

    if not directory and not jax.config.jax_compilation_cache_dir:
        directory = os.path.join(cache_directory(), "compiled")
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError:
            return
        if not os.access(directory, os.W_OK):
            return
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_compilation_cache_max_size", 2**30)
    if directory:
        jax.config.update("jax_compilation_cache_dir", directory)


def quantize_flag() -> flags.Flag:
    """Adds --quantize to the calling command."""
    return _shared(flags.DEFINE_enum, "quantize", "none", ["none", "int8"], "round the matrices to eight bits")


def chat_template_flag() -> flags.Flag:
    """Adds --chat_template to the calling command."""
    return _shared(flags.DEFINE_string, "chat_template", "", "name of one of the tokenizer's several chat templates")


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
    except SyntaxError as error:
        raise InputError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        raise InputError(_mistake(error, argv)) from error

    # Libraries log a lot at level INFO; --verbosity=0 shows it.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


def _mistake(error: Exception, argv: list[str]) -> str:
    """The message for a mistake in a flag, an override of the config or the config file, and its place."""
    chain = list(_causes(error))
    cause = next((each for each in reversed(chain) if isinstance(each, InputError)), chain[-1])
    given = next((arg for arg in argv if arg.lstrip("-").startswith("config=")), "")
    config = given.partition("=")[2].partition(":")[0]
    for frame in (frame for each in chain for frame in traceback.extract_tb(each.__traceback__)[::-1]):
        if config and os.path.abspath(frame.filename) == os.path.abspath(config):
            kind = "" if isinstance(cause, InputError) else f"{type(cause).__name__}: "
            return f"{config}, line {frame.lineno}, {frame.line}: {kind}{_first_line(cause)}"
    if isinstance(cause, InputError):
        key = str(cause).partition(":")[0].partition(" ")[0]
        override = next((arg for arg in argv if arg.lstrip("-").startswith(key)), "")
        return f"{override}: {cause}" if override else str(cause)
    if isinstance(error, flags.Error):
        return f"{_first_line(error)} (see --help)"
    # ml_collections raises these for an invalid override or a file without get_config.
    return f"--config={config}: {_first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what caused it, one after another."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, without the quotes around that of a KeyError."""
    return (str(error).splitlines() or [type(error).__name__])[0].strip("\"'")
