"""The Python interface and the generate command, on a small random model."""

import dataclasses
import gzip
import importlib.util
import json
import re
import signal

import jax
import numpy as np
import pytest
from absl import flags

from illada_jax import api, generate, model
from illada_jax.config import Config, DataConfig, DecodeConfig, ModelConfig
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.errors import InputError
from tests.util import random_params

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size + 7, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1,
                    head_dim=8, d_ff=32, max_length=128)
CONFIG = Config(model=MODEL, data=DataConfig(length=64), decode=DecodeConfig(
    max_new_tokens=16, block_length=8, steps_per_block=4, suppressed_ids=(*range(128, 256),)))


@pytest.fixture(scope="module")
def lm():
    return api.LanguageModel(CONFIG, random_params(MODEL, scale=3.0), TOKENIZER)


def test_texts_and_ids_give_the_same(lm):
    text, ids = lm.generate(["abc", "hello world"]), lm.generate([TOKENIZER.encode("abc"), np.array(TOKENIZER.encode(
        "hello world"))])
    assert text == ids
    for result in text:
        assert result.text == TOKENIZER.decode(result.tokens)
        assert len(result.tokens) == len(result.reveal_step) == len(result.log_probs)
        assert all(value <= 0 for value in result.log_probs)


def test_settings_override_the_checkpoint(lm):
    assert lm.generate(["abc"], max_new_tokens=5)[0].nfe <= 4 + 1
    assert lm.generate(["abc"], block_length=2, max_new_tokens=4)[0].nfe <= 4  # steps follow the block length
    assert lm.generate(["abc"], cache="dual", cache_refresh=1) == lm.generate(["abc"])


def test_rows_may_have_settings_of_their_own(lm):
    changes = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 0.4, "max_new_tokens": 9, "stop_ids": (101, 116)}]
    together = lm.generate(["abc", "d", "ef"], top_k=20, row_settings=changes, stop=["<eos>"])
    for row, (prompt, each) in enumerate(zip(["abc", "d", "ef"], changes, strict=True)):
        alone = lm.generate([prompt], top_k=20, rows=[row], stop=["<eos>"], **each)[0]
        assert (together[row].tokens, together[row].reveal_step) == (alone.tokens, alone.reveal_step)
    with pytest.raises(InputError, match=r"prompt 1: config.decode.reveal = 'threshold': must be 'schedule', as for"):
        lm.generate(["a", "b"], row_settings=[{}, {"reveal": "threshold"}])
    with pytest.raises(InputError, match="max_new_tokens: not allowed in infilling"):
        lm.infill(["a[[mask:1]]"], row_settings=[{"max_new_tokens": 3}])


def test_chat_with_reuse_computes_what_is_new(lm):
    turns, widths = [{"role": "user", "content": "What is it?"}], []
    logits_fn = lm.logits_fn

    def counted(tokens_BT, *inputs):
        jax.debug.callback(lambda: widths.append(tokens_BT.shape[1]))
        return logits_fn(tokens_BT, *inputs)

    counting = api.LanguageModel(CONFIG, lm.params, TOKENIZER)
    counting.logits_fn = jax.tree_util.Partial(counted)
    settings = {"max_new_tokens": 4, "block_length": 4, "steps_per_block": 2}
    first = counting.chat(turns, reuse=True, **settings)
    assert first.tokens == lm.chat(turns, cache="append", **settings).tokens
    for _ in range(2):
        turns = [*turns, {"role": "assistant", "content": first.text}, {"role": "user", "content": "ab"}]
        del widths[:]
        counting.chat(turns, reuse=True, **settings)
        jax.effects_barrier()
        assert widths == [64, 4, 4]  # the least canvas holds what is new
    with pytest.raises(InputError, match="reuse: needs cache = 'append', not 'dual'"):
        lm.chat(turns, reuse=True, cache="dual")


def test_the_boost_writes_end_of_thinking(lm):
    """The boost promotes the tokenizer's own ids, strongly enough to write them one after the other at once."""
    settings = {"max_new_tokens": 16, "block_length": 16, "end_of_thinking_boost": 1e6, "end_of_thinking_power": 0.0}
    result = lm.generate(["abc"], **settings)[0]
    assert "</think>" in result.text and "</think>" not in lm.generate(["abc"])[0].text
    ids = tuple(TOKENIZER.encode("</think>"))
    assert result == lm.generate(["abc"], end_of_thinking_ids=ids, **settings)[0]


