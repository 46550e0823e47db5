"""Forms of chat records: each is learnt as the table of experiments/README.md says, or left out with its reason."""

import functools
import gzip
import json
import pathlib
import re

import numpy as np
import pytest
import zstandard

from illada_jax.config import Config, DataConfig, ModelConfig, SftConfig, TrainConfig
from illada_jax.data.corpus import open_examples
from illada_jax.data.finetuning import example_batches
from illada_jax.data.preparing.examples import encode_example
from illada_jax.data.shards import answer_spans
from illada_jax.data.sources.examples import Example, RejectedExample, parts, to_example
from illada_jax.data.tokenizers import ByteTokenizer, chat
from illada_jax.errors import InputError
from tests.data.test_chat import CHATML, NO_SYSTEM, tokenizer_with

README = (pathlib.Path(__file__).parents[2] / "experiments" / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"(?m)^\| (.+) \| `(\{.+\})` \| (.+) \|$", README)
# Writes definitions of tools, calls and results, and nothing for null content.
TOOLS = ("{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages %}"
         "<|im_start|>{{ m.role }}\n{% if m.content is not none %}{{ m.content }}{% endif %}"
         "{% for call in m.tool_calls or [] %}CALL {{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"at": "Rome"}}}
TALK = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "sun"}, {"role": "assistant", "content": "Sunny."}]


@pytest.fixture(autouse=True)
def trusted_templates(monkeypatch):
    """Templates are not tried in child processes."""
    monkeypatch.setattr(chat, "reason_to_refuse", lambda *_: "")


@functools.cache
def tokenizer_of(template):
    return tokenizer_with(template)


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def encoded(record, template=CHATML):
    """The text of a record and the texts of its learnt answers; or the reason for which it is left out."""
    tokenizer = tokenizer_of(template)
    example = to_example("here", record)
    if isinstance(example, RejectedExample):
        return example.reason
    try:
        ids, is_answer, is_fixed = encode_example(example, tokenizer)
    except InputError as error:
        return str(error)
    assert not any(a and b for a, b in zip(is_answer, is_fixed, strict=True))
    decode = lambda start, stop: tokenizer.decode(ids[start : stop])  # noqa: E731
    assert all(ids[stop - 1] in tokenizer.special_tokens.values() for _, stop in answer_spans(np.array(is_answer)))
    return decode(0, len(ids)), [decode(start, stop - 1) for start, stop in answer_spans(np.array(is_answer))]


def roles(text):
    return re.findall(r"(system|user|assistant|tool)\n", text)


def test_the_table_names_every_form():
    assert len(ROWS) == 13, [row[0] for row in ROWS]


@pytest.mark.parametrize(("form", "record", "learnt"), [row for row in ROWS if "tool" not in row[0]],
                         ids=lambda value: value[:20] if value[0] != "{" else "")
def test_forms_are_learnt_as_the_table_says(form, record, learnt):
    got = encoded(json.loads(record))
    if learnt.startswith("left out: "):
        assert got.startswith(learnt.removeprefix("left out: "))
    else:
        assert got[1] == re.findall("`(.+?)`", learnt)


@pytest.mark.parametrize(("record", "expected"), [
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "u"},
                        {"from": "chatgpt", "value": "a"}, {"from": "human", "value": "v"},
                        {"from": "assistant", "value": "b"}]}, ["system", "user", "assistant", "user", "assistant"]),
    ({"conversations": [{"from": "gpt", "value": "a"}], "system": ""}, ["assistant"]),
    ({"conversations": [user("u"), answer("a")], "messages": None}, ["user", "assistant"]),
    ({"instruction": "i", "input": "", "output": "a"}, ["user", "assistant"]),
    ({"instruction": "i", "input": None, "output": "a", "system": "s"}, ["system", "user", "assistant"]),
    ({"prompt": [user("u")], "completion": "a"}, ["user", "assistant"]),
    ({"prompt": "u", "response": [answer("a")]}, ["user", "assistant"]),
    ({"messages": [{"role": "developer", "content": "s"}, user("u"), answer("a")], "system": "t"},
     ["system", "user", "assistant"]),
])
def test_speakers(record, expected):
    text, learnt = encoded(record)
    assert roles(text) == expected and learnt[0].endswith("a")


def test_alpaca_keeps_instruction_and_input_and_prompts_keep_their_turns():
    assert "user\nTranslate.\n\nHund" in encoded({"instruction": "Translate.", "input": "Hund", "output": "dog"})[0]
    text, learnt = encoded({"prompt": [user("u"), answer("seen"), user("v")], "completion": [answer("a")]})
    assert "seen" in text and learnt == ["a"]


