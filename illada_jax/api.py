"""For people who use a model: load one, continue text, fill gaps, look at logits.

>>> import illada_jax
>>> lm = illada_jax.load("demo")
>>> filled = lm.infill(["Return a list of [[mask:4]] in the file."])[0]
>>> filled.text.startswith("Return a list of "), filled.stopped_by
(True, 'filled')

`LanguageModel.generate` continues texts, `LanguageModel.chat` answers conversations; for how a text was written see
`illada_jax.tracing`.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from illada_jax.errors import InputError
from illada_jax.interop import load_model
from illada_jax.model import make_init_cache, make_logits_fn
from illada_jax.scoring import Score, ScoreConfig, Scorer

Prompt = str | Sequence[int]
# Settings that decide where an answer ends: gaps have their ends.
NOT_FOR_INFILLING = ("max_new_tokens", "over_budget", "length", "stop_ids", "end_of_thinking_boost", "end_of_thinking_power", "end_of_thinking_ids")
NORMALISATIONS = ("none", "tokens", "characters", "bytes")


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Attributes:
      text: the new text, up to the stop string; in infilling the whole text, gaps filled.
      tokens: the new ids, without the stop id and up to the end of the stop string; in infilling all ids.
      nfe: network evaluations that it took.
      stopped_by: `eos`, `stop_string`, `length` (the budget was used up), `filled` (infilling) or `callback`.
      reveal_step: for each of the tokens, the step at which it was written; -1 for what was given.
      log_probs: natural log-probability of each of the tokens when it was written; 0 for given ones.
      canvas: the whole row of ids at the end: what was given, what was written, also behind the end of the answer.
      canvas_step: for each id of the canvas, the step at which it was written; -1 for what was given or never written.
        Together they hold every state that the text went through, see `illada_jax.tracing`.
    """

    text: str
    tokens: list[int]
    nfe: int
    stopped_by: str
    reveal_step: list[int]
    log_probs: list[float]
    canvas: list[int]
    canvas_step: list[int]


def load(path: str, dtype: Literal["float32", "bfloat16"] = "float32", mesh: Mesh | None = None,
         quantize: Literal["none", "int8"] = "none", special_ids: Mapping[str, int] | None = None) -> "LanguageModel":
    """Loads a model.

    Args:
      path: a workdir (its newest checkpoint), one checkpoint in it, a Hugging Face directory with the weights of LLaDA
        or iLLaDA, a Hub id of such weights, or `demo` or `demo-chat`, which are part of the package.
      dtype: type of params and compute.
      mesh: devices to spread params and batches over; None takes the first device.
      quantize: `int8` rounds the matrices to eight bits (embeddings and norms stay), for half the memory of bfloat16.
      special_ids: ids by name (mask, bos, eos, pad, eot) that go before those that a Hugging Face directory names.

    Raises:
      InputError: there is no model, or it is broken or not supported.
    """
    loaded = load_model(path, dtype, mesh, quantize, special_ids)
    return LanguageModel(loaded.config, loaded.params, loaded.tokenizer, mesh)