def test_given_text_survives_infilling(lm):
    texts = ["a [[mask:3]] b ü[[mask:1]]", "[[mask:20]]", "plain [[mask:2]]\n"]
    first, second, third = lm.infill(texts)
    assert first.text.startswith("a ") and " b ü" in first.text and third.text.startswith("plain ")
    assert third.text.endswith("\n") and first.stopped_by == "filled"
    assert second.nfe == 4 + 4 + 4
    assert sum(step >= 0 for step in first.reveal_step) == 4


def test_stop_strings_end_the_text(lm):
    free = lm.generate(["abc", "xyz"], max_new_tokens=32)
    stop = free[0].text[9:11]
    stopped = lm.generate(["abc", "xyz"], max_new_tokens=32, stop=[stop])
    assert stopped[0].text == free[0].text[: free[0].text.index(stop)]
    assert stopped[0].stopped_by == "stop_string" and stopped[0].nfe < free[0].nfe
    assert TOKENIZER.decode(stopped[0].tokens) == stopped[0].text + stop
    assert stop in free[1].text or stopped[1] == free[1]


def test_logits_are_those_of_the_model(lm):
    tokens_BL = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 9))
    ones_BL = np.ones_like(tokens_BL)
    positions_BL = np.broadcast_to(np.arange(9), (2, 9))
    hidden_BLD = model.hidden(MODEL, lm.params, tokens_BL, positions_BL, ones_BL)
    logits_BLV = lm.logits(tokens_BL)
    assert logits_BLV.dtype == np.float32 and logits_BLV.shape == (2, 9, MODEL.vocab_size)
    np.testing.assert_allclose(logits_BLV, model.head(MODEL, lm.params, hidden_BLD), atol=1e-5)


@pytest.mark.parametrize("call, message", [
    (lambda lm: lm.generate("abc"), "must be a list of prompts"),
    (lambda lm: lm.generate(["abc", ""]), "prompt 1: must not be empty"),
    (lambda lm: lm.generate(["abc", []]), "prompt 1: must not be empty"),
    (lambda lm: lm.generate([5, 6]), "prompt 0: must be a text or a list of ids"),
    (lambda lm: lm.generate([[5, 6.5]]), "prompt 0: must be a text or a list of ids"),
    (lambda lm: lm.generate(["abc", "ab\udcff"]), "prompt 1: invalid text: character 2 is a lone surrogate"),
    (lambda lm: lm.infill(["ab\ud800[[mask:1]]"]), "prompt 0: invalid text"),
    (lambda lm: lm.infill(["[[mask:999999999]]"]), "gaps of 999999999 tokens exceed the context of 128"),
    (lambda lm: lm.infill([f"[[mask:{'9' * 5000}]]"]), "malformed gap; write [[mask:N]]"),
    (lambda lm: lm.infill(["a[[mask:1]]"], stop=["b"]), "stop: not allowed in infilling"),
    (lambda lm: lm.infill(["a[[mask:1]]"], max_new_tokens=4), "max_new_tokens: not allowed in infilling"),
    (lambda lm: lm.generate(["abc"], stop="ab"), "stop: must be a list of stop strings, not a string"),
    (lambda lm: lm.generate(["abc"], temperature=float("inf")), "config.decode.temperature = inf: must be a finite"),
    (lambda lm: lm.generate(["abc"], temperature=float("nan")), "config.decode.temperature = nan"),
    (lambda lm: lm.generate(["abc"], seed=2**32), "config.decode.seed = 4294967296: must be less than 2**32"),
    (lambda lm: lm.generate(["abc"], eot_id=-2), "config.decode.eot_id = -2"),
    (lambda lm: lm.generate(["abc"], eot_id=5000), "config.decode.eot_id = 5000: is outside the vocabulary"),
    (lambda lm: lm.generate(["abc"], stop=[""]), "a stop string must not be empty"),
    (lambda lm: lm.generate(["abc"], max_new_token=4),
     "config.decode.max_new_token: unknown key; did you mean config.decode.max_new_tokens?"),
    (lambda lm: lm.generate(["abc"], max_new_tokens="4"), "config.decode.max_new_tokens = '4': must be of type int"),
    (lambda lm: lm.generate(["abc"], reveal="x"), "must be one of 'schedule', 'threshold', 'factor', 'entropy_bound'"),
    (lambda lm: lm.generate(["a" * 128]), "leave no room in the context of 128"),
    (lambda lm: lm.generate([[5, TOKENIZER.mask_id]]), "use infilling to fill gaps"),
    (lambda lm: lm.infill(["abc"]), "'abc': no gap to fill"),
    (lambda lm: lm.infill(["abc [[mask:]] [[mask:2]]"]), "malformed gap; write [[mask:N]]"),
    (lambda lm: lm.logits([1, 2]), "must be integers [rows, length]"),
    (lambda lm: lm.logits([[10_000]]), "ids must lie in [0, "),
    (lambda lm: api.load("nowhere", dtype="int4"), "dtype = 'int4'"),
    (lambda lm: api.load("nowhere"), "nowhere: not a checkpoint"),
])
def test_bad_input(lm, call, message):
    with pytest.raises(InputError) as caught:
        call(lm)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def run(lm, monkeypatch, capsys):
    """Runs the command with flags; returns (exit code, stdout)."""
    monkeypatch.setattr(api, "load", lambda path, dtype, mesh, quantize, special_ids: lm)

    def call(*arguments):
        flags.FLAGS.unparse_flags()
        for flag in flags.FLAGS.get_key_flags_for_module(generate):
            flag.unparse()
        flags.FLAGS(["generate", "--checkpoint=x", *arguments])
        code = generate.main([])
        out, call.err = capsys.readouterr()
        return code, out

    return call


