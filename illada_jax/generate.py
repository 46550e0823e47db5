"""Continues prompts, or fills gaps in them, with a trained model.

    python -m illada_jax.generate --prompt="If the process is not" --watch
    python -m illada_jax.generate --checkpoint=workdirs/quickstart --prompt="Return the" --max_new_tokens=32
    python -m illada_jax.generate --checkpoint=workdirs/quickstart --infill --prompt="A list is[[mask:6]] sequence."
    python -m illada_jax.generate --checkpoint=GSAI-ML/LLaDA-8B-Base --dtype=bfloat16 --quantize=int8 --prompt="The"
    python -m illada_jax.generate --checkpoint=workdirs/quickstart --input=prompts.jsonl --results=results.jsonl
    python -m illada_jax.generate --prompt="Return True if the file" --trace=out.html
    python -m illada_jax.generate --prompt="Return the" --trace=out.html --beside=confidence=random
    python -m illada_jax.generate --prompt="Return the" --trace=out.html --beside=reveal=threshold,threshold=0.6
    python -m illada_jax.generate --checkpoint=workdirs/sft_quickstart --chat

Without --checkpoint, a small bundled model is used. Settings default to those of the checkpoint's config. Several
`--prompt` are decoded together. `--output=json` prints one line per prompt with its text, tokens, network evaluations
(nfe) and seconds. `--input` reads lines such as {"prompt": "…"}.

`--watch` colours by log-probability (plain lines if standard error is not a terminal). `--trace` writes a page with all
prompts side by side (.html), or a picture of a single one (.gif of the steps, .png of the order). `--chat` uses the
tokenizer's chat template; it ends with /exit or Ctrl-D.
"""

import contextlib
import inspect
import json
import pathlib
import re
import sys
import time
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import flags
from etils import epath
from tqdm import tqdm

from illada_jax import api, cli, tracing
from illada_jax import config as config_lib
from illada_jax.config import DecodeConfig
from illada_jax.data.sources.records import RejectedExample, read_records
from illada_jax.data.sources.registry import MAX_DOCUMENT_BYTES
from illada_jax.errors import EXIT_INTERRUPTED, InputError
from illada_jax.files import read_file, read_json, write_atomically

MODEL = cli.ModelFlags()


def field_comments(section: type) -> dict[str, str]:
    """Comments of the fields of a config section, beside or above each field, by its name."""
    comments, above = {}, []
    for line in inspect.getsource(section).splitlines():
        if comment := re.match(r" +# (.*)", line):
            above.append(comment[1])
        elif field := re.match(r"    (\w+): .+? = .+?(?:  # (.*))?$", line):
            comments[field[1]] = " ".join([*above, field[2] or ""]).strip()
            above = []
    return comments


def define_settings(values: flags.FlagValues) -> list[str]:
    """Adds a flag for each field of DecodeConfig, with its comment as help; returns their names."""
    help_of = field_comments(DecodeConfig)
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string,
              tuple[int, ...]: flags.DEFINE_multi_integer}
    hints = typing.get_type_hints(DecodeConfig)
    del hints["eot_id"]  # belongs to the model, see `cli.ModelFlags`
    for name, hint in hints.items():
        if typing.get_origin(hint) is typing.Literal:
            flags.DEFINE_enum(name, None, typing.get_args(hint), help_of[name], flag_values=values)
        else:
            define[hint](name, None, help_of[name], flag_values=values)
    return list(hints)


SETTINGS = define_settings(flags.FLAGS)
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; with --infill, text with gaps [[mask:N]]")
INPUT = flags.DEFINE_string("input", "", "JSONL file of prompts, instead of --prompt")
RESULTS = flags.DEFINE_string("results", "", "JSONL file to append results to as they finish; resumes if it exists and "
                              "the model and settings are those recorded beside it, in FILE.settings.json")
INFILL = flags.DEFINE_bool("infill", False, "fill the gaps of the prompts")
STOP = flags.DEFINE_multi_string("stop", [], "a string or a special token that ends the answer")
WATCH = flags.DEFINE_bool("watch", False, "draw a single prompt in the terminal while it is written, step by step")
STREAM = flags.DEFINE_bool("stream", False, "print the text of a single prompt block by block")
TRACE = flags.DEFINE_string("trace", "", "file for the trace of the texts: .html, .gif or .png")
BESIDE = flags.DEFINE_multi_string("beside", [], "with --trace=….html: decode the prompts again with the "
                                    "settings KEY=VALUE,… and show both side by side; may be repeated")
