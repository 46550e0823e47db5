"""Continues prompts, or fills gaps in them, with a trained model.

    python -m illada_jax.generate --prompt="The with statement" --watch
    python -m illada_jax.generate --checkpoint=workdirs/quickstart --prompt="Return the" --max_new_tokens=32
    python -m illada_jax.generate --checkpoint=workdirs/quickstart --infill --prompt="A list is [[mask:6]] sequence."
    python -m illada_jax.generate --checkpoint=LLaDA-8B-Base --dtype=bfloat16 --quantize=int8 --prompt="The capital of"
    python -m illada_jax.generate --checkpoint=workdirs/quickstart --input=prompts.jsonl --results=results.jsonl
    python -m illada_jax.generate --prompt="Return the" --trace=out.html
    python -m illada_jax.generate --prompt="Return the" --trace=out.html --beside=confidence=random
    python -m illada_jax.generate --prompt="Return the" --trace=out.html --beside=reveal=threshold,threshold=0.6
    python -m illada_jax.generate --checkpoint=workdirs/sft_quickstart --chat

Without --checkpoint a small model of the package is used. Settings default to those of the checkpoint's config. Several
`--prompt` are decoded together. `--output=json` prints one line per prompt with its text, tokens, network evaluations
(nfe) and seconds. `--input` reads lines such as {"prompt": "…"}. `--results` appends a line as each prompt finishes and
resumes after an interruption.

`--watch` draws the text in the terminal while it is written, coloured by log-probability (plain lines if standard error
is not a terminal). `--trace` shows how the texts were written: a page with all prompts side by side (.html), or a
picture of a single one (.gif of the steps, .png of the order). `--beside` decodes the same prompts again with other
settings, for the page. `--chat` is a conversation through the tokenizer's chat template, one line of standard input per
turn; it ends with /exit or Ctrl-D.
"""

import contextlib
import difflib
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import Any

from absl import flags
from etils import epath
from tqdm import tqdm

from illada_jax import api, cli, tracing
from illada_jax.errors import EXIT_INTERRUPTED, InputError
from illada_jax.files import write_atomically

MODEL = cli.ModelFlags()
SETTINGS = [
    flags.DEFINE_integer("max_new_tokens", None, "budget of new tokens"),
    flags.DEFINE_enum("over_budget", None, ["cut", "error"], "cut a budget that exceeds the context, or fail"),
    flags.DEFINE_enum("length", None, ["variable", "fixed"], "append blocks until EOS, or mask all of the budget"),
    flags.DEFINE_integer("block_length", None, "tokens per block"),
    flags.DEFINE_integer("steps_per_block", None, "steps per block; block_length reveals one token per step"),
    flags.DEFINE_string("reveal", None, "number of positions per step: schedule, threshold, factor, entropy_bound"),
    flags.DEFINE_float("threshold", None, "lowest probability that --reveal=threshold reveals"),
    flags.DEFINE_float("factor", None, "factor of --reveal=factor"),
    flags.DEFINE_float("entropy_bound", None, "bound of --reveal=entropy_bound, in nats"),
    flags.DEFINE_string("confidence", None, "order of revealing: low_confidence, margin, entropy, random"),
    flags.DEFINE_float("temperature", None, "sampling temperature; 0 is greedy"),
    flags.DEFINE_float("top_p", None, "nucleus sampling: total probability of the tokens to sample from"),
    flags.DEFINE_float("cfg_scale", None, "classifier-free guidance; 0 is none"),
    flags.DEFINE_float("end_of_thinking_boost", None, "boost of </think> at the end of the budget; 0 is off, "
                       "the paper uses 100"),
    flags.DEFINE_float("end_of_thinking_power", None, "growth of that boost, larger is later; the paper uses 3"),
    flags.DEFINE_multi_integer("end_of_thinking_ids", None, "ids of another end-of-thinking string, in order"),
    flags.DEFINE_multi_integer("suppressed_ids", None, "ids that are never chosen"),
    flags.DEFINE_multi_integer("stop_ids", None, "ids that end an answer, besides EOS"),
    flags.DEFINE_bool("logits_eos_inf", None, "never choose EOS"),
    flags.DEFINE_bool("confidence_eos_eot_inf", None, "write EOS and EoT last"),
    flags.DEFINE_enum("cache", None, ["none", "prefix", "dual"], "cache keys and values within a block (approximate)"),
    flags.DEFINE_integer("cache_refresh", None, "steps between cache refreshes in a block; 0: at its start only"),
    flags.DEFINE_integer("batch_size", None, "prompts decoded at the same time"),
    flags.DEFINE_integer("seed", None, "seed of all random draws"),
]
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; with --infill, text with gaps [[mask:N]]")
INPUT = flags.DEFINE_string("input", "", "JSONL file of prompts, instead of --prompt")
RESULTS = flags.DEFINE_string("results", "", "JSONL file to append results to as they finish; resumes if it exists")
INFILL = flags.DEFINE_bool("infill", False, "fill the gaps of the prompts")
STOP = flags.DEFINE_multi_string("stop", [], "a string that ends the answer")
WATCH = flags.DEFINE_bool("watch", False, "draw a single prompt in the terminal while it is written, step by step")
STREAM = flags.DEFINE_bool("stream", False, "print the text of a single prompt block by block")
TRACE = flags.DEFINE_string("trace", "", "file for the trace of the texts: .html, .gif or .png")
BESIDE = flags.DEFINE_multi_string("beside", [], "with --trace=….html: decode the prompts again with the "
                                    "settings KEY=VALUE,… and show both side by side; may be repeated")
