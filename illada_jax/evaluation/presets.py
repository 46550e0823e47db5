"""The settings behind every cell of the papers' tables, with the published numbers.

Sources: the iLLaDA paper (tables of Base and Instruct models, ablation of scoring, evaluation settings), the LLaDA
paper with its evaluation notes, and the published evaluation scripts of both. Where script and paper differ, there is a
preset for each and `note` says so. All presets write one token per step. The papers do not name a metric marked †; it
is the metric of lm-eval that gives Qwen2.5's published number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from illada_jax.errors import InputError
from illada_jax.evaluation.settings import did_you_mean, format_settings


@dataclass(frozen=True)
class Preset:
    """The setup of one published number.

    Attributes:
      name: MODEL/BENCHMARK, or MODEL/BENCHMARK-VARIANT.
      checkpoint: Hub id of the official weights.
      task, num_fewshot, metric: task of lm-eval, examples in the prompt, and the metric to compare.
      local_task: task with the same items for use offline (`experiments/tasks/prepare.py`); empty if there is none.
      runs_programs: answers are programs to run.
      settings: keys and values for `settings.make_settings`.
      chat: applies the chat template, with few-shot examples as turns.
      target: the published number in per cent; None if there is none.
      note: differences from the published setup, and their reasons.
    """

    name: str
    checkpoint: str
    task: str
    num_fewshot: int
    metric: str
    local_task: str
    runs_programs: bool
    settings: Mapping[str, Any]
    chat: bool
    target: float | None
    note: str

    @property
    def command(self) -> str:
        """The command that reproduces the number."""
        if self.autoregressive:
            flags = " --apply_chat_template --fewshot_as_multiturn True" if self.chat else ""
            flags += f" --num_fewshot {self.num_fewshot}"
            flags += " --confirm_run_unsafe_code" if self.runs_programs else ""
            model = f"--model hf --model_args pretrained={self.checkpoint},dtype=bfloat16"
            return f"lm_eval {model} --tasks {self.task}{flags}"
        code = " --allow_code_execution=sandbox" if self.runs_programs else ""
        return f"python -m illada_jax.evaluate --checkpoint={self.checkpoint} --preset={self.name}{code}"

    @property
    def autoregressive(self) -> bool:
        """True if lm-eval's own back end runs the model."""
        return self.checkpoint.startswith("Qwen/")


# Published numbers: iLLaDA 8B, LLaDA 8B, Dream 7B, Qwen2.5 7B.
MODELS = ("illada", "llada", "dream", "qwen2.5")
BASE = {
    "mmlu": (74.8, 65.9, 69.5, 71.9), "bbh": (71.3, 49.7, 57.9, 63.9), "arc-challenge": (60.8, 45.9, 59.8, 51.5),
    "hellaswag": (76.6, 70.5, 73.3, 79.0), "gsm8k": (81.9, 70.3, 77.2, 78.9), "math": (38.4, 31.4, 39.6, 41.1),
    "humaneval": (50.0, 35.4, 57.9, 56.7), "mbpp": (57.8, 40.0, 56.2, 63.6),
}
INSTRUCT = {
    "mmlu": (71.6, 65.5, 67.0, 76.6), "mmlu-pro": (52.3, 37.0, 43.3, 56.3), "mmlu-redux": (76.4, 68.9, 76.3, 75.7),
    "gsm8k": (89.0, 77.5, 81.0, 91.6), "math": (56.7, 42.2, 39.2, 75.5), "humaneval": (65.9, 49.4, 55.5, 84.8),
    "mbpp": (58.0, 41.0, 58.8, 79.2),
}

