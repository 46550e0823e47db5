"""A language model as lm-evaluation-harness wants it (extra: eval).

Law: what a request gets depends on the request and the settings alone (float32), not on batches, order, limits, other
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

# What a chat template gives: the harness hands contexts around as text, but special tokens must not come from text.
_CHAT = "\ue000chat:"
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


class LmEvalModel(LM):
    """The adapter.

    It takes all requests on every process and spreads them itself, so the harness sees one process (rank 0 of 1).

    Attributes:
      truncated: contexts whose beginning was dropped, by kind of request.
    """

    def __init__(self, lm: Any, settings: Settings | None = None, work: Work | None = None):
        """Wraps a model.

        Args:
          lm: an `illada_jax.LanguageModel`.
          settings: the knobs.
          work: where finished requests are kept.
        """
        super().__init__()
        self.lm = lm
        self.settings = settings or Settings()
        self.work = work or Work()
        self.truncated: dict[str, int] = collections.Counter()

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Score in nats, greedy decoding writes the candidate) of (context, candidate) texts.

        `greedy` is known by method=confidence only, and False by monte_carlo.

        Raises:
          InputError: a candidate is empty or longer than the context.
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
        """Log-likelihoods of whole texts in nats, by Monte-Carlo whatever the method (a likelihood is asked for).

        A text is cut into windows of `rolling_stride` new tokens; before them stand as many of the earlier tokens as
        the context holds, visible. The sum over windows is a lower bound on the log-likelihood of the text, as each
        window's is.
        """
        del disable_tqdm
        draws = {"method": "monte_carlo", "mc_num": self.settings.lm_eval.rolling_mc_num}
        scorer = self.lm.scorer(**{**_fields(self.settings.score), **draws})
        room = self.lm.config.model.max_length - self.settings.score.bos - self.settings.score.eos
        stride = self.settings.lm_eval.rolling_stride or max(1, room // 2)
        if stride > room:
            raise InputError(f"setting rolling_stride = {stride}: exceeds the context of {room} tokens")
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.lm.tokenizer.encode(request.args[0])
            for start in range(0, len(tokens), stride):
                new = tokens[start : start + stride]
                windows.append((tokens[max(0, start + len(new) - room) : start], new))
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
        """What the model writes after (context, generation arguments), up to the first stop string."""
        del disable_tqdm
        texts: list[str] = [""] * len(requests)
        groups = collections.defaultdict(list)
        seen: dict[tuple, int] = collections.Counter()
        rows = []
        for index, request in enumerate(requests):
            settings, stop = self._generation(request.args[1])
            prompt, chat = self._prompt(request.args[0], settings)
            groups[json.dumps([settings, stop, chat], sort_keys=True)].append((index, prompt))
            # A row draws by its prompt, and repeats of one prompt by their number.
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
        # Where it is a special token, the text does not show it.
        token = self.lm.tokenizer.special_tokens.get(think_end)
        if token is not None and token in result.tokens:
            last = len(result.tokens) - result.tokens[::-1].index(token)
            return self.lm.tokenizer.decode(result.tokens[last:])
        return result.text.rpartition(think_end)[2]

    def _generation(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """(Settings of the sampler, stop strings) of a task's arguments; the evaluation's own settings go first."""
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
            # Blanks at the end of a context belong to the candidate, as the harness has it.
            bare = context.rstrip()
            before, after = self.lm.encode_pair(bare, context[len(bare) :] + candidate)
        room = self.lm.config.model.max_length - self.settings.score.bos - self.settings.score.eos - len(after)
        if not after or room < 0:
            what = "is empty" if not after else (f"has {len(after)} tokens, which exceed the context of "
                                                 f"{self.lm.config.model.max_length}")
            raise InputError(f"task {request.task_name}, item {request.doc_id}: candidate {candidate[:40]!r} {what}")
        return self._cut("loglikelihood", before, room), after

    def _prompt(self, context: str, settings: dict[str, Any]) -> tuple[list[int], bool]:
        """(Ids of the prompt, whether it is a conversation)."""
        ids = self._chat_ids(context)
        chat = ids is not None
        ids = self.lm.tokenizer.encode(context) if ids is None else ids
        bos = [self.lm.tokenizer.bos_id] * (self.settings.score.bos or not ids)
        length = self.lm.config.model.max_length
        # A long answer takes at most half of the context; the decoder cuts its budget to what a long prompt leaves.
        budget = min(settings.get("max_new_tokens", self.lm.config.decode.max_new_tokens), length // 2)
        return bos + self._cut("generate_until", ids, length - budget - len(bos)), chat

    def _cut(self, kind: str, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        if self.settings.lm_eval.over_length == "error":
            raise InputError(f"a context of {len(ids)} tokens does not fit: there is room for {room} "
                             f"(setting over_length='truncate' drops its beginning)")
        self.truncated[kind] += 1
        return ids[len(ids) - room :]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation, marked as one: its ids are made when it is used."""
        if self.lm.tokenizer.chat_template is None and self.lm.config.sft.format == "none":
            raise InputError("chat template: this checkpoint has none, and it was not fine-tuned on conversations; "
                             "evaluate it without --apply_chat_template")
        return _CHAT + json.dumps([chat_history, add_generation_prompt], ensure_ascii=False)

    def _chat_ids(self, context: str) -> list[int] | None:
        """The ids of a conversation; None if the context is plain text."""
        if not context.startswith(_CHAT):
            return None
        messages, add_generation_prompt = json.loads(context.removeprefix(_CHAT))
        if add_generation_prompt:
            return encode_chat(self.lm.tokenizer, messages, True)
        # The last message is the beginning of the answer that is asked for.
        return encode_chat(self.lm.tokenizer, messages[:-1], True) + self.lm.tokenizer.encode(messages[-1]["content"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the records of the harness."""
        return (self.lm.tokenizer.chat_template or DEFAULT_TEMPLATE) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer."""
        return self.lm.tokenizer.fingerprint


def _fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}
