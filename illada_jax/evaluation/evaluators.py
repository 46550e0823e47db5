"""Evaluators, which run during training: the bound on held-out text, samples, infilling and exact match.

An evaluator is a function (params, step) → {name: number or text}. `main` builds those that `config.eval` names and
passes them to the training loop, which does not depend on decoding.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from illada_jax import model
from illada_jax.config import Config, DecodeConfig
from illada_jax.data.batch import Batch
from illada_jax.data.corpus import Corpus, Examples
from illada_jax.data.pipeline import Batches
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.decoding import Decoded, Decoder, SpecialIds
from illada_jax.diffusion.objective import objective
from illada_jax.diffusion.process import corrupt_fixed_count
from illada_jax.diffusion.token_losses import token_losses
from illada_jax.errors import ConfigError, InputError
from illada_jax.evaluation.answer_metrics import make_answer_metric
from illada_jax.keys import Purpose, key_for
from illada_jax.parallel import hosts, sharding
from illada_jax.parallel.mesh import use_mesh
from illada_jax.training.loop import Evaluator

_TABLE_ROWS = 6


class EvaluatorContext(NamedTuple):
    """The parts of a run that evaluators are built from; `pipeline` makes windows of held-out text."""

    config: Config
    corpus: Corpus | Examples
    pipeline: Batches
    mesh: Mesh

    def decoder(self, settings: DecodeConfig, params: Any) -> Decoder:
        """A decoder of the current params."""
        model_config = self.config.model
        return Decoder(model.make_logits_fn(model_config, params), settings,
                       SpecialIds.of(self.corpus.tokenizer, settings), model_config.max_length,
                       model.make_init_cache(model_config), self.mesh)

    def answer(self, settings: DecodeConfig, params: Any, prompts: list[list[int]]) -> tuple[list[Decoded], list[str]]:
        """Continuations of prompts, and their texts."""
        decoded = self.decoder(settings, params).generate(prompts)
        return decoded, [self.corpus.tokenizer.decode(each.tokens, after=prompt)
                         for prompt, each in zip(prompts, decoded, strict=True)]


def make_evaluators(names: tuple[str, ...], config: Config, corpus: Corpus | Examples, pipeline: Batches,
                    mesh: Mesh) -> dict[str, Evaluator]:
    """Builds evaluators by name. Raises ConfigError as `check_evaluation` does.

    Where nothing is held out, those that need it are left out, with a line on stderr.
    """
    check_evaluation(config, corpus.tokenizer)
    skipped = [name for name in names if name != "samples" and not corpus.heldout.num_documents]
    if skipped and hosts.is_primary():
        print(f"skipping {', '.join(skipped)}: none of {corpus.train.num_documents:,} documents is held out "
              f"(config.data.heldout_fraction = {config.data.heldout_fraction:g})", file=sys.stderr, flush=True)
    names = tuple(name for name in names if name not in skipped)
    context = EvaluatorContext(config, corpus, pipeline, mesh)
    return {name: EVALUATORS[name](context) for name in names}


def check_evaluation(config: Config, tokenizer: Tokenizer | None) -> None:
    """Checks evaluators and, given the run's tokenizer, decoding settings before the run starts.

    Raises:
      ConfigError: an evaluator is unknown, or `config.decode` is invalid.
    """
    for name in (*config.eval.evaluators, *config.eval.final):
        if name not in EVALUATORS:
            raise ConfigError(f"config.eval: unknown evaluator {name!r}; known: {', '.join(EVALUATORS)}")
    if tokenizer is not None:
        Decoder(None, config.decode, SpecialIds.of(tokenizer, config.decode), config.model.max_length,
                model.make_init_cache(config.model))  # raises ConfigError


def bits_per_byte(context: EvaluatorContext) -> Evaluator:
    """The bound on held-out text by the fixed-count estimator (LLaDA, eq. 6): `eval/bits_per_byte` and `…_stderr`.

    Bits are divided by the original UTF-8 bytes; tokens include the EOS of every document. The standard error of the
    ratio over windows covers both the random masks and the choice of text. Mask counts are stratified over the windows,
    so the estimate errs on the high side. The masks of a window depend on its number, the number of windows and
    config.seed alone: the bound does not depend on the devices or on eval.batch_size, and evaluations are paired.
    """
    config, corpus, pipeline, mesh = context
    windows = pipeline.heldout_windows(corpus.heldout, config.data.length, config.eval.windows)
    num_rows = len(windows.tokens_BL)
    rows_sharding = sharding.batch_sharding(mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = math.ceil(config.eval.batch_size / shards) * shards

    @jax.jit
    def nats(params: Any, batch: Batch, rows_B: jax.Array, key: jax.Array) -> jax.Array:
        corrupted = corrupt_fixed_count(key, batch, config.diffusion.mask_id, rows_B, num_rows)
        hidden_BLD = model.hidden(config.model, params, corrupted.noisy_BL, batch.positions_BL, batch.segments_BL)
        head = functools.partial(model.head, config.model, params)
        losses = functools.partial(token_losses, head, chunk=config.train.logits_chunk)
        return objective(losses, hidden_BLD, batch, corrupted)[2]

    def evaluate(params: Any, _: int) -> dict[str, float | str]:
        key = key_for(config.seed, Purpose.EVALUATION)  # the same masks at every step, so that evaluations compare
        nats_N = np.zeros(num_rows)
        for start in range(0, num_rows, batch_size):
            part = jax.tree.map(lambda x: _pad_rows(x[start : start + batch_size], batch_size), windows)  # noqa: B023
            rows_B = np.arange(start, start + batch_size, dtype=np.int32) % num_rows  # rows of padding mask nothing
            batch, rows_B = jax.device_put((part, rows_B), rows_sharding)
            with use_mesh(mesh):
                draws = [nats(params, batch, rows_B, jax.random.fold_in(key, draw))
                         for draw in range(config.eval.draws)]
            nats_N[start : start + batch_size] = np.mean(hosts.fetch(draws), axis=0)[: num_rows - start]
        tokens_N = windows.maskable_BL.sum(axis=1)
        mean, stderr = ratio_and_stderr(nats_N, tokens_N)
        per_byte = corpus.heldout.num_tokens / corpus.heldout.num_bytes / math.log(2)
        return {"eval/bits_per_byte": mean * per_byte, "eval/bits_per_byte_stderr": stderr * per_byte,
                "eval/nats_per_token": mean}

    return evaluate


def ratio_and_stderr(total_N: np.ndarray, size_N: np.ndarray) -> tuple[float, float]:
    """Σ total / Σ size over N independent items, and the standard error of that ratio (NaN for a single item)."""
    ratio = float(total_N.sum() / size_N.sum())
    count = len(total_N)
    if count < 2:
        return ratio, math.nan
    residual_N = total_N - ratio * size_N
    return ratio, float(np.sqrt(count / (count - 1) * np.sum(residual_N**2)) / size_N.sum())


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Adds rows of zeros (padding: segment 0, not maskable) up to `rows`."""
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def samples(context: EvaluatorContext) -> Evaluator:
    """Texts decoded with `config.decode` from `config.eval.prompts`, which take turns."""
    config = context.config
    texts = [config.eval.prompts[row % len(config.eval.prompts)] for row in range(config.eval.rows)]
    prompts = [context.corpus.tokenizer.encode(text) for text in texts]

    def evaluate(params: Any, _: int) -> dict[str, float | str]:
        answers = context.answer(config.decode, params, prompts)[1]
        lines = [f"[{row}] {text}{answer}" for row, (text, answer) in enumerate(zip(texts, answers, strict=True), 1)]
        return {"eval/samples": "\n".join(lines)}

    return evaluate