CHAT = flags.DEFINE_bool("chat", False, "hold a conversation: each line of input is a turn")
SYSTEM = flags.DEFINE_string("system", "", "with --chat: the system message")
REUSE = flags.DEFINE_bool("reuse", False, "with --chat: keep what turns have computed (--cache=append), so that a turn "
                          "costs what it adds; an approximation that depends on the turns before")
CHAT_HELP = "each line is a turn of the conversation; /exit or Ctrl-D ends it, /help shows this line"
OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "format of standard output")


def main(argv: list[str]) -> int | None:
    """Loads the model and decodes all prompts."""
    del argv
    if CHAT.value:
        return chat()
    if SYSTEM.value or REUSE.value:
        raise InputError(f"--{'system' if SYSTEM.value else 'reuse'}: requires --chat")
    if bool(PROMPT.value) == bool(INPUT.value):
        raise InputError("give either --prompt or --input, but not both")
    prompts = list(PROMPT.value) or read_prompts(pathlib.Path(INPUT.value))
    if STREAM.value and (len(prompts) > 1 or RESULTS.value or INFILL.value or OUTPUT.value == "json"):
        raise InputError("--stream: takes a single prompt, and no --results, --infill or --output=json")
    if WATCH.value and (len(prompts) > 1 or RESULTS.value or STREAM.value or OUTPUT.value == "json"):
        raise InputError("--watch: takes a single prompt, and no --results, --stream or --output=json")
    if BESIDE.value and not TRACE.value.endswith(".html"):
        raise InputError("--beside: requires --trace=….html, the page that shows strategies side by side")
    if TRACE.value:
        check_trace(pathlib.Path(TRACE.value), len(prompts))
    changes = {text: parse_settings(text) for text in BESIDE.value}
    if not INFILL.value and any("[[mask:" in prompt for prompt in prompts):
        print("note: without --infill a gap such as [[mask:4]] is plain text", file=sys.stderr)
    done = read_results(pathlib.Path(RESULTS.value), prompts) if RESULTS.value else set()
    lm = MODEL.load("demo")
    settings = given_settings(flags.FLAGS)
    check_effect(lm.decode_settings(settings), settings)
    compared = [compared_settings(lm, text, change, settings) for text, change in changes.items()]
    if RESULTS.value:
        record_settings(pathlib.Path(RESULTS.value), describe_run(lm, settings), bool(done))
        return write_results(lm, prompts, done, settings)
    print_results(lm, prompts, settings, compared)
    return None


def print_results(lm: api.LanguageModel, prompts: list[str], settings: dict[str, Any],
                  compared: list[dict[str, Any]]) -> None:
    """Decodes all prompts and prints them in order; compared settings appear in `--trace` only."""
    if STREAM.value:
        printer = Printer()
        printer.finish(lm.generate(prompts, stop=STOP.value, on_block=printer, **settings)[0].text)
        return
    watcher = None
    if WATCH.value:
        watcher = tracing.Watcher(lm.tokenizer, lm.decode_settings(settings).block_length, INFILL.value)
    with watcher or contextlib.nullcontext():
        finished = sorted(decode(lm, prompts, range(len(prompts)), settings, watcher))
    for row, result, seconds in finished:
        print(result.text if OUTPUT.value == "text" else json_line(row, prompts[row], result, seconds))
    if TRACE.value:
        write_trace(lm, prompts, [result for _, result, _ in finished], settings, compared)


def decode(lm: api.LanguageModel, prompts: list[str], rows: Sequence[int], settings: dict[str, Any],
           on_block: tracing.Watcher | None = None) -> Iterator[tuple[int, api.Generation, float]]:
    """Decodes the given rows of the prompts; yields (row, result, seconds since the start) as they finish."""
    start = time.monotonic()
    # Rows draw by their number, so that an interrupted run samples the same texts as an uninterrupted one.
    finished = lm.as_completed([prompts[row] for row in rows], infill=INFILL.value, stop=STOP.value, rows=rows,
                               on_block=on_block, **settings)
    # A progress bar for several prompts at a terminal.
    bar = tqdm(finished, total=len(rows), unit="prompt", disable=len(prompts) == 1 or None)
    return ((rows[index], result, time.monotonic() - start) for index, result in bar)