def test_command_prints_text_or_json(run, lm):
    expected = lm.generate(["abc", "de"], max_new_tokens=12)
    assert run("--prompt=abc", "--prompt=de", "--max_new_tokens=12")[1] == "".join(f"{r.text}\n" for r in expected)
    lines = run("--prompt=abc", "--prompt=de", "--max_new_tokens=12", "--output=json")[1].splitlines()
    for line, prompt, result in zip(map(json.loads, lines), ["abc", "de"], expected, strict=True):
        assert (line["prompt"], line["text"], line["tokens"]) == (prompt, result.text, result.tokens)
        assert line["nfe"] == result.nfe and line["seconds"] >= 0


def test_streamed_text_is_the_text(run, lm):
    stop = lm.generate(["abc"], max_new_tokens=32)[0].text[9:12]
    for flag in ([], [f"--stop={stop}"]):
        streamed = run("--prompt=abc", "--max_new_tokens=32", "--stream", *flag)[1]
        assert streamed == run("--prompt=abc", "--max_new_tokens=32", *flag)[1]


def test_watching_prints_the_same_text(run, lm, capsys):
    expected = lm.generate(["abc"], max_new_tokens=24)[0]
    assert run("--prompt=abc", "--max_new_tokens=24", "--watch")[1] == expected.text + "\n"
    assert "2 evaluations" not in capsys.readouterr().out