def infill(context: EvaluatorContext) -> Evaluator:
    """Held-out passages whose gaps the model fills in, shown with the truth, and the share of correct tokens.

    There are `config.eval.gaps` gaps per passage. Decoding is greedy, most confident positions first.

    Raises:
      InputError: no held-out window is full.
      ConfigError: the gaps do not fit into a window.
    """
    config, corpus, pipeline, _ = context
    tokenizer = corpus.tokenizer
    windows = pipeline.heldout_windows(corpus.heldout, config.data.length, 0)
    whole = np.flatnonzero(windows.maskable_BL.all(axis=1))
    if not len(whole):
        raise InputError("evaluator infill: needs a held-out window of config.data.length = "
                         f"{config.data.length} tokens, but only {corpus.heldout.num_tokens} tokens are held out "
                         "(config.data.heldout_fraction)")
    chosen = whole[np.linspace(0, len(whole) - 1, config.eval.rows + 2).astype(int)[1:-1]]
    passages = [windows.tokens_BL[row].tolist() for row in chosen]
    width, count = config.eval.gap_length, config.eval.gaps
    starts = [round((i + 1) * config.data.length / (count + 1) - width / 2) for i in range(count)]
    if starts[0] < 0 or any(b - a <= width for a, b in itertools.pairwise([*starts, config.data.length])):
        raise ConfigError(f"config.eval.gaps = {count}: gaps of {width} tokens (config.eval.gap_length) do not fit "
                          f"into windows of {config.data.length} tokens")
    settings = dataclasses.replace(config.decode, temperature=0.0, confidence="low_confidence")
    hidden = [column for start in starts for column in range(start, start + width)]
    gapped = [[config.diffusion.mask_id if column in hidden else token for column, token in enumerate(passage)]
              for passage in passages]

    def show(passage: list[int], filled: list[int]) -> str:
        text, end = "", 0
        for start in starts:
            predicted, truth = (tokenizer.decode(tokens[start : start + width], after=tokens[:start])
                                for tokens in (filled, passage))
            text += tokenizer.decode(passage[end:start], after=passage[:end])
            text += f"⟦{predicted} ✓⟧" if predicted == truth else f"⟦{predicted} ✗ {truth}⟧"
            end = start + width
        text += tokenizer.decode(passage[end:], after=passage[:end])
        return text.replace("\n", "⏎")  # a passage stays on one line

    def evaluate(params: Any, _: int) -> dict[str, float | str]:
        pairs = [(passage, result.tokens) for passage, result in zip(
            passages, context.decoder(settings, params).generate(gapped, infill=True), strict=True)]
        hits = [filled[column] == passage[column] for passage, filled in pairs for column in hidden]
        lines = [f"[{number}] {show(*pair)}" for number, pair in enumerate(pairs, 1)]
        return {"eval/infill_accuracy": float(np.mean(hits)),
                "eval/infill": "\n".join(["⟦filled in ✓⟧ or ⟦filled in ✗ truth⟧; ⏎ is a line break", *lines])}

    return evaluate


