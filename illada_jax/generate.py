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

Without --checkpoint a small model that comes with the package writes. Settings that are not given are those of the
checkpoint's config. Several `--prompt` are decoded together. `--output=json` prints one line per prompt, with its text,
tokens, network evaluations (nfe) and seconds. `--input` reads lines such as {"prompt": "…"}; `--results` appends a line
as each of them finishes, and what is there is not done again when the command is repeated after an interruption.

`--watch` shows the text coming into focus in the terminal, in colours of confidence (plain lines on standard error
where that is none). `--trace` shows how the texts were written: a page with all prompts side by side (.html), or a
picture of a single one (.gif of the steps, .png of the order). `--beside` writes the same prompts once more with other
settings of the decoder, for the page. `--chat` is a conversation, a line of standard input a turn, through the
tokenizer's chat template; it ends with /exit or Ctrl-D.
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
from tqdm import tqdm

from illada_jax import api, cli, tracing
from illada_jax.errors import InputError

MODEL = cli.model_flags()
SETTINGS = [
    flags.DEFINE_integer("max_new_tokens", None, "budget of new tokens"),
    flags.DEFINE_enum("over_budget", None, ["cut", "error"], "what happens to a budget beyond the context"),
    flags.DEFINE_enum("length", None, ["variable", "fixed"], "append blocks until EOS, or show all masks at once"),
    flags.DEFINE_integer("block_length", None, "tokens of a block"),
    flags.DEFINE_integer("steps_per_block", None, "steps that a block takes; block_length writes one token per step"),
    flags.DEFINE_string("reveal", None, "how many positions a step reveals: schedule, threshold, factor, entropy_bound"),
    flags.DEFINE_float("threshold", None, "of --reveal=threshold"),
    flags.DEFINE_float("factor", None, "of --reveal=factor"),
    flags.DEFINE_float("entropy_bound", None, "of --reveal=entropy_bound, in nats"),
    flags.DEFINE_string("confidence", None, "the order of revealing: low_confidence, margin, entropy, random"),
    flags.DEFINE_float("temperature", None, "of the sampling; 0 is greedy"),
    flags.DEFINE_float("top_p", None, "sample from the most probable tokens of this mass"),
    flags.DEFINE_float("cfg_scale", None, "classifier-free guidance; 0 is none"),
    flags.DEFINE_float("end_of_thinking_boost", None, "push towards </think> near the end of the budget; 0 is off, the paper uses 100"),
    flags.DEFINE_float("end_of_thinking_power", None, "how late that push sets in: 3 in the paper"),
    flags.DEFINE_multi_integer("end_of_thinking_ids", None, "ids of another end-of-thinking string, in their order"),
    flags.DEFINE_multi_integer("suppressed_ids", None, "ids that are never written"),
    flags.DEFINE_multi_integer("stop_ids", None, "ids that end an answer, besides EOS"),
    flags.DEFINE_bool("logits_eos_inf", None, "never write EOS"),
    flags.DEFINE_bool("confidence_eos_eot_inf", None, "write EOS and EoT last"),
    flags.DEFINE_enum("cache", None, ["none", "prefix", "dual"], "keep keys and values within a block (approximate)"),
    flags.DEFINE_integer("cache_refresh", None, "steps between refreshes within a block; 0: at its start only"),
    flags.DEFINE_integer("batch_size", None, "prompts that are decoded at the same time"),
    flags.DEFINE_integer("seed", None, "seed of the sampling"),
]
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; with --infill, text with gaps [[mask:N]]")
INPUT = flags.DEFINE_string("input", "", "JSONL file of prompts, instead of --prompt")
RESULTS = flags.DEFINE_string("results", "", "JSONL file that results are appended to as they finish")
INFILL = flags.DEFINE_bool("infill", False, "fill the gaps of the prompts")
STOP = flags.DEFINE_multi_string("stop", [], "a string that ends the answer")
WATCH = flags.DEFINE_bool("watch", False, "show in the terminal how a single prompt is written, step by step")
STREAM = flags.DEFINE_bool("stream", False, "print the text of a single prompt block by block")
TRACE = flags.DEFINE_string("trace", "", "file to show the order of writing in: .html, .gif or .png")
BESIDE = flags.DEFINE_multi_string("beside", [], "with --trace=….html: the same prompts once more, with "
                                    "the settings KEY=VALUE,…, beside the first; may be repeated")
CHAT = flags.DEFINE_bool("chat", False, "a conversation: read a line, answer, and so on")
SYSTEM = flags.DEFINE_string("system", "", "with --chat: the system message")
OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "what is printed")