# Benchmark: (task of lm-eval, examples, metric, local task, runs programs).
_BASE_TASKS = {
    "mmlu": ("mmlu", 5, "acc", "local_mmlu", False),
    "bbh": ("bbh", 3, "exact_match", "", False),
    "arc-challenge": ("arc_challenge", 0, "acc_norm †", "local_arc_challenge", False),
    "hellaswag": ("hellaswag", 0, "acc_norm †", "local_hellaswag", False),
    "piqa": ("piqa", 0, "acc_norm †", "local_piqa", False),
    "gsm8k": ("gsm8k_cot", 8, "exact_match †", "local_gsm8k", False),
    "math": ("minerva_math", 4, "math_verify †", "local_math", False),
    "humaneval": ("humaneval", 0, "pass@1", "local_humaneval", True),
    "mbpp": ("mbpp", 3, "pass_at_1", "local_mbpp", True),
}
_INSTRUCT_TASKS = {
    "mmlu": ("mmlu_generative", 5, "exact_match", "local_mmlu_generative", False),
    "mmlu-pro": ("mmlu_pro", 0, "exact_match", "", False),
    "mmlu-redux": ("mmlu_redux_generative", 5, "exact_match", "", False),
    "gsm8k": ("gsm8k_cot_zeroshot", 0, "exact_match †", "local_gsm8k_zeroshot", False),
    "math": ("minerva_math", 0, "math_verify †", "local_math", False),
    "humaneval": ("humaneval_instruct", 0, "pass@1", "local_humaneval_instruct", True),
    "mbpp": ("mbpp_instruct", 0, "pass_at_1", "local_mbpp_instruct", True),
}


_CONFIDENCE = {"method": "confidence", "bos": True, "eos": True}


def _likelihood(mc_num: int, **others: Any) -> dict[str, Any]:
    return {"method": "monte_carlo", "mc_num": mc_num, **others}


def _blocks(max_new_tokens: int, block_length: int, **others: Any) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "length": "variable", "block_length": block_length,
            "confidence": "low_confidence", "temperature": 0.0, **others}


def _fixed(max_new_tokens: int, block_length: int | None = None, **others: Any) -> dict[str, Any]:
    return _blocks(max_new_tokens, block_length or max_new_tokens, **{"length": "fixed", **others})


def _thinking(max_new_tokens: int, block_length: int = 32, power: float = 3.0) -> dict[str, Any]:
    """Stop strings are ignored: a thought may contain them."""
    return _blocks(max_new_tokens, block_length, end_of_thinking_boost=100.0, end_of_thinking_power=power,
                   ignore_until=True, think_end="</think>")


_CHOICE = ("arc-challenge", "hellaswag", "piqa")
_REASONING = "same items as the published task, whose prompt lm-eval does not have"
_ILLADA_BASE = {
    "mmlu": (_likelihood(1, bos=True, eos=True), ""),
    "arc-challenge": (_CONFIDENCE, ""),
    "hellaswag": (_CONFIDENCE, ""),
    "piqa": (_CONFIDENCE, "ablation of scoring"),
    **{f"{name}-likelihood": (_likelihood(128, bos=True, eos=True), "ablation of scoring") for name in _CHOICE},
    **dict.fromkeys(("bbh", "gsm8k", "math", "mbpp"), (_blocks(1024, 32), "")),
    "humaneval": (_fixed(512), "one block of 512"),
}
_SCORING_ABLATION = {"arc-challenge-likelihood": 60.2, "hellaswag-likelihood": 74.3, "piqa": 78.5,
                     "piqa-likelihood": 77.2}
_ILLADA_INSTRUCT = {
    "mmlu": (_fixed(4), "4 tokens as in the paper; the published script has 3: see mmlu-script"),
    "mmlu-script": (_fixed(3), "3 tokens as in the published script; the paper has 4"),
    "mmlu-redux": (_fixed(3), "3 tokens as in the paper; the published script has 4: see mmlu-redux-script"),
    "mmlu-redux-script": (_fixed(4), "4 tokens as in the published script; the paper has 3"),
    "mmlu-pro": (_thinking(4096), _REASONING),
    "gsm8k": (_thinking(2048), _REASONING),
    "math": (_thinking(4096), ""),
    "humaneval": (_thinking(2048, power=1.0), _REASONING),
    "mbpp": (_thinking(2048, 16), _REASONING),
}
_WITH_GUIDANCE = "with guidance, which the LLaDA paper's table omits"
_LLADA_BASE = {
    "mmlu": (_likelihood(1), ""),
    **dict.fromkeys(_CHOICE, (_likelihood(128), "")),
    **{f"{name}-guided": (_likelihood(128, cfg_scale=0.5), _WITH_GUIDANCE) for name in _CHOICE},
    **dict.fromkeys(("bbh", "gsm8k", "math", "humaneval", "mbpp"), (_fixed(1024), "")),
}
_LLADA_OWN = {"arc-challenge-guided": 47.9, "hellaswag-guided": 72.5, "piqa": 73.6, "piqa-guided": 74.4}
_LAST = {"confidence_eos_eot_inf": True, "eot_id": 126348}
_LLADA_INSTRUCT = {
    "mmlu": (_fixed(3), ""),
    "mmlu-pro": (_fixed(256), ""),
    "mmlu-redux": (_fixed(3), "settings of MMLU, as LLaDA's are not published"),
    "gsm8k": (_fixed(256, 8), "blocks; the LLaDA paper reports 78.6"),
    "gsm8k-diffusion": (_fixed(512, **_LAST), "pure diffusion"),
    "math": (_fixed(512, 64), "blocks"),
    "math-diffusion": (_fixed(512, **_LAST), "pure diffusion"),
    "humaneval": (_fixed(512, logits_eos_inf=True), ""),
    "mbpp": (_fixed(256, **_LAST), ""),
}
_LLADA_DIFFUSION = {"gsm8k-diffusion": 69.4, "math-diffusion": 31.9}


