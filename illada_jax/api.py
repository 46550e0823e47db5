"""The Python interface: load a model, continue text, fill gaps, chat, score, compute logits.

>>> import illada_jax
>>> lm = illada_jax.load("demo")
>>> filled = lm.infill(["Return a list of [[mask:4]] in the file."])[0]
>>> filled.text.startswith("Return a list of "), filled.stopped_by
(True, 'filled')

`LanguageModel.generate` continues texts, `LanguageModel.chat` answers conversations, and `illada_jax.tracing` shows how
a text was written.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from illada_jax.config import Config, DecodeConfig, override
from illada_jax.data.tokenizers.chat import Message, chat_format, encode_chat
from illada_jax.decoding import Decoded, Decoder, LogitsFn, SpecialIds
from illada_jax.decoding.gaps import GappedText, parse_gaps
from illada_jax.decoding.kept import KeptPrefix
from illada_jax.errors import InputError
from illada_jax.interop import load_model
from illada_jax.model import make_init_cache, make_logits_fn, num_params
from illada_jax.parallel.fingerprints import fingerprint
from illada_jax.scoring import Score, ScoreConfig, Scorer

Prompt = str | Sequence[int]
# Settings that decide where an answer ends; a gap has a given length.
NOT_FOR_INFILLING = ("max_new_tokens", "over_budget", "length", "stop_ids", "end_of_thinking_boost",
                     "end_of_thinking_power", "end_of_thinking_ids")


@dataclass(frozen=True)
class Generation(Decoded):
    """The result of one prompt: `decoding.Decoded` and its text.

    With stop strings, `stopped_by` may be `stop_string`, and `tokens` reach to the end of the stop string. Canvas and
    steps determine every state of the row, see `illada_jax.tracing`.

    Attributes:
      text: new text before the stop string; in infilling the whole text, gaps filled.
    """

    text: str


def load(path: str, dtype: Literal["float32", "bfloat16"] = "float32", mesh: Mesh | None = None,
         quantize: Literal["none", "int8"] = "none", special_ids: Mapping[str, int] | None = None,
         chat_template: str = "") -> "LanguageModel":
    """Loads a model.

    Args:
      path: a workdir (its newest checkpoint), a checkpoint in it, a Hugging Face directory or Hub id of LLaDA or iLLaDA
        weights, or `demo` or `demo-chat`, which come with the package.
      dtype: dtype of params and compute.
      mesh: devices to shard params and batches over; None is the first device.
      quantize: `int8` quantises the matrices (not embeddings and norms), for half the memory of bfloat16.
      special_ids: ids by name (mask, bos, eos, pad, eot) that override those of a Hugging Face directory.
      chat_template: name of one of the tokenizer's chat templates, where it has several.

    Raises:
      InputError: the path has no model, or a corrupt or unsupported one.
    """
    loaded = load_model(path, dtype, mesh, quantize, special_ids, chat_template)
    return LanguageModel(loaded.config, loaded.params, loaded.tokenizer, mesh)


class LanguageModel:
    """A trained model with its tokenizer.

    Attributes:
      config: the config of its training; `config.decode` has the defaults of `generate` and `infill`.
      params: params of the network.
      tokenizer: its tokenizer.
      mesh: devices that params and batches are sharded over, or None.
      logits_fn: the network as decoding and scoring call it, see `decoding.query.LogitsFn`.
    """

    def __init__(self, config: Config, params: Any, tokenizer: Any, mesh: Mesh | None = None):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.logits_fn: LogitsFn = make_logits_fn(config.model, params)
        self._last_turn = KeptPrefix()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all params, sixteen hexadecimal digits."""
        return fingerprint(self.params)

    def __repr__(self) -> str:
        c, devices = self.config.model, 1 if self.mesh is None else self.mesh.size
        return (f"LanguageModel({num_params(c):,} parameters: {c.num_layers} layers of width {c.d_model}, {c.dtype}, "
                f"{c.vocab_size:,} token ids, context of {c.max_length:,} tokens, on {devices} "
                f"{jax.devices()[0].platform} device{'s' if devices > 1 else ''})")

    def generate(self, prompts: Sequence[Prompt], *, progress: bool = False, **options: Any) -> list[Generation]:
        """Continues prompts; one result per prompt, in order. For the options see `as_completed`."""
        finished = tqdm(self.as_completed(prompts, **options), total=len(prompts), unit="prompt", disable=not progress)
        return [result for _, result in sorted(finished)]

    def chat(self, messages: Sequence[Message], *, reuse: bool = False, **options: Any) -> Generation:
        """Answers a conversation, rendered by the tokenizer's chat template; stops where the next turn begins.

        Args:
          messages: objects with `role` (system, user, assistant) and `content`; the last one is usually the user's.
          reuse: keep keys and values from turn to turn, and compute only what follows the longest common prefix with
            the last conversation; sets `cache` to `append`. The network is bidirectional, so the answer then depends on
            the calls before: the kept columns do not see what was said later.
          **options: options of `as_completed`.

        Raises:
          InputError: a message is invalid, the template rejects the conversation, or it exceeds the context.
        """
        ids = encode_chat(self.tokenizer, messages, add_generation_prompt=True)
        stop_ids = {*options.pop("stop_ids", self.config.decode.stop_ids), *chat_format(self.tokenizer).stop_ids}
        if reuse and options.setdefault("cache", "append") != "append":
            raise InputError(f"reuse: needs cache = 'append', not {options['cache']!r}")
        options["prefix"] = self._last_turn if reuse else None
        return self.generate([ids], stop_ids=tuple(sorted(stop_ids)), **options)[0]

    def infill(self, texts: Sequence[Prompt], *, progress: bool = False, **options: Any) -> list[Generation]:
        """Fills gaps: `[[mask:8]]` in a text asks for eight tokens. For the options see `as_completed`."""
        return self.generate(texts, progress=progress, infill=True, **options)

    def as_completed(self, prompts: Sequence[Prompt], *, infill: bool = False, stop: Sequence[str] = (),
                     rows: Sequence[int] | None = None,
                     on_block: Callable[[int, Generation], bool | None] | None = None,
                     row_settings: Sequence[Mapping[str, Any]] | None = None, prefix: KeptPrefix | None = None,
                     **settings: Any) -> Iterator[tuple[int, Generation]]:
        """Decodes prompts and yields (index of the prompt, result) as they finish.

        Args:
          prompts: texts, or lists of ids, which are used as they are.
          infill: the prompts are texts with gaps (in ids: MASK), which are filled; nothing is appended.
          stop: strings that end an answer; the text ends before the first of them. The name of a special token stands
            for the token, too.
          rows: row numbers, which random draws depend on: the same seed and number give the same draws in any batch. By
            default 0, 1, 2, …
          on_block: called with (index of the prompt, result so far) after each of its blocks; a true return value stops
            the row. The text so far has no incomplete character at its end, which may still change.
          row_settings: fields of DecodeConfig of each prompt, such as temperatures, that override the settings; those
            of `decoding.decoder.VARY_BY_ROW` may vary in a batch.
          prefix: keys and values that calls leave to later ones, see `decoding.Decoder.as_completed`.
          **settings: fields of DecodeConfig that override `config.decode`. `block_length` alone sets `steps_per_block`,
            too: one token per step.

        Raises:
          InputError: a prompt or a setting is invalid; the message names it.
        """
        if isinstance(prompts, str):
            raise InputError("prompts: must be a list of prompts, not a string")
        if isinstance(stop, str):
            raise InputError("stop: must be a list of stop strings, not a string")
        if "" in stop:
            raise InputError("stop: a stop string must not be empty")
        if infill and stop:
            raise InputError("stop: not allowed in infilling, which fills every gap to its end")
        given = (key for changes in (settings, *(row_settings or ())) for key in changes)
        ignored = next((key for key in given if key in NOT_FOR_INFILLING), None) if infill else None
        if ignored:
            raise InputError(f"config.decode.{ignored}: not allowed in infilling, where a gap has a given length")
        stop_ids = {self.tokenizer.special_tokens[s] for s in stop if s in self.tokenizer.special_tokens}

        def with_stop_ids(changes: Mapping[str, Any]) -> DecodeConfig:
            decode = self.decode_settings({**settings, **changes})
            more = stop_ids - {*decode.stop_ids, self.tokenizer.eos_id, self.tokenizer.mask_id}
            return replace(decode, stop_ids=(*decode.stop_ids, *sorted(more)))

        decode = with_stop_ids({})
        of_rows = None if row_settings is None else [with_stop_ids(changes) for changes in row_settings]
        decoder = Decoder(self.logits_fn, decode, SpecialIds.of(self.tokenizer, decode), self.config.model.max_length,
                          make_init_cache(self.config.model), self.mesh)
        sources = [parse_gaps(p) if infill and isinstance(p, str) else p for p in prompts]
        ids = [self._encode(index, source) for index, source in enumerate(sources)]

        def block_done(index: int, decoded: Decoded) -> bool:
            so_far = self._generation(decoded, stop, sources[index], ids[index], final=False)
            return bool(on_block and on_block(index, so_far)) or so_far.stopped_by == "stop_string"

        finished = decoder.as_completed(ids, infill, rows, block_done if stop or on_block else None, of_rows, prefix)
        return ((index, self._generation(decoded, stop, sources[index], ids[index]))
                for index, decoded in finished)

    def score(self, context: Prompt, candidates: Sequence[Prompt], **settings: Any) -> list[Score]:
        """Scores continuations of a context; one score per candidate, in order.

        Args:
          context: text, or ids, which are used as they are; may be empty.
          candidates: texts or ids. A text is tokenised together with its context, or separately if a token would span
            both.
          **settings: fields of `scoring.ScoreConfig`, such as method="confidence" or "monte_carlo".

        Raises:
          InputError: a candidate or a setting is invalid; the message names it.

        >>> import illada_jax
        >>> lm = illada_jax.load("demo")
        >>> likely, unlikely = lm.score("Return a list", [" of", "zzzz"], method="confidence")
        >>> likely.value > unlikely.value
        True
        """
        return self.scorer(**settings).score(self._pairs(context, candidates))

    def choose(self, context: Prompt, candidates: Sequence[Prompt], *,
               normalise: Literal["none", "tokens", "characters", "bytes"] = "none", **settings: Any) -> int:
        """The index of the best candidate, for fewer evaluations than `score` (see `Scorer.choose`).

        A score is divided by `normalise`: none (lm-eval's acc), the candidate's tokens, characters (acc_norm) or UTF-8
        bytes (acc_bytes).
        """
        pairs = self._pairs(context, candidates)
        texts = [candidate if isinstance(candidate, str) else self.tokenizer.decode(ids, after=before)
                 for candidate, (before, ids) in zip(candidates, pairs, strict=True)]
        lengths = {"none": [1] * len(pairs), "tokens": [len(ids) for _, ids in pairs],
                   "characters": [len(text) for text in texts], "bytes": [len(text.encode()) for text in texts]}
        if normalise not in lengths:
            raise InputError(f"normalise = {normalise!r}: must be one of {', '.join(map(repr, lengths))}")
        return self.scorer(**settings).choose([pairs], [[max(1, length) for length in lengths[normalise]]])[0]

    def _pairs(self, context: Prompt, candidates: Sequence[Prompt]) -> list[tuple[list[int], list[int]]]:
        if isinstance(candidates, str):
            raise InputError("candidates: must be a list of candidates, not a string")
        return [self.encode_pair(context, candidate) for candidate in candidates]

    def scorer(self, **settings: Any) -> Scorer:
        """The `scoring.Scorer` of `score`, for many questions at once; takes fields of `scoring.ScoreConfig`."""
        return Scorer(self.logits_fn, override(ScoreConfig(), "score", settings), SpecialIds.of(self.tokenizer),
                      self.config.model.max_length, self.mesh, make_init_cache(self.config.model))

    def encode_pair(self, context: Prompt, candidate: Prompt) -> tuple[list[int], list[int]]:
        """Ids of a context and of a candidate that follows it.

        Two texts are tokenised as one, as in lm-eval, if the result begins with the tokens of the context; otherwise
        separately.
        """
        encode = self.tokenizer.encode
        if isinstance(context, str) and isinstance(candidate, str):
            whole, before = encode(context + candidate), encode(context)
            if whole[: len(before)] == before and (len(whole) > len(before) or not candidate):
                return before, whole[len(before) :]
        before = encode(context) if isinstance(context, str) else [int(id_) for id_ in context]
        if not isinstance(candidate, str):
            return before, [int(id_) for id_ in candidate]
        return before, self.tokenizer.encode_behind(candidate) if before else encode(candidate)

    def logits(self, tokens_BL: Any) -> jax.Array:
        """Logits of every position, float32 [B, L, V], for inspection: the whole array is held in memory.

        Args:
          tokens_BL: int ids, all rows of one length; MASK (`tokenizer.mask_id`) at positions to predict.

        Raises:
          InputError: the ids are not a rectangle of integers, exceed the context, or are outside the vocabulary.

        >>> import illada_jax
        >>> lm = illada_jax.load("demo")
        >>> ids = [*lm.tokenizer.encode("Return a"), lm.tokenizer.mask_id]
        >>> lm.logits([ids]).shape == (1, len(ids), lm.config.model.vocab_size)
        True
        """
        tokens_BL = np.asarray(tokens_BL)
        if tokens_BL.ndim != 2 or not np.issubdtype(tokens_BL.dtype, np.integer):
            raise InputError(f"tokens: must be integers [rows, length], not {tokens_BL.dtype} "
                             f"{list(tokens_BL.shape)}")
        if tokens_BL.shape[1] > self.config.model.max_length:
            raise InputError(f"tokens: {tokens_BL.shape[1]} exceed the context of {self.config.model.max_length}")
        if tokens_BL.size and not 0 <= tokens_BL.min() <= tokens_BL.max() < self.config.model.vocab_size:
            raise InputError(f"tokens: ids must lie in [0, {self.config.model.vocab_size})")
        return _all_logits(self.logits_fn, jnp.asarray(tokens_BL, jnp.int32))

    def has_room(self, messages: Sequence[Message], **settings: Any) -> bool:
        """True if the context has room for the conversation and a block of the answer."""
        block = self.decode_settings(settings).block_length
        ids = encode_chat(self.tokenizer, messages, add_generation_prompt=True)
        return len(ids) + block <= self.config.model.max_length

    def decode_settings(self, changes: dict[str, Any]) -> DecodeConfig:
        """`config.decode` with the overrides of `as_completed`. Raises InputError for an invalid one."""
        if "block_length" in changes:
            changes = {"steps_per_block": changes["block_length"], **changes}
        return override(self.config.decode, "decode", changes)

    def _encode(self, index: int, source: Any) -> list[int]:
        if not isinstance(source, (str, GappedText)):
            ids = np.asarray(source, dtype=object)
            if ids.ndim != 1 or not all(isinstance(id_, (int, np.integer)) for id_ in ids):
                raise InputError(f"prompt {index}: must be a text or a list of ids")
            source = [int(id_) for id_ in ids]
        if not source:
            raise InputError(f"prompt {index}: must not be empty; give text, or ids such as [tokenizer.bos_id]")
        if isinstance(source, list):
            return source
        gapped, context = isinstance(source, GappedText), self.config.model.max_length
        if gapped and sum(source.lengths) > context:
            raise InputError(f"text {index}: its gaps of {sum(source.lengths)} tokens exceed the context of {context} "
                             "tokens")
        try:
            ("".join(source.pieces) if gapped else source).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt {index}: invalid text: character {error.start} is a lone surrogate") from error
        return source.tokens(self.tokenizer) if gapped else self.tokenizer.encode(source)

    def _generation(self, decoded: Decoded, stop: Sequence[str], source: Any, ids: list[int],
                    final: bool = True) -> Generation:
        before = [] if self.tokenizer.mask_id in ids else ids  # in infilling, the tokens are those of the whole text
        decode = functools.partial(self.tokenizer.decode, after=before, final=final)
        gapped = isinstance(source, GappedText)
        text = source.fill(self.tokenizer, ids, decoded.tokens) if gapped else decode(decoded.tokens)
        count, stopped_by = len(decoded.tokens), decoded.stopped_by
        starts = [text.find(s) for s in stop if s in text]
        if starts:
            def contains_stop(n: int) -> bool:
                so_far = decode(decoded.tokens[:n])
                return any(s in so_far for s in stop)

            count = bisect.bisect_left(range(count), True, key=contains_stop)
            text, stopped_by = text[: min(starts)], "stop_string"
        shortened = {name: getattr(decoded, name)[:count] for name in ("tokens", "reveal_step", "log_probs")}
        return Generation(**{**vars(decoded), **shortened, "stopped_by": stopped_by}, text=text)


@jax.jit
def _all_logits(logits_fn, tokens_BL: jax.Array) -> jax.Array:
    columns_BL = jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1)
    return logits_fn(tokens_BL, columns_BL, jnp.ones_like(tokens_BL), columns_BL, None)[0]