def main(argv: list[str]) -> int | None:
    """Loads the model and decodes all prompts."""
    del argv
    if CHAT.value:
        try:
            return chat()
        except KeyboardInterrupt:
            return cli.EXIT_INTERRUPTED
    if SYSTEM.value:
        raise InputError("--system: is for --chat")
    if bool(PROMPT.value) == bool(INPUT.value):
        raise InputError("--prompt: give at least one, or --input, but not both")
    prompts = list(PROMPT.value) or read_prompts(pathlib.Path(INPUT.value))
    if STREAM.value and (len(prompts) > 1 or RESULTS.value or INFILL.value or OUTPUT.value == "json"):
        raise InputError("--stream: is for a single prompt, without --results, --infill and --output=json")
    if WATCH.value and (len(prompts) > 1 or RESULTS.value or STREAM.value or OUTPUT.value == "json"):
        raise InputError("--watch: is for a single prompt, without --results, --stream and --output=json")
    if TRACE.value:
        check_trace(pathlib.Path(TRACE.value), len(prompts))
    if BESIDE.value and not TRACE.value.endswith(".html"):
        raise InputError("--beside: is for --trace=….html, the page that shows strategies side by side")
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
        kept = f"finished prompts are in {RESULTS.value}; the same command does the rest"
        print(f"interrupted{': ' + kept if RESULTS.value else ''}", file=sys.stderr)
        return cli.EXIT_INTERRUPTED
    return None


def print_results(lm: api.LanguageModel, prompts: list[str], settings: dict[str, Any],
                  compared: list[dict[str, Any]]) -> None:
    """Decodes all prompts and prints them, in their order; what is compared is shown by `--trace` alone."""
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
    # A progress bar where somebody waits for more than one.
    with watcher or contextlib.nullcontext():
        for index, result in tqdm(finished, total=len(prompts), unit="prompt", disable=len(prompts) == 1 or None):
            results[index], seconds[index] = result, time.monotonic() - start
    for index, prompt in enumerate(prompts):
        result = results[index]
        print(result.text if OUTPUT.value == "text" else json_line(index, prompt, result, seconds[index]))
    if TRACE.value:
        write_trace(lm, prompts, [results[index] for index in range(len(prompts))], settings, compared)


def check_trace(path: pathlib.Path, num_prompts: int) -> None:
    """Raises InputError if `--trace` cannot be written for so many prompts."""
    if STREAM.value or RESULTS.value:
        raise InputError("--trace: does not go with --stream or --results")
    if path.suffix not in (".html", *tracing.SUFFIXES):
        raise InputError(f"--trace={path}: the ending must be .html, {' or '.join(tracing.SUFFIXES)}")
    if path.suffix != ".html" and num_prompts > 1:
        raise InputError(f"--trace={path}: a picture shows a single prompt; .html shows several")
    if not path.parent.is_dir():
        raise InputError(f"--trace={path}: there is no directory {path.parent}")


def write_trace(lm: api.LanguageModel, prompts: list[str], results: list[api.Generation],
                settings: dict[str, Any], compared: list[dict[str, Any]]) -> None:
    """Writes `--trace`, one network evaluation for each step; strategies of a prompt stand beside each other."""
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
    compare = "" if compared or path.suffix != ".html" else "; --beside=confidence=random shows a second strategy"
    cli.hint(f"wrote {path}{compare}")


def parse_settings(text: str) -> dict[str, Any]:
    """The settings of one `--beside`, by name. Raises InputError if a key is unknown or a value is none of it."""
    known = {flag.name: flags.FLAGS[flag.name] for flag in SETTINGS}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or not key:
            raise InputError(f"--beside={text}: settings are given as KEY=VALUE, with commas between them")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"--beside={text}: {key} is no setting of the decoder; {hint}")
        if INFILL.value and key in api.NOT_FOR_INFILLING:
            raise InputError(f"--beside={text}: {key} is not for --infill")
        try:
            parsed = known[key].parser.parse(value)
        except (ValueError, TypeError) as error:
            raise InputError(f"--beside={text}: {key}: {error}") from error
        # Lists of ids: a key that is repeated, as on the command line.
        changes[key] = (*changes.get(key, ()), parsed) if isinstance(known[key], flags.MultiFlag) else parsed
    return changes