def _presets(model: str, checkpoint: str, rows: dict[str, tuple[dict[str, Any], str]],
             others: dict[str, float] | None = None) -> Iterator[tuple[str, Preset]]:
    """Presets by name; `others` has published numbers that are not in the tables."""
    chat = model.endswith("-instruct")
    tasks, published = (_INSTRUCT_TASKS, INSTRUCT) if chat else (_BASE_TASKS, BASE)
    for row, (settings, note) in rows.items():
        # A variant's name begins with its benchmark.
        benchmark = max((name for name in tasks if row == name or row.startswith(f"{name}-")), key=len)
        target = (others or {}).get(row)
        if target is None and benchmark in published:
            target = published[benchmark][MODELS.index(model.partition("-")[0])]
        yield f"{model}/{row}", Preset(f"{model}/{row}", checkpoint, *tasks[benchmark], settings, chat, target, note)


PRESETS: dict[str, Preset] = dict([
    *_presets("illada-base", "GSAI-ML/iLLaDA-8B-Base", _ILLADA_BASE, _SCORING_ABLATION),
    *_presets("illada-instruct", "GSAI-ML/iLLaDA-8B-Instruct", _ILLADA_INSTRUCT),
    *_presets("llada-base", "GSAI-ML/LLaDA-8B-Base", _LLADA_BASE, _LLADA_OWN),
    *_presets("llada-instruct", "GSAI-ML/LLaDA-8B-Instruct", _LLADA_INSTRUCT, _LLADA_DIFFUSION),
    *_presets("qwen2.5-base", "Qwen/Qwen2.5-7B", dict.fromkeys(BASE, ({}, ""))),
    *_presets("qwen2.5-instruct", "Qwen/Qwen2.5-7B-Instruct", dict.fromkeys(INSTRUCT, ({}, ""))),
])


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises InputError with similar names."""
    if name not in PRESETS:
        raise InputError(f"--preset={name}: unknown{did_you_mean(name, PRESETS)} (--list_presets prints all)")
    return PRESETS[name]


def list_presets() -> str:
    """All presets as a Markdown table; autoregressive models have a command in place of settings."""
    lines = ["| preset | task of lm-eval (local items) | shots | settings | metric | published |",
             "|---|---|---|---|---|---|"]
    for preset in PRESETS.values():
        task = f"{preset.task} ({preset.local_task})" if preset.local_task else preset.task
        settings = f"`{preset.command}`" if preset.autoregressive else format_settings(preset.settings)
        target = "" if preset.target is None else f"{preset.target:.1f}"
        note = f" — {preset.note}" if preset.note else ""
        cells = (preset.name, task, str(preset.num_fewshot), settings + note, preset.metric, target)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Also published, but without presets here: Dream 7B, which predicts the next position."]
    for kind, table in (("base", BASE), ("instruct", INSTRUCT)):
        cells = [f"{name} {row[MODELS.index('dream')]}" for name, row in table.items()]
        lines.append(f"dream-{kind}: {', '.join(cells)}")
    return "\n".join(lines)