def test_every_setting_has_a_flag_and_reaches_the_decoder(run, lm):
    # --eot_id belongs to the model that is loaded (illada_jax/cli.py).
    assert {*generate.SETTINGS, "eot_id"} == {field.name for field in dataclasses.fields(DecodeConfig)}
    suppressed = [f"--suppressed_ids={i}" for i in range(TOKENIZER.vocab_size) if not 68 <= i < 72]
    written = json.loads(run("--prompt=abc", *suppressed, "--nologits_eos_inf", "--output=json")[1])["tokens"]
    assert set(written) <= {68, 69, 70, 71} and len(written) == 16
    free = lm.generate(["abc"], suppressed_ids=tuple(range(128, 256)))[0]
    stop = free.tokens[5]
    assert json.loads(run("--prompt=abc", f"--stop_ids={stop}", "--output=json")[1])["stopped_by"] == "stop_id"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--threshold=0.5"], "--threshold: has no effect with reveal = 'schedule'; it requires --reveal=threshold"),
    (["--reveal=factor", "--steps_per_block=2"], "--steps_per_block: has no effect with reveal = 'factor'"),
    (["--cache_refresh=2"], "--cache_refresh: has no effect with cache = 'none'; it requires --cache=prefix or dual"),
    (["--stream", "--infill"], "--stream: takes a single prompt"),
    (["--watch", "--stream"], "--watch: takes a single prompt"),
    (["--watch", "--prompt=de"], "--watch: takes a single prompt"),
    (["--stop="], "a stop string must not be empty"),
    (["--results=."], ".: cannot be read: Is a directory"),
    (["--results=/none/r.jsonl"], "--results=/none/r.jsonl: No such file or directory"),
    (["--input=/none/p.jsonl"], "not both"),
])
def test_flags_that_would_do_nothing_or_cannot_be_obeyed(run, arguments, message):
    with pytest.raises(InputError) as caught:
        run("--prompt=abc", *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_but_the_answers_reaches_a_pipe(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for arguments in ([], [f"--results={tmp_path}/r.jsonl"]):
        run(f"--input={prompts}", "--max_new_tokens=8", *arguments)
        assert run.err == ""


def test_results_are_resumed_after_an_interruption(run, lm, monkeypatch, tmp_path):
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    texts = [f"prompt {n}" for n in range(7)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    arguments = [f"--input={prompts}", f"--results={results}", "--temperature=0.8", "--batch_size=2"]
    whole = lm.generate(texts, temperature=0.8)

    interrupted = api.LanguageModel.as_completed

    def three_then_stop(*args, **kwargs):
        for count, item in enumerate(interrupted(*args, **kwargs)):
            if count == 3:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(api.LanguageModel, "as_completed", three_then_stop)
        assert run(*arguments)[0] == 130
    saved = results.read_text()
    assert saved.count("\n") == 3
    results.write_text(saved + '{"index": 6, "pro')  # a line that was being written
    assert run(*arguments)[0] is None
    assert results.read_text().startswith(saved)
    lines = sorted(map(json.loads, results.read_text().splitlines()), key=lambda line: line["index"])
    assert [line["tokens"] for line in lines] == [result.tokens for result in whole]


@pytest.mark.parametrize("content, message", [
    ('{"prompt": "a"}\nnot json\n', "line 2: not JSON"),
    ('{"text": "a"}\n', 'line 1: must be an object with a non-empty string "prompt"'),
    ('["a"]\n', 'line 1: must be an object with a non-empty string "prompt"'),
    ('{"prompt": 3}\n', 'line 1: must be an object with a non-empty string "prompt"'),
    ('{"prompt": "a"}\n{"prompt": ""}\n', 'line 2: must be an object with a non-empty string "prompt"'),
    ("", "the file is empty"),
])
def test_bad_prompt_files(run, tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        run(f"--input={path}")


@pytest.mark.parametrize(("name", "content"), [
    ("p.jsonl", b'\xef\xbb\xbf{"prompt": "a\\u2028"}\r\n\n \r\n{"prompt": "b"}\n\n'),
    ("p.jsonl.gz", gzip.compress(b'{"prompt": "a\\u2028"}\n{"prompt": "b"}', mtime=0)),
    ("p.json", b'\xef\xbb\xbf[\n  {"prompt": "a\\u2028"},\n\n  {"prompt": "b"}\n]\n'),
])
def test_prompt_files_as_found(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert generate.read_prompts(tmp_path / name) == ["a\u2028", "b"]


def test_results_of_other_prompts_are_not_mixed(run, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"index": 0, "prompt": "other"}\n')
    with pytest.raises(InputError, match="line 1: not a result of these prompts"):
        run("--prompt=abc", f"--results={results}")
    assert results.read_text() == '{"index": 0, "prompt": "other"}\n'


@pytest.mark.parametrize("changed, message", [
    (["--temperature=0.5"], "decode.temperature: 0.8 → 0.5"), (["--seed=1"], "decode.seed: 0 → 1"),
    (["--stop=x"], "stop: [] → ['x']"), (["--top_k=3"], "decode.top_k: 0 → 3"), (["weights"], "params: '"),
    (["tokenizer"], "tokenizer: '"), (["model"], "model.rope_theta: 500000.0 → 1000.0")])
def test_results_are_continued_by_the_same_model_and_settings_only(run, lm, monkeypatch, tmp_path, changed, message):
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "r.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abc"))
    arguments = [f"--input={prompts}", f"--results={results}", "--max_new_tokens=8"]
    assert run(*arguments, "--temperature=0.8")[0] is None
    saved = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["index"] for line in saved} == {0, 1, 2}  # and no line of another kind
    results.write_text(results.read_text().partition("\n")[0] + "\n")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    record = json.loads((tmp_path / "r.jsonl.settings.json").read_text())
    assert record["checkpoint"] == "x" and record["decode"]["temperature"] == 0.8
    if not changed[0].startswith("--"):
        other = api.LanguageModel(CONFIG, lm.params, TOKENIZER)
        other.params = random_params(MODEL, seed=5) if changed == ["weights"] else lm.params
        other.tokenizer = _other_tokenizer() if changed == ["tokenizer"] else TOKENIZER
        if changed == ["model"]:
            other.config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, rope_theta=1000.0))
        monkeypatch.setattr(api, "load", lambda *_: other)
        changed = []
    with pytest.raises(InputError, match=f"{re.escape(str(results))}: has results of 'x' with other weights") as caught:
        run(*arguments, "--temperature=0.8", *changed)
    assert message in str(caught.value) and "choose another file" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    monkeypatch.setattr(api, "load", lambda *_: lm)
    # The same model elsewhere, in other batches.
    assert run(*arguments, "--temperature=0.8", "--batch_size=3", "--checkpoint=y")[0] is None
    again = [json.loads(line) for line in results.read_text().splitlines()]
    texts = [{line["index"]: line["tokens"] for line in lines} for lines in (saved, again)]
    assert texts[0] == texts[1]