@pytest.mark.parametrize(("record", "reason"), [
    ({"conversations": [{"from": "robot", "value": "x"}, {"from": "gpt", "value": "y"}]}, "bad message"),
    ({"conversations": [{"from": ["human"], "value": "x"}, {"from": "gpt", "value": "y"}]}, "bad message"),
    ({"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "y"}]}, "bad message"),
    ({"conversations": "x"}, "bad message"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "no answer"),
    ({"instruction": "x", "input": "", "output": ""}, "empty response"),
    ({"instruction": "x", "input": {"a": 1}, "output": "y"}, "bad message"),
    ({"instruction": "x"}, "bad message"),
    ({"prompt": [user("u")]}, "bad message"),
    ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), answer("y")]}, "bad message"),
    ({"messages": [user([{"type": "thinking", "text": "x"}]), answer("y")]}, "bad message"),
    ({"messages": [user("u"), answer(None)]}, "bad message"),
    ({"messages": [user("u"), answer([])]}, "empty response"),
    ({"messages": [user("u"), answer("a", weight=0.5)]}, "bad message"),
    ({"messages": [user("u"), answer("a", train="no")]}, "bad message"),
    ({"messages": [user("u"), answer("a", train=False), answer("b", weight=0)]}, "nothing to learn"),
    ({"messages": TALK, "tools": "weather"}, "bad tools"),
    ({"messages": [*TALK[:1], answer(None, tool_calls=[{"name": "\ud800"}])]}, "a lone surrogate"),
])
def test_what_cannot_be_learnt_has_a_reason(record, reason):
    assert encoded(record).startswith(reason)


@pytest.mark.parametrize(("turn", "mark"),
                         [(1, {"weight": 0}), (3, {"train": False}), (5, {"weight": 0.0, "train": True})])
def test_marked_answers_are_never_masked_in_either_format(tmp_path, mark, turn):
    """The others are, and LLaDA's format draws each of them in some epoch."""
    messages = [user("q0"), answer("A-one"), user("q1"), answer("B-two"), user("q2"), answer("C-three")]
    names = {1: "A-one", 3: "B-two", 5: "C-three"}
    messages[turn] = messages[turn] | mark
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    for form in ("illada", "llada"):
        config = Config(model=ModelConfig(max_length=256), sft=SftConfig(form), train=TrainConfig(epochs=24, steps=0),
                        data=DataConfig(sources=(f"chat:{tmp_path}/x.jsonl",), tokenizer="bytes", heldout_fraction=0.0,
                                        length=256, batch_size=1, cache_dir=str(tmp_path / "cache")))
        examples = open_examples(config, progress=False)
        batches = example_batches(config, examples)
        hidden, seen = "", ""
        for step in range(batches.num_steps):
            batch = batches.rows(step, [0])
            assert not batch.weights_BL[~batch.maskable_BL].any()
            hidden += ByteTokenizer().decode(np.where(batch.maskable_BL, batch.tokens_BL, 0)[0])
            seen += ByteTokenizer().decode(batch.tokens_BL[0])
        assert names[turn] not in hidden and (names[turn] in seen or turn == 5)
        assert all(name in hidden for number, name in names.items() if number != turn)
        assert ("q1" in hidden) == (form == "illada")
        last = examples.train.question(0)
        assert ByteTokenizer().decode(last.answer) == names[3 if turn == 5 else 5]


def test_a_marked_question_is_seen_and_not_learnt():
    tokenizer = tokenizer_of(CHATML)
    record = {"messages": [{"role": "system", "content": "S"}, user("secret", train=False), answer("a")]}
    conversation = encode_example(to_example("here", record), tokenizer)
    text = [tokenizer.decode([i]) for i in conversation.ids]
    fixed = "".join(piece for piece, fixed in zip(text, conversation.is_fixed, strict=True) if fixed)
    assert "secret" in fixed and "S" not in fixed and "a" not in fixed.replace("user", "").replace("secret", "")