class Questions(NamedTuple):
    """Held-out prompts (ids, texts) with reference answers and the data source of each; empty if there is only one."""

    prompts: list[list[int]]
    texts: list[str]
    answers: list[str]
    sources: list[str]


def exact_match(context: EvaluatorContext) -> Evaluator:
    """Answers to held-out prompts, decoded with `config.decode` and scored by `config.eval.answer_metric`.

    Reports `eval/exact_match` (the mean score, overall and per source) with its standard error, `eval/answer_tokens`
    (without the end token), `eval/ended` (the share that stopped at EOS or another end token), `eval/nfe` (network
    evaluations per answer) and a table `eval/answers`. Prompts come from held-out examples, or are held-out documents
    up to and including `config.eval.separator`.

    Raises:
      InputError: nothing is held out.
      ConfigError: the answer metric is unknown, or a document lacks the separator.
    """
    config = context.config
    questions = _questions(config, context.corpus)
    metric = make_answer_metric(config.eval.answer_metric)
    sources = np.array(questions.sources)

    def evaluate(params: Any, _: int) -> dict[str, float | str]:
        decoded, answers = context.answer(config.decode, params, questions.prompts)
        rows = zip(questions.texts, answers, questions.answers, strict=True)
        scores = np.array([float(metric(*row)) for row in rows])
        return {
            "eval/exact_match": float(scores.mean()),
            "eval/exact_match_stderr": float(scores.std() / math.sqrt(len(scores))),
            **{f"eval/exact_match/{source}": float(scores[sources == source].mean())
               for source in dict.fromkeys(questions.sources)},
            "eval/answer_tokens": float(np.mean([len(each.tokens) for each in decoded])),
            "eval/ended": float(np.mean([each.stopped_by in ("eos", "stop_id") for each in decoded])),
            "eval/nfe": float(np.mean([each.nfe for each in decoded])),
            "eval/answers": _table(questions, answers, scores),
        }

    return evaluate