def _other_tokenizer():
    tokenizer = ByteTokenizer()
    tokenizer.vocabulary_files = lambda: {"other": b""}
    return tokenizer


@pytest.mark.parametrize("record", [None, "{", "[]", "{}"])
def test_results_of_an_unknown_model_are_not_continued(run, tmp_path, record):
    results = tmp_path / "r.jsonl"
    results.write_text('{"index": 0, "prompt": "a"}\n')
    if record is not None:
        (tmp_path / "r.jsonl.settings.json").write_text(record)
    with pytest.raises(InputError, match=r"r\.jsonl\.settings\.json|has results of None") as caught:
        run("--prompt=a", "--prompt=b", f"--results={results}")
    assert "\n" not in str(caught.value) and results.read_text() == '{"index": 0, "prompt": "a"}\n'


def test_a_trace_of_all_prompts_on_one_page(run, lm, tmp_path):
    code, out = run("--prompt=abc", "--prompt=b", f"--trace={tmp_path}/t.html", "--max_new_tokens=8")
    assert not code and out == run("--prompt=abc", "--prompt=b", "--max_new_tokens=8")[1]
    traces = json.loads((tmp_path / "t.html").read_text().split("const traces = ")[1].split(";\n")[0])
    assert [trace["title"] for trace in traces] == ["abc", "b"]
    texts = [result.text for result in lm.generate(["abc", "b"], max_new_tokens=8)]
    assert all(text in "".join(trace["pieces"]) for text, trace in zip(texts, traces, strict=True))


def test_a_trace_says_where_it_is_and_a_picture_needs_its_package(run, tmp_path, monkeypatch):
    run("--prompt=abc", f"--trace={tmp_path}/new/t.html", "--max_new_tokens=8")
    assert run.err == f"wrote {tmp_path}/new/t.html\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(api.Decoder, "as_completed", lambda *_: pytest.fail("decodes"))
    with pytest.raises(InputError, match=r"pip install 'illada_jax\[plot\]'"):
        run("--prompt=abc", f"--trace={tmp_path}/t.gif")


def test_a_gap_without_infill_is_mentioned(run):
    run("--prompt=a[[mask:4]]b", "--max_new_tokens=8")
    assert run.err == "note: without --infill a gap such as [[mask:4]] is plain text\n"
    run("--prompt=a[[mask:4]]b", "--infill")
    assert run.err == ""