CHAT = flags.DEFINE_bool("chat", False, "hold a conversation: each line of input is a turn")
SYSTEM = flags.DEFINE_string("system", "", "with --chat: the system message")
OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "format of standard output")


def main(argv: list[str]) -> int | None:
    """Loads the model and decodes all prompts."""
    del argv
    if CHAT.value:
        try:
            return chat()
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
    if SYSTEM.value:
        raise InputError("--system: requires --chat")
    if bool(PROMPT.value) == bool(INPUT.value):
        raise InputError("give either --prompt or --input, but not both")
    prompts = list(PROMPT.value) or read_prompts(pathlib.Path(INPUT.value))
    if STREAM.value and (len(prompts) > 1 or RESULTS.value or INFILL.value or OUTPUT.value == "json"):
        raise InputError("--stream: takes a single prompt, and no --results, --infill or --output=json")
    if WATCH.value and (len(prompts) > 1 or RESULTS.value or STREAM.value or OUTPUT.value == "json"):
        raise InputError("--watch: takes a single prompt, and no --results, --stream or --output=json")
    if TRACE.value:
        check_trace(pathlib.Path(TRACE.value), len(prompts))
    if BESIDE.value and not TRACE.value.endswith(".html"):
        raise InputError("--beside: requires --trace=….html, the page that shows strategies side by side")
    changes = {text: parse_settings(text) for text in BESIDE.value}
    done = read_results(pathlib.Path(RESULTS.value), prompts) if RESULTS.value else set()
    lm = MODEL.load("demo")
    settings = given_settings()
    check_effect(lm, settings)
    compared = [{**settings, **change} for change in changes.values()]
    for text, change in changes.items():
        check_compared(lm, text, change, settings)
    try:
        if RESULTS.value:
            write_results(lm, prompts, done, settings)
        else:
            print_results(lm, prompts, settings, compared)
    except KeyboardInterrupt:
        saved = f": finished prompts are in {RESULTS.value}; run the same command to continue" if RESULTS.value else ""
        print(f"interrupted{saved}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return None


def print_results(lm: api.LanguageModel, prompts: list[str], settings: dict[str, Any],
                  compared: list[dict[str, Any]]) -> None:
    """Decodes all prompts and prints them in order; compared settings appear in `--trace` only."""
    if STREAM.value:
        printer = Printer()
        printer.finish(lm.generate(prompts, stop=STOP.value, on_block=printer, **settings)[0].text)
        return
    start = time.monotonic()
    results, seconds = {}, {}
    watcher = None
    if WATCH.value:
        watcher = tracing.Watcher(lm.tokenizer, lm.decode_settings(settings).block_length, INFILL.value)
    finished = lm.as_completed(prompts, infill=INFILL.value, stop=STOP.value, on_block=watcher, **settings)
    # A progress bar for several prompts at a terminal.
    with watcher or contextlib.nullcontext():
        for index, result in tqdm(finished, total=len(prompts), unit="prompt", disable=len(prompts) == 1 or None):
            results[index], seconds[index] = result, time.monotonic() - start
    for index, prompt in enumerate(prompts):
        result = results[index]
        print(result.text if OUTPUT.value == "text" else json_line(index, prompt, result, seconds[index]))
    if TRACE.value:
        write_trace(lm, prompts, [results[index] for index in range(len(prompts))], settings, compared)


def check_trace(path: pathlib.Path, num_prompts: int) -> None:
    """Raises InputError if `--trace` does not fit the other flags or the number of prompts."""
    if STREAM.value or RESULTS.value:
        raise InputError("--trace: cannot be combined with --stream or --results")
    if path.suffix not in (".html", *tracing.SUFFIXES):
        raise InputError(f"--trace={path}: the suffix must be .html, {' or '.join(tracing.SUFFIXES)}")
    if path.suffix != ".html" and num_prompts > 1:
        raise InputError(f"--trace={path}: a picture shows a single prompt; use .html for several")
    if not path.parent.is_dir():
        raise InputError(f"--trace={path}: the directory {path.parent} does not exist")


def write_trace(lm: api.LanguageModel, prompts: list[str], results: list[api.Generation],
                settings: dict[str, Any], compared: list[dict[str, Any]]) -> None:
    """Writes `--trace`, with the strategies of a prompt side by side; one network evaluation per step."""
    path = pathlib.Path(TRACE.value)
    strategies = [settings, *compared]
    words = tracing.differences([lm.decode_settings(each) for each in strategies]) if compared else [""]
    write = lm.infill if INFILL.value else functools.partial(lm.generate, stop=STOP.value)
    by_strategy = [results, *(write(prompts, **each) for each in compared)]
    traces = [tracing.make_trace(lm, by_strategy[number][row], title=prompt, strategy=words[number],
                                 infill=INFILL.value, row=row, **each)
              for row, prompt in enumerate(prompts) for number, each in enumerate(strategies)]
    if path.suffix == ".html":
        tracing.write_page(path, traces)
    else:
        tracing.write_picture(path, traces[0])
    suggestion = "" if compared or path.suffix != ".html" else "; add --beside=confidence=random to compare strategies"
    cli.hint(f"wrote {path}{suggestion}")


def parse_settings(text: str) -> dict[str, Any]:
    """The settings of one `--beside`, by name. Raises InputError for an unknown key or an invalid value."""
    known = {flag.name: flags.FLAGS[flag.name] for flag in SETTINGS}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or not key:
            raise InputError(f"--beside={text}: must be KEY=VALUE, or several separated by commas")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(known)}"
            raise InputError(f"--beside={text}: unknown setting {key}; {hint}")
        if INFILL.value and key in api.NOT_FOR_INFILLING:
            raise InputError(f"--beside={text}: {key} is not allowed with --infill")
        try:
            parsed = known[key].parser.parse(value)
        except (ValueError, TypeError) as error:
            raise InputError(f"--beside={text}: {key}: {error}") from error
        # Lists of ids repeat their key, as on the command line.
        changes[key] = (*changes.get(key, ()), parsed) if isinstance(known[key], flags.MultiFlag) else parsed
    return changes