def _table(questions: Questions, answers: list[str], scores: np.ndarray) -> str:
    """A few answers, evenly spread, with their scores."""
    lines = []
    for row in dict.fromkeys(np.linspace(0, len(answers) - 1, _TABLE_ROWS).astype(int)):
        prompt, answer, reference = (" ".join(text.split()) for text in (
            questions.texts[row], answers[row], questions.answers[row]))
        verdict = "✓" if scores[row] == 1 else f"✗ {reference}"
        lines.append(f"{prompt[-60:]} ⟦{answer[:80]}⟧ {verdict[:80]}")
    return "\n".join(lines)


def decoding_orders(context: EvaluatorContext) -> Evaluator:
    """A table of exact match by confidence and steps per block: revealing the most confident first pays off."""
    config = context.config
    questions = _questions(config, context.corpus)
    steps = config.decode.steps_per_block
    variants = [(order, count) for count in sorted({steps, max(1, steps // 4), 1}, reverse=True)
                for order in ("low_confidence", "random")]

    def evaluate(params: Any, _: int) -> dict[str, float | str]:
        lines = ["order            steps  evaluations  exact match"]
        for order, count in variants:
            settings = dataclasses.replace(config.decode, confidence=order, steps_per_block=count)
            decoded, answers = context.answer(settings, params, questions.prompts)
            share = float(np.mean([a == b for a, b in zip(answers, questions.answers, strict=True)]))
            nfe = float(np.mean([each.nfe for each in decoded]))
            error = math.sqrt(share * (1 - share) / len(answers))
            lines.append(f"{order:15} {count:6} {nfe:12.1f}  {share:.3f} ± {error:.3f}")
        return {"eval/decoding_orders": "\n".join(lines)}

    return evaluate


def _questions(config: Config, corpus: Corpus | Examples) -> Questions:
    """At most `config.eval.rows` held-out questions: evenly spread examples, or the first documents."""
    available = corpus.heldout.num_documents
    if not available:
        raise InputError("config.data.heldout_fraction: nothing is held out, so there are no prompts to evaluate")
    count = min(config.eval.rows, available)
    decode = corpus.tokenizer.decode
    if isinstance(corpus, Examples):
        chosen = [index * available // count for index in range(count)]
        examples = [corpus.heldout.question(index) for index in chosen]
        sources = [corpus.sources[corpus.heldout.sources_N[index]] for index in chosen]
        return Questions([each.prompt for each in examples], [decode(each.prompt) for each in examples],
                         [decode(each.answer) for each in examples], sources if len(corpus.sources) > 1 else [])
    separator = config.eval.separator
    parts = [decode(corpus.heldout.document(index)).partition(separator) for index in range(count)]
    for index, (text, found, _) in enumerate(parts):
        if not found:
            raise ConfigError(f"config.eval.separator = {separator!r}: not in held-out document {index}: {text[:60]!r}")
    prompts = [before + found for before, found, _ in parts]
    return Questions([corpus.tokenizer.encode(text) for text in prompts], prompts, [answer for *_, answer in parts], [])


EVALUATORS: dict[str, Callable[[EvaluatorContext], Evaluator]] = {
    make.__name__: make for make in (bits_per_byte, samples, infill, exact_match, decoding_orders)}