def check_compared(lm: api.LanguageModel, text: str, change: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises InputError if the settings of a `--beside` are wrong, do nothing or change nothing."""
    merged = {**settings, **change}
    try:
        same = lm.decode_settings(merged) == lm.decode_settings(settings)
        check_effect(lm, merged, change)
        lm.as_completed([], infill=INFILL.value, **merged)  # checks the rest, such as the names of strategies
    except InputError as error:
        raise InputError(f"--beside={text}: {error}") from error
    if same:
        raise InputError(f"--beside={text}: changes nothing")


def given_settings() -> dict[str, Any]:
    """The fields of DecodeConfig that flags set."""
    return {flag.name: tuple(flag.value) if isinstance(flag.value, list) else flag.value
            for flag in SETTINGS if flag.value is not None}


def check_effect(lm: api.LanguageModel, settings: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Raises InputError for a setting that would do nothing: one of `names`, by default of all that are given."""
    decode = lm.decode_settings(settings)
    for name, (other, values) in tracing.NEEDS.items():
        if name in (settings if names is None else names) and getattr(decode, other) not in values:
            raise InputError(f"--{name}: does nothing with {other} = {getattr(decode, other)!r}; "
                             f"it is for --{other}={' or '.join(values)}")


class Printer:
    """Prints the text of a single row as its blocks finish: an `on_block` callback."""

    def __init__(self):
        self._shown = 0

    def __call__(self, index: int, generation: api.Generation) -> None:
        """Prints what is sure to stay."""
        text = generation.text
        # The tail may still change: it may hold half of a stop string or of a character.
        kept = max([len(stop) for stop in STOP.value], default=1) - 1 or text.endswith("\ufffd")
        if all(stop not in text for stop in STOP.value) and len(text) - kept > self._shown:
            print(text[self._shown : len(text) - kept], end="", flush=True)
            self._shown = len(text) - kept

    def finish(self, text: str) -> None:
        """Prints the rest of the whole text and ends the line."""
        print(text[self._shown :], flush=True)


def chat() -> None:
    """Reads a line, prints the answer block by block, and so on.

    A conversation that gets too long loses its oldest turns. From a pipe nothing but the answers is printed.
    """
    others = [flag.name for flag in (PROMPT, INPUT, RESULTS, INFILL, STREAM, TRACE, BESIDE, WATCH) if flag.value]
    if others or OUTPUT.value == "json":
        raise InputError(f"--chat: does not go with --{(others or ['output=json'])[0]}")
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
        forgotten = len(history)
        while len(history) > 1 and not lm.has_room(start + history, **settings):
            del history[:2]
        if len(history) < forgotten:
            print(f"(the context is full: the oldest {forgotten - len(history)} messages are forgotten)",
                  file=sys.stderr)
        printer = Printer()
        answer = lm.chat(start + history, stop=STOP.value, on_block=printer, rows=[turn], **settings)
        printer.finish(answer.text)
        history.append({"role": "assistant", "content": answer.text})


def read_line() -> str | None:
    """The next line of standard input without its end; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def write_results(lm: api.LanguageModel, prompts: list[str], done: set[int], settings: dict[str, Any]) -> None:
    """Appends a line to the results as each prompt finishes. After Ctrl-C what is finished stays."""
    rows = [index for index in range(len(prompts)) if index not in done]
    start = time.monotonic()
    # A row draws by its line number: an interrupted run samples what an uninterrupted one does.
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
    """The prompts of a JSONL file. Raises InputError with the number of a line that is none."""
    try:
        # Not splitlines: a prompt may hold U+2028.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise InputError(f"--input={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--input={path}: not UTF-8") from error
    if lines == [""]:
        raise InputError(f"--input={path}: has no lines")
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, RecursionError) as error:  # also numbers too long, brackets too deep
            raise InputError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from error
        except (KeyError, TypeError) as error:
            raise InputError(f'{path}, line {number}: must be an object with a "prompt"') from error
        if not isinstance(prompts[-1], str) or not prompts[-1]:
            raise InputError(f'{path}, line {number}: "prompt" must be a text that is not empty')
    return prompts


def read_results(path: pathlib.Path, prompts: list[str]) -> set[int]:
    """Line numbers (from 0) of the prompts that have a result; a line cut off by an interruption is removed."""
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
            raise InputError(f"{path}, line {number}: is not a result for the prompts given; choose another file")
        done.add(record["index"])
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return done


def json_line(index: int, prompt: str, result: api.Generation, seconds: float) -> str:
    """A result as a JSON line; seconds are those since the first prompt was started."""
    record = {"index": index, "prompt": prompt, "text": result.text, "tokens": result.tokens, "nfe": result.nfe,
              "stopped_by": result.stopped_by, "seconds": round(seconds, 3)}
    return json.dumps(record, ensure_ascii=False)


if __name__ == "__main__":
    cli.run(main)