def check_trace(path: pathlib.Path, num_prompts: int) -> None:
    """Raises InputError if `--trace` does not fit the other flags or the number of prompts."""
    if STREAM.value or RESULTS.value:
        raise InputError("--trace: cannot be combined with --stream or --results")
    if path.suffix not in (".html", *tracing.SUFFIXES):
        raise InputError(f"--trace={path}: the suffix must be .html, {' or '.join(tracing.SUFFIXES)}")
    if path.suffix != ".html" and num_prompts > 1:
        raise InputError(f"--trace={path}: a picture shows a single prompt; use .html for several")
    if path.suffix != ".html":
        tracing.check_picture(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--trace={path}: the directory {path.parent} cannot be made: {error.strerror}") from error


def write_trace(lm: api.LanguageModel, prompts: list[str], results: list[api.Generation],
                settings: dict[str, Any], compared: list[dict[str, Any]]) -> None:
    """Writes `--trace`, with the strategies of a prompt side by side; one network evaluation per step."""
    path = pathlib.Path(TRACE.value)
    strategies = [settings, *compared]
    words = tracing.differences([lm.decode_settings(each) for each in strategies]) if compared else [""]
    by_strategy = [results, *(lm.generate(prompts, infill=INFILL.value, stop=STOP.value, **each) for each in compared)]
    traces = [tracing.make_trace(lm, by_strategy[number][row], title=prompt, strategy=words[number],
                                 infill=INFILL.value, row=row, **each)
              for row, prompt in enumerate(prompts) for number, each in enumerate(strategies)]
    if path.suffix == ".html":
        tracing.write_page(path, traces)
    else:
        tracing.write_picture(path, traces[0])
    print(f"wrote {path}", file=sys.stderr)
    if path.suffix == ".html" and not compared:
        cli.hint("add --beside=confidence=random to compare strategies")


def parse_settings(text: str) -> dict[str, Any]:
    """The settings of one `--beside`, by name. Raises InputError for an unknown key or an invalid value."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.find("=") > 0 for part in parts):
        raise InputError(f"--beside={text}: must be KEY=VALUE, or several, separated by commas")
    values = flags.FlagValues()
    define_settings(values)
    try:
        values(["--beside", *(f"--{part}" for part in parts)])
    except flags.Error as error:
        raise InputError(f"--beside={text}: {error}") from error
    changes = given_settings(values)
    for key in api.NOT_FOR_INFILLING:
        if INFILL.value and key in changes:
            raise InputError(f"--beside={text}: {key} is not allowed with --infill")
    return changes


def compared_settings(lm: api.LanguageModel, text: str, change: dict[str, Any],
                      settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a `--beside`. Raises InputError if they are invalid, have no effect or change nothing."""
    merged = {**settings, **change}
    try:
        decode = lm.decode_settings(merged)
        check_effect(decode, change)
        lm.as_completed([], infill=INFILL.value, **merged)  # checks the rest, such as names of strategies
    except InputError as error:
        raise InputError(f"--beside={text}: {error}") from error
    if decode == lm.decode_settings(settings):
        raise InputError(f"--beside={text}: changes nothing")
    return merged


def given_settings(values: flags.FlagValues) -> dict[str, Any]:
    """The fields of DecodeConfig that flags set."""
    given = {name: values[name].value for name in SETTINGS}
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items() if value is not None}


def check_effect(decode: DecodeConfig, names: Iterable[str]) -> None:
    """Raises InputError if one of the named settings has no effect."""
    for name, (other, values) in tracing.NEEDS.items():
        if name in names and getattr(decode, other) not in values:
            raise InputError(f"--{name}: has no effect with {other} = {getattr(decode, other)!r}; "
                             f"it requires --{other}={' or '.join(values)}")


class Printer:
    """Prints the text of a single row as its blocks finish: an `on_block` callback."""

    def __init__(self):
        self._shown = 0

    def __call__(self, index: int, generation: api.Generation) -> None:
        """Prints the part of the text that is final."""
        # The tail may still change: it may be part of a character or of a stop string.
        text = generation.text.rstrip("\ufffd")
        end = len(text) - max([len(stop) for stop in STOP.value], default=1) + 1
        if end > self._shown:
            print(text[self._shown : end], end="", flush=True)
            self._shown = end

    def finish(self, text: str) -> None:
        """Prints the rest of the text and ends the line."""
        print(text[self._shown :], flush=True)


def chat() -> None:
    """Answers lines of standard input block by block.

    A conversation that exceeds the context loses its oldest turns. Standard output holds only the answers.
    """
    others = [flag.name for flag in (PROMPT, INPUT, RESULTS, INFILL, STREAM, TRACE, BESIDE, WATCH) if flag.value]
    if others or OUTPUT.value == "json":
        raise InputError(f"--chat: cannot be combined with --{(others or ['output=json'])[0]}")
    lm = MODEL.load("demo-chat")
    settings = given_settings(flags.FLAGS)
    check_effect(lm.decode_settings(settings), settings)
    start = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
    cli.hint(CHAT_HELP)
    try:
        talk(lm, start, settings)
    except KeyboardInterrupt:
        print(flush=True)  # ends the line of the prompt or of the answer
        raise