def test_tools_go_to_a_template_that_writes_them():
    text, learnt = encoded({"messages": TALK, "tools": [{"name": "weather"}]}, TOOLS)
    assert learnt == ['CALL {"name": "weather", "arguments": {"at": "Rome"}}', "Sunny."]
    assert 'tools [{"name": "weather"}]' in text and "tool\nsun" in text and "None" not in text
    assert encoded({"messages": [TALK[0], {**TALK[1], "content": "Let me see."}, *TALK[2:]]}, TOOLS)[1][0].startswith(
        "Let me see.CALL")


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.replace("{% if m.content is not none %}{{ m.content }}{% endif %}", "{{ m.content }}"), "writes None"),
    (lambda t: t.replace("CALL {{ call.function | tojson }}", ""), "ignores tool calls"),
    (lambda t: t.replace("{{ tools | tojson }}", "").replace("tools <", "<").replace("{% if tools %}<|im_start|>", "{% "
                         "if tools %}").replace("<|im_end|>{% endif %}{% for m", "{% endif %}{% for m"),
     "ignores definitions of tools"),
    (lambda t: t.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
     "ignores messages of tools"),
    (lambda t: t.replace("{% for m in messages %}", "{% for m in messages %}{% if m.tool_calls %}"
                                                    "{{ raise_exception('no tools') }}{% endif %}"), "no tools"),
    (lambda t: CHATML, "the chat template fails"),
    (lambda t: NO_SYSTEM, "the chat template"),
])
def test_a_template_that_loses_tools_leaves_the_record_out(change, message):
    template = change(TOOLS)
    assert template != TOOLS
    assert message in encoded({"messages": TALK, "tools": [{"name": "weather"}]}, template)


@pytest.mark.parametrize("where", ["arguments", "tools"])
def test_special_tokens_do_not_enter_through_tools(where):
    call = {"function": {"name": "f", "arguments": {"a": "<|im_end|>"} if where == "arguments" else {}}}
    record = {"messages": [user("u"), answer(None, tool_calls=[call])],
              "tools": [{"name": "<|im_end|>"}] if where == "tools" else []}
    assert "holds a special token" in encoded(record, TOOLS)


FORMS = [json.loads(record) for _, record, learnt in ROWS if learnt.startswith("`")]


def read(path, max_bytes=2**20):
    return [example for part in parts(f"chat:{path}", max_bytes) for example in part.read()]


def contents(examples):
    assert all(isinstance(example, Example) for example in examples), examples
    return [(example.messages, example.prompt, example.response) for example in examples]


@pytest.mark.parametrize("layout", ["lines", "array", "pretty", "one line with spaces"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_and_arrays_hold_the_same_records(tmp_path, layout, suffix, mark):
    records = [*FORMS, {"prompt": "x" * 200_000 + "[{", "response": "é,]}\n"}]
    content = {"lines": "\r\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n \n",
               "array": json.dumps(records), "pretty": "\n" + json.dumps(records, indent=2, ensure_ascii=False) + "\n",
               "one line with spaces": " [ " + " , ".join(map(json.dumps, records)) + " ] \n\n"}[layout]
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / f"a.json{suffix}").write_bytes(compress(mark + content.encode()))
    assert contents(read(tmp_path / f"a.json{suffix}")) == contents([to_example("", record) for record in records])


def test_an_array_longer_than_a_record_is_streamed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": str(n), "response": "y" * (n % 50)} for n in range(9999)]))
    assert [e.prompt for e in read(tmp_path / "a.json", 1000) if isinstance(e, Example)] == [
        str(n) for n in range(9999) if n % 50]


@pytest.mark.parametrize(("content", "message"), [
    ('[{"prompt": "a", "response": "b"}, {"prompt": "a", ', r"record 2: the JSON array breaks off"),
    ('[{"prompt": "a", "response": "b"}', "record 1: the JSON array breaks off"),
    ('[\n{"prompt": "a", "response": "b"}\n', "record 2: the JSON array breaks off"),
    ('[{"prompt": "a"}\n]\n[{"prompt": "b"}]', "text follows the JSON array"),
    ('[{"prompt": "a"}, {"prompt": "' + "b" * 3_000_000 + '"}]', "record 2: longer than max_document_megabytes = 1"),
    ('[{"prompt": 1}, {"prompt": nope}]' + " " * 3_000_000, "record 2: longer than max_document_megabytes = 1, or not"),
])
def test_a_broken_array_is_an_error(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.json")


def test_lines_that_are_arrays_stay_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('[{"role": "user"}]\n{"prompt": "a", "response": "b"}\n["x"]\n')
    first, second, third = read(tmp_path / "a.jsonl")
    assert first.reason == third.reason == "not an object" and second.prompt == "a"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_record_that_is_too_long_is_left_out_and_its_neighbours_are_kept(tmp_path, suffix):
    good = b'{"prompt": "a", "response": "b"}\n'
    content = good + b'{"prompt": "' + b"x" * 400_000 + b'", "response": "b"}\n' + good
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content))
    first, second, third = read(tmp_path / f"a.jsonl{suffix}", 100_000)
    assert first.prompt == third.prompt == "a" and third.where.endswith("line 3")
    assert second.reason.startswith("longer than max_document_megabytes = 0.095") and second.where.endswith("line 2")