class LanguageModel:
    """A trained model with its tokenizer.

    Attributes:
      config: the config that made it; `config.decode` has the defaults of `generate` and `infill`.
      params: its params.
      tokenizer: its tokenizer.
      mesh: the devices that params and batches are spread over, or None.
    """

    def __init__(self, config: Config, params: Any, tokenizer: Any, mesh: Mesh | None = None):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.mesh = mesh
        self._logits_fn = make_logits_fn(config.model, params)

    @property
    def logits_fn(self) -> LogitsFn:
        """The network as decoding and scoring take it (design: the decoder's contract with the model)."""
        return self._logits_fn

    def generate(self, prompts: Sequence[Prompt], *, progress: bool = False, **options: Any) -> list[Generation]:
        """Continues prompts; one result for each, in their order. For the options see `as_completed`."""
        return _in_order(self.as_completed(prompts, **options), len(prompts), progress)

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answers a conversation, rendered by the tokenizer's chat template; stops at the end of the turn.

        Args:
          messages: objects with `role` (system, user, assistant) and `content`, the last one usually the user's.
          **options: those of `as_completed`.

        Raises:
          InputError: a message is wrong, the template refuses the conversation, or it exceeds the context.
        """
        ids = self._chat_ids(messages)
        stop_ids = {*options.pop("stop_ids", self.config.decode.stop_ids), chat_format(self.tokenizer).end_id}
        return self.generate([ids], stop_ids=tuple(sorted(stop_ids)), **options)[0]

    def infill(self, texts: Sequence[Prompt], *, progress: bool = False, **options: Any) -> list[Generation]:
        """Fills gaps: `[[mask:8]]` in a text asks for eight tokens. For the options see `as_completed`."""
        return _in_order(self.as_completed(texts, infill=True, **options), len(texts), progress)

    def as_completed(self, prompts: Sequence[Prompt], *, infill: bool = False, stop: Sequence[str] = (),
                     rows: Sequence[int] | None = None,
                     on_block: Callable[[int, Generation], bool | None] | None = None,
                     **settings: Any) -> Iterator[tuple[int, Generation]]:
        """Decodes prompts and yields (index of the prompt, result) as they finish.

        Args:
          prompts: texts, or lists of ids, which are used as they are.
          infill: the prompts are texts with gaps (in ids: MASK), which are filled; nothing is appended.
          stop: strings that end an answer; the text ends before the first of them.
          rows: numbers that the rows draw by; by default 0, 1, 2, … The same seed and number give the same draw in any
            batch.
          on_block: called with (index of the prompt, what has been written so far) after each of its blocks; a true
            result stops the row.
          **settings: fields of DecodeConfig that differ from `config.decode`. With another `block_length` alone,
            `steps_per_block` follows it: one token per step.

        Raises:
          InputError: a prompt or a setting is wrong; the message names it.
        """
        if isinstance(prompts, str):
            raise InputError("prompts: a list of prompts is wanted, not one text")
        if isinstance(stop, str):
            raise InputError("stop: a list of stop strings is wanted, not one text")
        if "" in stop:
            raise InputError("stop: a stop string must not be empty")
        if infill and stop:
            raise InputError("stop: is not for infilling, which fills every gap to its end")
        ignored = next((key for key in settings if key in NOT_FOR_INFILLING), None) if infill else None
        if ignored:
            raise InputError(f"config.decode.{ignored}: is not for infilling: a gap has the length that it is given")
        decode = self.decode_settings(settings)
        decoder = Decoder(self._logits_fn, decode, SpecialIds.of(self.tokenizer), self.config.model.max_length,
                          make_init_cache(self.config.model), self.mesh)
        sources = [parse_gaps(p) if infill and isinstance(p, str) else p for p in prompts]
        ids = [self._encode(index, source) for index, source in enumerate(sources)]

        def block_done(index: int, decoded: Decoded) -> bool:
            so_far = self._generation(decoded, stop, sources[index], ids[index])
            return bool(on_block and on_block(index, so_far)) or so_far.stopped_by == "stop_string"

        finished = decoder.as_completed(ids, infill, rows, block_done if stop or on_block else None)
        return ((index, self._generation(decoded, stop, sources[index], ids[index]))
                for index, decoded in finished)

    def score(self, context: Prompt, candidates: Sequence[Prompt], **settings: Any) -> list[Score]:
        """Scores candidates that may follow a context, one for each, in their order.

        Args:
          context: text, or ids, which are used as they are; may be empty.
          candidates: texts or ids. A text is tokenised together with its context, and apart where a token would
            straddle the two.
          **settings: fields of `scoring.ScoreConfig`, such as method="confidence" or "monte_carlo".

        Raises:
          InputError: a candidate or a setting is wrong; the message names it.

        >>> import illada_jax
        >>> lm = illada_jax.load("demo")
        >>> likely, unlikely = lm.score("Return a list", [" of", "zzzz"], method="confidence")
        >>> likely.value > unlikely.value
        True
        """
        if isinstance(candidates, str):
            raise InputError("candidates: a list of candidates is wanted, not one text")
        return self.scorer(**settings).score([self.encode_pair(context, candidate) for candidate in candidates])

    def choose(self, context: Prompt, candidates: Sequence[Prompt], *,
               normalise: Literal["none", "tokens", "characters", "bytes"] = "none", **settings: Any) -> int:
        """The index of the best candidate, for less than it takes to score all (see `Scorer.choose`).

        Args:
          context: see `score`.
          candidates: see `score`.
          normalise: what a score is divided by: nothing (lm-eval's acc), the candidate's tokens, its characters
            (acc_norm) or its UTF-8 bytes (acc_bytes).
          **settings: see `score`.
        """
        if isinstance(candidates, str):
            raise InputError("candidates: a list of candidates is wanted, not one text")
        if normalise not in NORMALISATIONS:
            raise InputError(f"normalise = {normalise!r}: must be one of {', '.join(map(repr, NORMALISATIONS))}")
        pairs = [self.encode_pair(context, candidate) for candidate in candidates]
        texts = [c if isinstance(c, str) else self.tokenizer.decode(c) for c in candidates]
        lengths = {"none": [1] * len(pairs), "tokens": [len(ids) for _, ids in pairs],
                   "characters": [len(text) for text in texts], "bytes": [len(text.encode()) for text in texts]}
        return self.scorer(**settings).choose([pairs], [[max(1, length) for length in lengths[normalise]]])[0]

    def scorer(self, **settings: Any) -> Scorer:
        """What `score` uses, for many questions at once: `scoring.Scorer` with fields of `scoring.ScoreConfig`."""
        return Scorer(self._logits_fn, override(ScoreConfig(), "score", settings), SpecialIds.of(self.tokenizer),
                      self.config.model.max_length, self.mesh)

    def encode_pair(self, context: Prompt, candidate: Prompt) -> tuple[list[int], list[int]]:
        """The ids of a context and of a candidate behind it.

        Two texts are tokenised as one, as lm-eval does, if the tokens of the context begin it; else apart.
        """
        encode = self.tokenizer.encode
        if isinstance(context, str) and isinstance(candidate, str):
            whole, before = encode(context + candidate), encode(context)
            if whole[: len(before)] == before and (len(whole) > len(before) or not candidate):
                return before, whole[len(before) :]
        return tuple(encode(part) if isinstance(part, str) else [int(id_) for id_ in part]
                     for part in (context, candidate))

    def logits(self, tokens_BL: Any) -> jax.Array:
        """Logits of every position, float32 [B, L, V], for looking inside: this is the whole array, in memory.

        Args:
          tokens_BL: int ids, all rows of one length; MASK (`tokenizer.mask_id`) where the model is to predict.

        >>> import illada_jax
        >>> lm = illada_jax.load("demo")
        >>> ids = [*lm.tokenizer.encode("Return a"), lm.tokenizer.mask_id]
        >>> lm.logits([ids]).shape == (1, len(ids), lm.config.model.vocab_size)
        True
        """
        tokens_BL = np.asarray(tokens_BL)
        if tokens_BL.ndim != 2 or not np.issubdtype(tokens_BL.dtype, np.integer):
            raise InputError(f"tokens: integers [rows, length] are wanted, not {tokens_BL.dtype} "
                             f"{list(tokens_BL.shape)}")
        if tokens_BL.shape[1] > self.config.model.max_length:
            raise InputError(f"tokens: {tokens_BL.shape[1]} exceed the context of {self.config.model.max_length}")
        if tokens_BL.size and not 0 <= tokens_BL.min() <= tokens_BL.max() < self.config.model.vocab_size:
            raise InputError(f"tokens: ids must lie in [0, {self.config.model.vocab_size})")
        return _all_logits(self._logits_fn, jnp.asarray(tokens_BL, jnp.int32))

    def has_room(self, messages: Sequence[Message], **settings: Any) -> bool:
        """Whether a conversation leaves room in the context for a block of an answer."""
        block = self.decode_settings(settings).block_length
        return len(self._chat_ids(messages)) + block <= self.config.model.max_length

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        return encode_chat(self.tokenizer, messages, add_generation_prompt=True)

    def decode_settings(self, changes: dict[str, Any]) -> DecodeConfig:
        """`config.decode` with some fields changed, as `as_completed` takes them. Raises InputError for a wrong one."""
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
            raise InputError(f"prompt {index}: is empty; give some text, or ids such as [tokenizer.bos_id]")
        room = self.config.model.max_length
        if isinstance(source, GappedText) and sum(source.lengths) > room:
            raise InputError(f"text {index}: its gaps of {sum(source.lengths)} tokens exceed the context of {room} "
                             "tokens")
        text = "".join(source.pieces) if isinstance(source, GappedText) else source
        try:
            if isinstance(text, str):
                text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt {index}: is no valid text: character {error.start} is half of one") from error
        if isinstance(source, GappedText):
            return source.tokens(self.tokenizer)
        return self.tokenizer.encode(source) if isinstance(source, str) else source

    def _generation(self, decoded: Decoded, stop: Sequence[str], source: Any, ids: list[int],
                    ) -> Generation:
        decode = self.tokenizer.decode
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
        return Generation(text, decoded.tokens[:count], decoded.nfe, stopped_by, decoded.reveal_step[:count],
                          decoded.log_probs[:count], decoded.canvas, decoded.canvas_step)


@jax.jit
def _all_logits(logits_fn, tokens_BL: jax.Array) -> jax.Array:
    columns_BL = jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1)
    return logits_fn(tokens_BL, columns_BL, jnp.ones_like(tokens_BL), columns_BL, None)[0]


def _in_order(finished: Iterator[tuple[int, Generation]], count: int, progress: bool) -> list[Generation]:
    results = dict(tqdm(finished, total=count, unit="prompt", disable=not progress))
    return [results[index] for index in range(count)]
