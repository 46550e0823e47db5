"""The adapter of a language model to lm-evaluation-harness (extra: eval).

In float32 the result of a request depends on the request and the settings only, not on batches, order, limits, other
tasks or the number of processes.
"""

import collections
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from illada_jax.data.tokenizers.chat import DEFAULT_TEMPLATE, chat_format, encode_chat
from illada_jax.errors import InputError
from illada_jax.evaluation.settings import Settings
from illada_jax.evaluation.work import Answers, Request, Work

# Marks a conversation: the harness passes contexts as text, but text must never become special tokens.
_CHAT = "\ue000chat:"
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


class LmEvalModel(LM):
    """A language model behind the harness's interface.

    Every process gets all requests and computes its share, so the harness sees a single process (rank 0 of 1).

    Attributes:
      truncated: number of contexts whose beginning was dropped, by kind of request.
    """

    def __init__(self, lm: Any, settings: Settings | None = None, work: Work | None = None):
        """Wraps a model.

        Args:
          lm: an `illada_jax.LanguageModel`.
          settings: of scorers, sampler and adapter.
          work: computes the requests, and keeps the finished ones.
        """
        super().__init__()
        self.lm = lm
        self.settings = settings or Settings()
        self.work = work or Work()
        self.truncated: dict[str, int] = collections.Counter()

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Score in nats, True if greedy decoding writes the candidate) of (context, candidate) texts.

        Only method=confidence computes the second; with monte_carlo it is False.

        Raises:
          InputError: a candidate is empty or does not fit into the context.
        """
        del disable_tqdm
        scorer = self.lm.scorer(**_fields(self.settings.score))
        pairs = [self._pair(request) for request in requests]

        def compute(indices: list[int]) -> Answers:
            before = scorer.evaluator.evaluations
            scores = scorer.score([pairs[index] for index in indices])
            return Answers([[score.value, bool(score.greedy)] for score in scores],
                           scorer.evaluator.evaluations - before)

        answers = self.work.run("loglikelihood", [
            Request(list(pair), (request.task_name, request.doc_id), len(pair[0]) + len(pair[1]))
            for request, pair in zip(requests, pairs, strict=True)], compute)
        return [(value, greedy) for value, greedy in answers]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats, always by Monte-Carlo: confidence scores are not likelihoods.

        A text is cut into windows of `rolling_stride` new tokens, each after as many of the earlier tokens as fit.
        Every window's score is a lower bound on its log-likelihood, so the sum is one on the text's.

        Raises:
          InputError: `rolling_stride` exceeds the context.
        """
        del disable_tqdm
        draws = {"method": "monte_carlo", "mc_num": self.settings.lm_eval.rolling_mc_num}
        scorer = self.lm.scorer(**{**_fields(self.settings.score), **draws})
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

        def compute(indices: list[int]) -> Answers:
            before = scorer.evaluator.evaluations
            scores = scorer.score([windows[index] for index in indices])
            return Answers([score.value for score in scores], scorer.evaluator.evaluations - before)

        answers = self.work.run("loglikelihood_rolling", [
            Request(list(window), index, len(window[0]) + len(window[1])) for index, window in enumerate(windows)],
            compute)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, answers)
        return totals.tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts decoded from (context, generation arguments), each up to its first stop string."""
        del disable_tqdm
        texts: list[str] = [""] * len(requests)
        groups = collections.defaultdict(list)
        seen: dict[tuple, int] = collections.Counter()
        rows = []
        for index, request in enumerate(requests):
            settings, stop = self._generation(request.args[1])
            prompt, chat = self._prompt(request.args[0], settings)
            groups[json.dumps([settings, stop, chat], sort_keys=True)].append((index, prompt))
            # Random numbers depend on the prompt and, if it is repeated, on the number of the repeat.
            rows.append((zlib.crc32(np.array(prompt, np.int32).tobytes()) + seen[tuple(prompt)]) % 2**31)
            seen[tuple(prompt)] += 1
        for number, (key, members) in enumerate(groups.items()):
            settings, stop, chat = json.loads(key)
            settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
            if chat:
                ends = {chat_format(self.lm.tokenizer).end_id}
                ends |= {*settings.get("stop_ids", self.lm.config.decode.stop_ids)}
                settings["stop_ids"] = tuple(sorted(ends))
            answers = self._generate(f"generate_until-{number}", key, members, rows, settings, stop)
            for (index, _), answer in zip(members, answers, strict=True):
                texts[index] = answer
        return texts

    def _generate(self, kind: str, key: str, members: list[tuple[int, list[int]]], rows: list[int],
                  settings: dict[str, Any], stop: list[str]) -> list[str]:
        def compute(positions: list[int]) -> Answers:
            results = dict(self.lm.as_completed([members[position][1] for position in positions], stop=stop,
                                                rows=[rows[members[position][0]] for position in positions],
                                                **settings))
            ordered = [results[place] for place in range(len(positions))]
            return Answers([self._answer(result) for result in ordered], sum(result.nfe for result in ordered))

        return self.work.run(kind, [Request([key, rows[index], prompt], index, len(prompt))
                                    for index, prompt in members], compute)

    def _answer(self, result: Any) -> str:
        think_end = self.settings.lm_eval.think_end
        if not think_end:
            return result.text
        # A special token does not show in the text.
        token = self.lm.tokenizer.special_tokens.get(think_end)
        if token is not None and token in result.tokens:
            last = len(result.tokens) - result.tokens[::-1].index(token)
            return self.lm.tokenizer.decode(result.tokens[last:])
        return result.text.rpartition(think_end)[2]

    def _generation(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """(Settings of the sampler, stop strings); the evaluation's settings override the task's arguments."""
        for key in sorted(set(arguments) - _GENERATION_KEYS):
            logging.log_first_n(logging.WARNING, "generation argument %r of a task is ignored", 1, key)
        settings: dict[str, Any] = {"temperature": 0.0}
        if "max_gen_toks" in arguments:
            settings["max_new_tokens"] = int(arguments["max_gen_toks"])
        if arguments.get("do_sample"):
            settings["temperature"] = float(arguments.get("temperature", 1.0))
            settings["top_p"] = float(arguments.get("top_p", 1.0))
        settings |= self.settings.decode
        if settings.get("end_of_thinking_boost") and "end_of_thinking_ids" not in settings:
            settings["end_of_thinking_ids"] = self._think_end_ids()
        until = arguments.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        if self.settings.lm_eval.ignore_until:
            stop = []
        return settings, sorted({text for text in stop if text})

    def _think_end_ids(self) -> list[int]:
        text = self.settings.lm_eval.think_end or "</think>"
        token = self.lm.tokenizer.special_tokens.get(text)
        return self.lm.tokenizer.encode(text) if token is None else [token]

    def _pair(self, request: Instance) -> tuple[list[int], list[int]]:
        context, candidate = request.args[:2]
        ids = self._chat_ids(context)
        if ids is not None:
            before, after = ids, self.lm.tokenizer.encode(candidate)
        else:
            # White space at the end of a context belongs to the candidate, as in the harness.
            bare = context.rstrip()
            before, after = self.lm.encode_pair(bare, context[len(bare) :] + candidate)
        space = self.lm.config.model.max_length - self.settings.score.bos - self.settings.score.eos - len(after)
        if not after or space < 0:
            what = "is empty" if not after else (f"has {len(after)} tokens, which exceed the context of "
                                                 f"{self.lm.config.model.max_length}")
            raise InputError(f"task {request.task_name}, item {request.doc_id}: candidate {candidate[:40]!r} {what}")
        return self._cut("loglikelihood", before, space), after

    def _prompt(self, context: str, settings: dict[str, Any]) -> tuple[list[int], bool]:
        """(Ids of the prompt, True if it is a conversation)."""
        ids = self._chat_ids(context)
        chat = ids is not None
        ids = self.lm.tokenizer.encode(context) if ids is None else ids
        bos = [self.lm.tokenizer.bos_id] * (self.settings.score.bos or not ids)
        length = self.lm.config.model.max_length
        # Reserve at most half of the context for the answer; the decoder cuts the budget if a prompt leaves less.
        budget = min(settings.get("max_new_tokens", self.lm.config.decode.max_new_tokens), length // 2)
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
        if add_generation_prompt:
            return encode_chat(self.lm.tokenizer, messages, True)
        # The last message begins the answer.
        return encode_chat(self.lm.tokenizer, messages[:-1], True) + self.lm.tokenizer.encode(messages[-1]["content"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which the harness records."""
        return (self.lm.tokenizer.chat_template or DEFAULT_TEMPLATE) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer."""
        return self.lm.tokenizer.fingerprint


def _fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}
