"""Settings as text, presets as data."""

import re

import pytest

from illada_jax.errors import InputError
from illada_jax.evaluation import presets
from illada_jax.evaluation.settings import format_settings, make_settings, parse_settings


def test_settings_are_read_and_written():
    text = "method=monte_carlo,mc_num=4,bos=True,temperature=0.5,stop_ids=[7, 8],think_end=</think>"
    values = parse_settings(text)
    assert values == {"method": "monte_carlo", "mc_num": 4, "bos": True, "temperature": 0.5, "stop_ids": (7, 8),
                      "think_end": "</think>"}
    assert parse_settings(format_settings(values)) == values
    settings = make_settings(values)
    assert settings.score.mc_num == 4 and settings.decode == {"temperature": 0.5, "stop_ids": (7, 8)}
    assert settings.lm_eval.think_end == "</think>"
    shared = make_settings({"cfg_scale": 1.0, "seed": 3, "batch_size": 2})
    assert (shared.score.cfg_scale, shared.score.seed, shared.score.batch_size) == (1.0, 3, 2)
    assert shared.decode == {"cfg_scale": 1.0, "seed": 3, "batch_size": 2}


@pytest.mark.parametrize("text, message", [
    ("metod=confidence", "setting 'metod': unknown; did you mean 'method'"),
    ("method", "'method' is not key=value"),
    ("mc_num=many", "mc_num = 'many': must be of type int"),
    ("block_length=0", "block_length = 0: must be greater than 0"),
    ("over_length=cut", "over_length = 'cut': must be one of"),
])
def test_bad_settings(text, message):
    with pytest.raises(InputError) as caught:
        make_settings(parse_settings(text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_cell_of_the_papers_tables_is_there():
    """Targets by hand from the tables: each published number of the three models that run has a preset."""
    targets = {preset.name: preset.target for preset in presets.PRESETS.values()}
    by_hand = {
        "illada-base/mmlu": 74.8, "illada-base/bbh": 71.3, "illada-base/arc-challenge": 60.8,
        "illada-base/hellaswag": 76.6, "illada-base/gsm8k": 81.9, "illada-base/math": 38.4,
        "illada-base/humaneval": 50.0, "illada-base/mbpp": 57.8, "illada-base/piqa": 78.5,
        "illada-base/piqa-likelihood": 77.2, "illada-base/arc-challenge-likelihood": 60.2,
        "illada-base/hellaswag-likelihood": 74.3, "illada-instruct/mmlu": 71.6, "illada-instruct/mmlu-pro": 52.3,
        "illada-instruct/mmlu-redux": 76.4, "illada-instruct/gsm8k": 89.0, "illada-instruct/math": 56.7,
        "illada-instruct/humaneval": 65.9, "illada-instruct/mbpp": 58.0, "llada-base/mmlu": 65.9,
        "llada-base/bbh": 49.7, "llada-base/arc-challenge": 45.9, "llada-base/hellaswag": 70.5,
        "llada-base/gsm8k": 70.3, "llada-base/math": 31.4, "llada-base/humaneval": 35.4, "llada-base/mbpp": 40.0,
        "llada-instruct/mmlu": 65.5, "llada-instruct/mmlu-pro": 37.0, "llada-instruct/mmlu-redux": 68.9,
        "llada-instruct/gsm8k": 77.5, "llada-instruct/math": 42.2, "llada-instruct/humaneval": 49.4,
        "llada-instruct/mbpp": 41.0, "qwen2.5-base/mmlu": 71.9, "qwen2.5-base/bbh": 63.9,
        "qwen2.5-base/arc-challenge": 51.5, "qwen2.5-base/hellaswag": 79.0, "qwen2.5-base/gsm8k": 78.9,
        "qwen2.5-base/math": 41.1, "qwen2.5-base/humaneval": 56.7, "qwen2.5-base/mbpp": 63.6,
        "qwen2.5-instruct/mmlu": 76.6, "qwen2.5-instruct/mmlu-pro": 56.3, "qwen2.5-instruct/mmlu-redux": 75.7,
        "qwen2.5-instruct/gsm8k": 91.6, "qwen2.5-instruct/math": 75.5, "qwen2.5-instruct/humaneval": 84.8,
        "qwen2.5-instruct/mbpp": 79.2,
    }
    assert {name: targets[name] for name in by_hand} == by_hand
    # Where script and paper differ, both are there.
    for benchmark, paper, script in (("mmlu", 4, 3), ("mmlu-redux", 3, 4)):
        one, other = (presets.PRESETS[f"illada-instruct/{benchmark}{variant}"] for variant in ("", "-script"))
        assert (one.settings["max_new_tokens"], other.settings["max_new_tokens"]) == (paper, script)
        assert one.target == other.target and "script" in one.note and "paper" in other.note


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_presets_are_valid(preset):
    settings = make_settings(preset.settings)
    assert preset.name in preset.command or preset.checkpoint in preset.command
    if preset.settings.get("max_new_tokens"):
        # One token per step: as many steps as tokens, which follows from the block length alone.
        assert "steps_per_block" not in settings.decode
    assert parse_settings(format_settings(preset.settings)) == dict(preset.settings)


def test_settings_named_in_the_papers():
    get = lambda name: make_settings(presets.PRESETS[name].settings)  # noqa: E731
    for name in ("arc-challenge", "hellaswag"):
        score = get(f"illada-base/{name}").score
        assert (score.method, score.bos, score.eos, score.tokens_per_step) == ("confidence", True, True, 1)
    assert get("illada-base/mmlu").score.mc_num == 1
    assert get("illada-base/gsm8k").decode["block_length"] == 32
    thinking = get("illada-instruct/humaneval").decode
    assert (thinking["end_of_thinking_boost"], thinking["end_of_thinking_power"]) == (100, 1)
    assert thinking["max_new_tokens"] == 2048
    assert get("illada-instruct/math").decode["end_of_thinking_power"] == 3
    assert get("illada-instruct/mbpp").decode["block_length"] == 16
    assert get("llada-base/hellaswag-guided").score.cfg_scale == 0.5


def test_the_list_shows_all_and_similar_names_are_suggested():
    table = presets.list_presets()
    for preset in presets.PRESETS.values():
        assert f"| {preset.name} |" in table
    command = "lm_eval --model hf .*Qwen2.5-7B,.* --tasks gsm8k_cot --num_fewshot 8"
    assert re.search(f"qwen2.5-base/gsm8k .*`{command}`", table)
    assert "dream-base: mmlu 69.5" in table
    with pytest.raises(InputError, match="did you mean 'illada-instruct/math'"):
        presets.find_preset("illada-instruct/maths")