def test_a_chat_explains_itself_and_ends_its_line(run, monkeypatch, capsys):
    lines = iter(["/help", " /exit "])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run("--chat") == (None, "") and "/exit or Ctrl-D ends it" in run.err
    monkeypatch.setattr("builtins.input", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run("--chat")
    assert capsys.readouterr().out == "\n"


def test_a_model_describes_itself(lm):
    for part in (f"{model.num_params(MODEL):,} parameters", "2 layers of width 16", "context of 128 tokens", "float32"):
        assert part in repr(lm)


def test_a_prompt_is_shown_with_several_strategies(run, lm, tmp_path):
    path, settings = tmp_path / "t.html", {"max_new_tokens": 8}
    code, out = run("--prompt=abc", "--prompt=b", f"--trace={path}", "--max_new_tokens=8",
                    "--beside=confidence=random",
                    "--beside=reveal=threshold, threshold=0.05,stop_ids=7,stop_ids=8")
    assert not code and out == run("--prompt=abc", "--prompt=b", "--max_new_tokens=8")[1]
    traces = json.loads(path.read_text().split("const traces = ")[1].split(";\n")[0])
    others = [{}, {"confidence": "random"}, {"reveal": "threshold", "threshold": 0.05, "stop_ids": (7, 8)}]
    assert [trace["title"] for trace in traces] == ["abc"] * 3 + ["b"] * 3
    assert [trace["strategy"].split(",")[0] for trace in traces] == ["confidence=low_confidence", "confidence=random",
                                                                     "confidence=low_confidence"] * 2
    assert "threshold=0.05, stop_ids=(7, 8)" in traces[2]["strategy"] and "threshold" not in traces[1]["strategy"]
    for number, other in enumerate(others):
        for row, result in enumerate(lm.generate(["abc", "b"], **settings, **other)):
            trace = traces[3 * row + number]
            assert trace["nfe"] == result.nfe and result.text in "".join(trace["pieces"])
    code, out = run("--prompt=a[[mask:3]]", "--infill", f"--trace={path}", "--beside=temperature=0.9")
    assert not code and '"strategy":"temperature=0.9"' in path.read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--beside=confidence=random"], "--beside: requires --trace=….html"),
    (["--trace=t.gif", "--beside=confidence=random"], "--beside: requires --trace=….html"),
    (["--trace=t.html", "--beside=confidnce=random"], "flag 'confidnce'. Did you mean: confidence"),
    (["--trace=t.html", "--beside=prompt=x"], "--beside=prompt=x: Unknown command line flag 'prompt'"),
    (["--trace=t.html", "--beside=random"], "--beside=random: must be KEY=VALUE"),
    (["--trace=t.html", "--beside="], "--beside=: must be KEY=VALUE"),
    (["--trace=t.html", "--beside=seed=1,=3"], "--beside=seed=1,=3: must be KEY=VALUE"),
    (["--trace=t.html", "--beside=temperature=warm"], "--beside=temperature=warm: flag --temperature=warm: "),
    (["--trace=t.html", "--beside=temperature=-1"], "--beside=temperature=-1: config.decode.temperature = -1.0"),
    (["--trace=t.html", "--beside=confidence=x"], "must be one of 'low_confidence', 'margin', 'entropy', 'random'"),
    (["--trace=t.html", "--beside=threshold=0.5"], "--threshold: has no effect with reveal = 'schedule'"),
    (["--trace=t.html", "--beside=temperature=0"], "--beside=temperature=0: changes nothing"),
    (["--trace=t.html", "--infill", "--beside=max_new_tokens=4"], "max_new_tokens is not allowed with --infill"),
    (["--prompt=a", "--reuse"], "--reuse: requires --chat"),
    (["--chat", "--beside=temperature=1"], "--chat: cannot be combined with --"),
])
def test_comparisons_that_cannot_be_are_refused_before_decoding(run, monkeypatch, arguments, message):
    monkeypatch.setattr(api.Decoder, "as_completed", lambda self, ids, *_: pytest.fail("decodes") if ids else iter(()))
    with pytest.raises(InputError) as caught:
        run("--prompt=abc", *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--trace=t.jpg"], "must be .html, .gif or .png"),
    (["--trace=t.gif", "--prompt=b"], "shows a single prompt"),
    (["--trace=/dev/null/t.html"], "the directory /dev/null cannot be made"),
    (["--trace=t.html", "--stream"], "cannot be combined with --stream"),
])
def test_a_trace_that_cannot_be_is_refused_before_decoding(run, arguments, message):
    with pytest.raises(InputError) as caught:
        run("--prompt=abc", *arguments)
    assert message in str(caught.value)
