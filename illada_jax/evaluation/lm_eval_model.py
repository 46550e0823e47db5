"""The adapter of a language model to lm-evaluation-harness (extra: eval).

In float32 the result of a request depends on the request and the settings only, not on batches, order, limits, other
tasks or the number of processes.
"""

import collections
import dataclasses
import json
import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from absl import logging
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from illada_jax.api import Generation, LanguageModel
from illada_jax.config import DecodeConfig, override
from illada_jax.data.tokenizers.chat import DEFAULT_TEMPLATE, chat_format, encode_chat
from illada_jax.decoding.query import END_OF_THINKING
from illada_jax.errors import InputError
from illada_jax.evaluation.settings import Settings
from illada_jax.evaluation.work import Answers, Request, Work
from illada_jax.scoring import ScoreConfig

# Marks a conversation: the harness passes contexts as text, but text must never become special tokens.
_CHAT = "\ue000chat:"
# Generation arguments that have an effect, under the names that lm-eval gives them.
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class LmEvalModel(LM):
    """A language model behind the harness's interface.

    Every process gets all requests and computes its share, so the harness sees a single process (rank 0 of 1).

    Attributes:
      truncated: number of contexts whose beginning was dropped, by kind of request, and of `candidates` (with their
        whole context).
    """

    def __init__(self, lm: LanguageModel, settings: Settings | None = None, work: Work | None = None):
        """Wraps a model; `work` saves finished requests."""
        super().__init__()
        self.lm = lm
        self.settings = settings or Settings()
        self.work = work or Work()
        self.truncated: dict[str, int] = collections.Counter()

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Score in nats, True if greedy decoding writes the candidate) of (context, candidate) texts.

        Only method=confidence computes the second; with monte_carlo it is False.

        Raises:
          InputError: a candidate is empty, or with over_length=error does not fit into the context.
        """
        del disable_tqdm
        pairs = [self._pair(request) for request in requests]
        items = [(request.task_name, request.doc_id) for request in requests]
        return self._score("loglikelihood", pairs, items, self.settings.score)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats, always by Monte-Carlo: confidence scores are not likelihoods.

        A text is cut into windows of `rolling_stride` new tokens, each after as many of the earlier tokens as fit.
        Every window's score is a lower bound on its log-likelihood, so the sum is one on the text's.

        Raises:
          InputError: `rolling_stride` exceeds the context.
        """
        del disable_tqdm
        settings = dataclasses.replace(self.settings.score, method="monte_carlo",
                                       mc_num=self.settings.lm_eval.rolling_mc_num)
        length = self.lm.config.model.max_length - self.settings.score.bos - self.settings.score.eos
        stride = self.settings.lm_eval.rolling_stride or max(1, length // 2)
        if stride > length:
            raise InputError(f"setting rolling_stride = {stride}: exceeds the context of {length} tokens")
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.lm.tokenizer.encode(request.args[0])
            for start in range(0, len(tokens), stride):
                new = tokens[start : start + stride]
                windows.append((tokens[max(0, start + len(new) - length) : start], new))
                owners.append(owner)
        scores = self._score("loglikelihood_rolling", windows, range(len(windows)), settings)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [value for value, _ in scores])
        return totals.tolist()

    def _score(self, kind: str, pairs: list[tuple[list[int], list[int]]], groups: Sequence[Hashable],
               settings: ScoreConfig) -> list[tuple[float, bool]]:
        scorer = self.lm.scorer(**dataclasses.asdict(settings))

        def compute(indices: list[int]) -> Answers:
            before = scorer.evaluator.evaluations
            scores = scorer.score([pairs[index] for index in indices])
            return Answers([[score.value, bool(score.greedy)] for score in scores],
                           scorer.evaluator.evaluations - before)

        answers = self.work.run(kind, [Request(list(pair), group, len(pair[0]) + len(pair[1]))
                                       for pair, group in zip(pairs, groups, strict=True)], compute)
        return [(value, greedy) for value, greedy in answers]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts decoded from (context, generation arguments), each up to its first stop string."""
        del disable_tqdm
        texts: dict[int, str] = {}
        groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
        seen: dict[tuple, int] = collections.Counter()
        prompts, rows = [], []
        for index, request in enumerate(requests):
            options = self._options(request.task_name, request.args[1])
            prompt, chat = self._prompt(request.args[0], options)
            if chat:
                stop_ids = options.get("stop_ids", self.lm.config.decode.stop_ids)
                options["stop_ids"] = tuple(sorted({*stop_ids, *chat_format(self.lm.tokenizer).stop_ids}))
            groups.setdefault(json.dumps(options, sort_keys=True), (options, []))[1].append(index)
            # Random numbers depend on the prompt and, if it is repeated, on the number of the repeat.
            rows.append((zlib.crc32(np.array(prompt, np.int32).tobytes()) + seen[tuple(prompt)]) % 2**31)
            prompts.append(prompt)
            seen[tuple(prompt)] += 1
        for number, (key, (options, members)) in enumerate(groups.items()):
            work = [Request([key, rows[index], prompts[index]], index, len(prompts[index])) for index in members]
            texts |= zip(members, self._generate(f"generate_until-{number}", work, options), strict=True)
        return [texts[index] for index in range(len(requests))]

    def _generate(self, kind: str, work: list[Request], options: dict[str, Any]) -> list[str]:
        def compute(indices: list[int]) -> Answers:
            _, rows, prompts = zip(*(work[index].content for index in indices), strict=True)
            results = self.lm.generate(prompts, rows=rows, **options)
            answers = [self._answer(result, prompt) for result, prompt in zip(results, prompts, strict=True)]
            return Answers(answers, sum(result.nfe for result in results))

        return self.work.run(kind, work, compute)

    def _answer(self, result: Generation, prompt: Sequence[int] = ()) -> str:
        think_end = self.settings.lm_eval.think_end
        if not think_end:
            return result.text
        # A special token does not appear in the text.
        token = self.lm.tokenizer.special_tokens.get(think_end)
        if token is not None and token in result.tokens:
            last = len(result.tokens) - result.tokens[::-1].index(token)
            return result.text[len(self.lm.tokenizer.decode(result.tokens[:last], after=prompt)) :]
        return result.text.rpartition(think_end)[2]

    def _options(self, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Options of `LanguageModel.generate`; the evaluation's settings override the task's arguments.

        Raises InputError if an argument is invalid. Arguments without an effect here are named in a warning.
        """
        arguments = {key: value for key, value in arguments.items() if value is not None}
        if arguments.get("do_sample"):
            arguments = {"temperature": 1.0, **arguments}
        try:
            stop = handle_stop_sequences(arguments.pop("until", None), None)
            given = normalize_gen_kwargs(arguments, self.lm.config.decode.max_new_tokens)
            options: dict[str, Any] = {"max_new_tokens": given["max_gen_toks"], "temperature": 0.0}
            if given["do_sample"]:
                options["temperature"] = float(given["temperature"])
                options["top_k"] = max(0, int(given.get("top_k", 0)))  # some back ends write -1 for all
                options["top_p"] = float(given.get("top_p", 1.0))
            override(DecodeConfig(), "decode", options)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"task {task}: generation arguments {arguments}: {error}") from error
        for key in sorted(set(given) - _GENERATION_KEYS):
            logging.log_first_n(logging.WARNING, "generation argument %r of a task is ignored", 1, key)
        options |= self.settings.decode
        if options.get("end_of_thinking_boost") and "end_of_thinking_ids" not in options:
            text = self.settings.lm_eval.think_end or END_OF_THINKING
            token = self.lm.tokenizer.special_tokens.get(text)
            options["end_of_thinking_ids"] = tuple(self.lm.tokenizer.encode_behind(text) if token is None else [token])
        return {"stop": [] if self.settings.lm_eval.ignore_until else sorted({*stop} - {"", None}), **options}

    def _pair(self, request: Instance) -> tuple[list[int], list[int]]:
        context, candidate = request.args[:2]
        before, after = self._chat_ids(context), self.lm.tokenizer.encode_behind(candidate)
        if before is None:
            # White space at the end of a context belongs to the candidate, as in the harness.
            bare = context.rstrip()
            before, after = self.lm.encode_pair(bare, context[len(bare) :] + candidate)
        length = self.lm.config.model.max_length
        space = length - self.settings.score.bos - self.settings.score.eos
        where = f"task {request.task_name}, item {request.doc_id}: candidate {candidate[:40]!r}"
        if not after:
            raise InputError(f"{where} is empty")
        if len(after) > space:
            if self.settings.lm_eval.over_length == "error":
                raise InputError(f"{where} has {len(after)} tokens, which exceed the context of {length}; "
                                 "over_length=truncate drops its beginning, as lm-eval does")
            self.truncated["candidates"] += 1
            return [], after[-space:]
        return self._cut("loglikelihood", before, space - len(after)), after

    def _prompt(self, context: str, options: dict[str, Any]) -> tuple[list[int], bool]:
        """(Ids of the prompt, True if it is a conversation)."""
        ids = self._chat_ids(context)
        chat = ids is not None
        ids = self.lm.tokenizer.encode(context) if ids is None else ids
        bos = [self.lm.tokenizer.bos_id] * (self.settings.score.bos or not ids)
        length = self.lm.config.model.max_length
        # Reserve at most half of the context for the answer; the decoder cuts the budget if a prompt leaves less.
        budget = min(options.get("max_new_tokens", self.lm.config.decode.max_new_tokens), length // 2)
        return bos + self._cut("generate_until", ids, length - budget - len(bos)), chat

    def _cut(self, kind: str, ids: list[int], space: int) -> list[int]:
        if len(ids) <= space:
            return ids
        if self.settings.lm_eval.over_length == "error":
            raise InputError(f"a context of {len(ids)} tokens does not fit into {space}; over_length=truncate drops "
                             "its beginning")
        self.truncated[kind] += 1
        return ids[len(ids) - space :]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as marked text, which `_chat_ids` tokenizes."""
        if self.lm.tokenizer.chat_template is None and self.lm.config.sft.format == "none":
            raise InputError("--apply_chat_template: the checkpoint has no chat template and was not fine-tuned on "
                             "conversations; leave the flag out")
        return _CHAT + json.dumps([chat_history, add_generation_prompt], ensure_ascii=False)

    def _chat_ids(self, context: str) -> list[int] | None:
        """Ids of a conversation; None if the context is plain text."""
        if not context.startswith(_CHAT):
            return None
        messages, add_generation_prompt = json.loads(context.removeprefix(_CHAT))
        begun_answer = "" if add_generation_prompt else messages.pop()["content"]
        return encode_chat(self.lm.tokenizer, messages, True) + self.lm.tokenizer.encode_behind(begun_answer)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which the harness records."""
        return (self.lm.tokenizer.chat_template or DEFAULT_TEMPLATE) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer."""
        return self.lm.tokenizer.fingerprint