def check_compared(lm: api.LanguageModel, text: str, change: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises InputError if the settings of a `--beside` are invalid, have no effect or change nothing."""
    merged = {**settings, **change}
    try:
        same = lm.decode_settings(merged) == lm.decode_settings(settings)
        check_effect(lm, merged, change)
        lm.as_completed([], infill=INFILL.value, **merged)  # checks the rest, such as names of strategies
    except InputError as error:
        raise InputError(f"--beside={text}: {error}") from error
    if same:
        raise InputError(f"--beside={text}: changes nothing")


def given_settings() -> dict[str, Any]:
    """The fields of DecodeConfig that flags set."""
    return {flag.name: tuple(flag.value) if isinstance(flag.value, list) else flag.value
            for flag in SETTINGS if flag.value is not None}


def check_effect(lm: api.LanguageModel, settings: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Raises InputError for a setting without effect, among `names` or, by default, all given ones."""
    decode = lm.decode_settings(settings)
    for name, (other, values) in tracing.NEEDS.items():
        if name in (settings if names is None else names) and getattr(decode, other) not in values:
            raise InputError(f"--{name}: has no effect with {other} = {getattr(decode, other)!r}; "
                             f"it requires --{other}={' or '.join(values)}")


class Printer:
    """Prints the text of a single row as its blocks finish: an `on_block` callback."""

    def __init__(self):
        self._shown = 0

    def __call__(self, index: int, generation: api.Generation) -> None:
        """Prints the part of the text that is final."""
        text = generation.text
        # The tail may still change: it may be part of a stop string or of a character.
        withheld = max([len(stop) for stop in STOP.value], default=1) - 1 or text.endswith("\ufffd")
        end = len(text) - withheld
        if all(stop not in text for stop in STOP.value) and end > self._shown:
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
    settings = given_settings()
    check_effect(lm, settings)
    start = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
    history: list[dict[str, str]] = []
    for turn in itertools.count():
        line = read_line()
        if line is None or line.strip() == "/exit":
            return
        if not line.strip():
            continue
        history.append({"role": "user", "content": line})
        num_messages = len(history)
        while len(history) > 1 and not lm.has_room(start + history, **settings):
            del history[:2]
        if len(history) < num_messages:
            print(f"(the context is full: dropped the oldest {num_messages - len(history)} messages)", file=sys.stderr)
        printer = Printer()
        answer = lm.chat(start + history, stop=STOP.value, on_block=printer, rows=[turn], **settings)
        printer.finish(answer.text)
        history.append({"role": "assistant", "content": answer.text})


def read_line() -> str | None:
    """The next line of standard input without its line break; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def write_results(lm: api.LanguageModel, prompts: list[str], done: set[int], settings: dict[str, Any]) -> None:
    """Appends a line to the results as each prompt finishes; finished lines survive Ctrl-C."""
    rows = [index for index in range(len(prompts)) if index not in done]
    start = time.monotonic()
    # Rows draw by line number, so that an interrupted run samples the same texts as an uninterrupted one.
    finished = lm.as_completed([prompts[row] for row in rows], infill=INFILL.value, stop=STOP.value, rows=rows,
                               **settings)
    try:
        with open(RESULTS.value, "a", encoding="utf-8") as file:
            for index, result in tqdm(finished, total=len(rows), unit="prompt", disable=None):
                line = json_line(rows[index], prompts[rows[index]], result, time.monotonic() - start)
                file.write(line + "\n")
                file.flush()
    except OSError as error:
        raise InputError(f"--results={RESULTS.value}: {error.strerror}") from error


def read_prompts(path: pathlib.Path) -> list[str]:
    """The prompts of a JSONL file. Raises InputError with the number of an invalid line."""
    try:
        # Not splitlines: a prompt may contain U+2028.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise InputError(f"--input={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--input={path}: must be UTF-8") from error
    if lines == [""]:
        raise InputError(f"--input={path}: the file is empty")
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, RecursionError) as error:  # also for long numbers and deep nesting
            raise InputError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from error
        except (KeyError, TypeError) as error:
            raise InputError(f'{path}, line {number}: must be an object with a "prompt"') from error
        if not isinstance(prompts[-1], str) or not prompts[-1]:
            raise InputError(f'{path}, line {number}: "prompt" must be a non-empty string')
    return prompts


def read_results(path: pathlib.Path, prompts: list[str]) -> set[int]:
    """Line numbers (from 0) of the prompts with a result; removes a line that an interruption cut off."""
    if not path.exists():
        return set()
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"--results={path}: {error.strerror}") from error
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