def talk(lm: api.LanguageModel, start: list[dict[str, str]], settings: dict[str, Any]) -> None:
    """The turns of `chat`, after the messages of `start`."""
    history: list[dict[str, str]] = []
    for turn, line in enumerate(iter(read_line, None)):
        if line.strip() == "/exit":
            return
        if line.strip() == "/help":
            print(CHAT_HELP, file=sys.stderr)
            continue
        if not line.strip():
            continue
        history.append({"role": "user", "content": line})
        num_messages = len(history)
        while len(history) > 1 and not lm.has_room(start + history, **settings):
            del history[:2]
        if len(history) < num_messages:
            print(f"(the context is full: dropped the oldest {num_messages - len(history)} messages)", file=sys.stderr)
        printer = Printer()
        answer = lm.chat(start + history, stop=STOP.value, on_block=printer, rows=[turn], reuse=REUSE.value, **settings)
        printer.finish(answer.text)
        history.append({"role": "assistant", "content": answer.text})


def read_line() -> str | None:
    """The next line of standard input without its line break; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def write_results(lm: api.LanguageModel, prompts: list[str], done: set[int], settings: dict[str, Any]) -> int | None:
    """Appends a line to the results as each prompt finishes; finished lines survive Ctrl-C. Returns the exit code."""
    finished = decode(lm, prompts, [row for row in range(len(prompts)) if row not in done], settings)
    try:
        with open(RESULTS.value, "a", encoding="utf-8") as file:
            for row, result, seconds in finished:
                file.write(json_line(row, prompts[row], result, seconds) + "\n")
                file.flush()
    except KeyboardInterrupt:
        print(f"interrupted: finished prompts are in {RESULTS.value}; run the same command to continue",
              file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        raise InputError(f"--results={RESULTS.value}: {error.strerror}") from error
    return None


def describe_run(lm: api.LanguageModel, settings: dict[str, Any]) -> dict[str, Any]:
    """All that results depend on besides the prompts."""
    decode = config_lib.to_dict(lm.decode_settings(settings))
    del decode["batch_size"]  # results do not depend on it
    model = config_lib.architecture(lm.config.model)
    model |= {"dtype": lm.config.model.dtype, "max_length": lm.config.model.max_length}
    return {"checkpoint": MODEL.checkpoint.value or "demo", "params": lm.fingerprint, "model": model,
            "tokenizer": lm.tokenizer.fingerprint, "decode": decode, "infill": INFILL.value, "stop": STOP.value}


def record_settings(path: pathlib.Path, run: dict[str, Any], resumes: bool) -> None:
    """Writes `run` beside the results. Raises InputError if these were made with another model or other settings."""
    record = path.with_name(f"{path.name}.settings.json")
    run = json.loads(json.dumps(run))
    if resumes:
        if not record.exists():
            raise InputError(f"--results={path}: has results, but no {record.name} that says of which model; choose "
                             "another file")
        old = read_json(record)
        different = config_lib.differences({**old, "checkpoint": ""}, {**run, "checkpoint": ""})
        if different:
            raise InputError(f"--results={path}: has results of {old.get('checkpoint')!r} with other weights or "
                             f"settings ({'; '.join(different[:3])}); choose another file")
    try:
        write_atomically(epath.Path(record), json.dumps(run, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--results={path}: {error.strerror}") from error


def read_prompts(path: pathlib.Path) -> list[str]:
    """The prompts of a file of JSON records (or Parquet). Raises InputError with the place of an invalid one."""
    prompts = []
    for where, record in read_records(path, MAX_DOCUMENT_BYTES):
        if isinstance(record, RejectedExample):
            raise InputError(f"{where}: {record.reason} ({record.detail})")
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise InputError(f'{where}: must be an object with a non-empty string "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"--input={path}: the file is empty")
    return prompts


def read_results(path: pathlib.Path, prompts: list[str]) -> set[int]:
    """Line numbers (from 0) of the prompts with a result; removes a line that an interruption cut off."""
    text = read_file(path).decode(errors="replace") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    done = set()
    for number, line in enumerate(whole.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            same = prompts[record["index"]] == record["prompt"]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):
            same = False
        if not same:
            raise InputError(f"{path}, line {number}: not a result of these prompts; choose another file")
        done.add(record["index"])
    if whole != text:
        write_atomically(epath.Path(path), whole)
    return done


def json_line(index: int, prompt: str, result: api.Generation, seconds: float) -> str:
    """A result as a JSON line; seconds count from the start of the first prompt."""
    record = {"index": index, "prompt": prompt, "text": result.text, "tokens": result.tokens, "nfe": result.nfe,
              "stopped_by": result.stopped_by, "seconds": round(seconds, 3)}
    return json.dumps(record, ensure_ascii=False)


if __name__ == "__main__":
    cli.run(main)
