"""Sources of examples: bad ones are named and counted, never silently dropped; tasks are correct."""

import gzip
import json
import os
import re

import pytest
import zstandard

from illada_jax.config import Config, DataConfig, ModelConfig, SftConfig, TrainConfig
from illada_jax.data import corpus
from illada_jax.data.corpus import open_examples
from illada_jax.data.manifest import Manifest
from illada_jax.data.preparing import examples as preparing
from illada_jax.data.sources import synthetic
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.errors import ConfigError, InputError
from illada_jax.evaluation import answer_metrics as scorers

GOOD = {"prompt": "1+1=", "response": "2"}
EOS = ByteTokenizer().eos_id


def opened(path, source, tokenizer=None, heldout=0.0, length=32, name="bytes", **sft):
    config = Config(
        model=ModelConfig(max_length=256), sft=SftConfig(**{"format": "illada", **sft}), train=TrainConfig(steps=1),
        data=DataConfig(sources=(source,) if isinstance(source, str) else source, tokenizer=name, length=length,
                        heldout_fraction=heldout, cache_dir=str(path / "cache"), tokenizer_vocab_size=300))
    return open_examples(config, tokenizer, progress=False)


def lines(path, *records):
    file = path / "data.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return f"chat:{file}"


def say(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BAD = [
    ('{"prompt": "x", ', "not JSON"),
    ('["prompt"]', "not an object"),
    ({"question": "x", "answer": "y"}, "neither messages nor prompt and response"),
    ({"prompt": "x"}, r"no text in 'response'; its keys: prompt"),
    ({"prompt": "x", "response": 7}, "no text in 'response'"),
    ({"prompt": "x", "response": " \n"}, "empty response"),
    (say(("user", "x"), ("assistant", "")), "empty response"),
    (say(("user", "x"), ("robot", "y")), "bad message: .*message 2: unknown role 'robot'"),
    ({"messages": [{"role": "user"}]}, "message 1: has no 'content'"),
    ({"messages": []}, "must not be empty"),
    ({"messages": "hello"}, "a list of objects"),
    (say(("user", "x")), "no answer: .*the last message has the role 'user'"),
    ('{"prompt": "x", "response": "\\ud800"}', "lone surrogate"),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=[re.sub(r"\W+", " ", str(b[0]))[:30] for b in BAD])
def test_bad_lines_are_named_counted_and_refused_if_asked_for(tmp_path, record, message):
    source = lines(tmp_path, GOOD, record, GOOD)
    examples = opened(tmp_path, source)
    assert examples.train.num_documents == 2
    assert re.search("^1 of 3 examples left out: .*data.jsonl, line 2", examples.dropped), examples.dropped
    assert re.search(message, examples.dropped), examples.dropped
    with pytest.raises(InputError, match=r"config.sft.strict: 1 of 3 examples left out.*line 2"):
        opened(tmp_path, source, strict=True)


def test_many_bad_lines_are_counted_by_reason(tmp_path):
    examples = opened(tmp_path, lines(tmp_path, *["{"] * 5, GOOD, {"prompt": "x", "response": ""}))
    first, second = examples.dropped.split("\n")
    assert first.startswith("5 of 7 examples left out: not JSON: ") and first.endswith("line 3 (Expecting property name"
                                                                                      " enclosed in double quotes); …")
    assert second.startswith("1 of 7 examples left out: empty response: ") and second.endswith("line 7")


def test_many_files_are_encoded_by_processes_to_the_same_store(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "abc":
        records = [{"prompt": f"{name}{i}", "response": "x" * i} for i in range(20)]  # the first of each is empty
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    one = opened(tmp_path / "one", f"chat:{tmp_path}/in", heldout=0.2)
    monkeypatch.setattr(preparing, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(preparing, "group_parts", lambda parts, shard_bytes: [(part,) for part in parts])
    many = opened(tmp_path / "many", f"chat:{tmp_path}/in", heldout=0.2)
    assert one.dropped == many.dropped and one.dropped.startswith("3 of 60 examples left out: empty response: ")
    for a, b in ((one.train, many.train), (one.heldout, many.heldout)):
        assert a.num_documents == b.num_documents > 5 and a.num_bytes == b.num_bytes
        assert all((a.document(i) == b.document(i)).all() for i in range(a.num_documents))
    assert one.train.num_documents + one.heldout.num_documents == 57


def test_killed_encoding_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    source = lines(tmp_path, *[GOOD] * 5)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Manifest, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        opened(tmp_path, source)
    assert not list((tmp_path / "cache").iterdir())
    assert opened(tmp_path, source).train.num_documents == 5


def test_two_processes_may_encode_at_once(tmp_path, monkeypatch):
    source = lines(tmp_path, *[GOOD] * 5)
    encode = corpus.prepare_examples

    def overtaken(*arguments):
        with monkeypatch.context() as other:
            other.setattr(corpus, "prepare_examples", encode)
            other.setattr(os, "getpid", lambda: 1)
            faster.append(opened(tmp_path, source))
        return encode(*arguments)

    faster = []
    monkeypatch.setattr(corpus, "prepare_examples", overtaken)
    slower = opened(tmp_path, source)
    assert slower.fingerprint == faster[0].fingerprint and slower.train.num_documents == 5
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no example is left to learn from; 1 of 1 examples left out: not JSON"):
        opened(tmp_path, lines(tmp_path, "{"))


def test_not_utf8_and_blank_lines(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\n{\"prompt\": \"\xff\"}\n")
    examples = opened(tmp_path, f"chat:{tmp_path}/data.jsonl")
    assert examples.train.num_documents == 1
    assert "not UTF-8: " in examples.dropped and "line 3" in examples.dropped


@pytest.mark.parametrize(("rule", "form", "expected", "dropped"), [
    ("split", "illada", ["abcdefghijkl!"], "1 of 1 examples split: longer than config.data.length = 8"),
    ("truncate", "illada", ["abcdefgh"], "1 of 1 examples truncated: longer than config.data.length = 8"),
    ("split", "llada", ["abcdefgh", "ijkl!"], "1 of 1 examples split: longer than config.data.length = 8"),
    ("truncate", "llada", ["abcdefgh"], "1 of 1 examples truncated"),
])
def test_examples_longer_than_the_window(tmp_path, rule, form, expected, dropped):
    source = lines(tmp_path, {"prompt": "abc", "response": "defghijkl"})
    examples = opened(tmp_path, source, length=8, over_length=rule, format=form)
    train = examples.train
    decode = lambda ids: "".join("!" if i == EOS else chr(i - 4) for i in ids)  # noqa: E731
    assert [decode(train.document(i)) for i in range(train.num_documents)] == expected
    assert dropped in examples.dropped


def test_long_examples_may_be_dropped_and_pieces_without_answers_are(tmp_path):
    source = lines(tmp_path, GOOD, {"prompt": "a" * 12, "response": "b"})
    examples = opened(tmp_path, source, length=8, over_length="drop")
    assert examples.train.num_documents == 1
    assert "1 of 2 examples left out: longer than config.data.length = 8: " in examples.dropped
    assert "(14 tokens)" in examples.dropped
    examples = opened(tmp_path, source, length=8, over_length="split", format="llada")
    assert examples.train.num_documents == 2  # the prompt's first half teaches nothing
    assert "a piece of a long example without any answer" in examples.dropped


def test_special_tokens_in_content_stay_text(tmp_path):
    content = "<eos><mask> <bos>"
    source = lines(tmp_path, say(("user", content), ("assistant", content)), {"prompt": content, "response": content})
    examples = opened(tmp_path, source, length=128)
    for index in range(2):
        tokens = examples.train.document(index).tolist()
        assert tokens.count(EOS) == 1 and tokens[-1] == EOS
        assert ByteTokenizer().decode(tokens).count(content) == 2


def test_a_template_that_refuses_is_counted(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.chat_files = {"chat_template.jinja": (
        b"{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never say no') }}{% endif %}"
        b"{{ bos_token + m.content }}{% endfor %}")}
    source = lines(tmp_path, say(("user", "no"), ("assistant", "x")), say(("user", "yes"), ("assistant", "x")))
    examples = opened(tmp_path, source, tokenizer)
    assert examples.train.num_documents == 1
    assert "1 of 2 examples left out: chat template: " in examples.dropped and "never say no" in examples.dropped


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files(tmp_path, suffix):
    content = (json.dumps(GOOD) + "\n").encode() * 3
    compress = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    (tmp_path / f"data.jsonl.{suffix}").write_bytes(compress(content))
    assert opened(tmp_path, f"chat:{tmp_path}/data.jsonl.{suffix}").train.num_documents == 3
    (tmp_path / f"broken.jsonl.{suffix}").write_bytes(b"no" + compress(content))
    with pytest.raises(InputError, match=f"broken.jsonl.{suffix}: cannot be read"):
        opened(tmp_path, f"chat:{tmp_path}/broken.jsonl.{suffix}")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    conversation = say(("user", "a"), ("assistant", "b"))
    parquet.write_table(pyarrow.Table.from_pylist([conversation, {"messages": None}]), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / "b.parquet")
    examples = opened(tmp_path, (f"chat:{tmp_path}/a.parquet", f"chat:{tmp_path}/b.parquet"))
    same = opened(tmp_path, lines(tmp_path, conversation, GOOD))
    for index in range(2):
        assert examples.train.document(index).tolist() == same.train.document(index).tolist()
    assert "a.parquet, row 2" in examples.dropped
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"c.parquet: cannot be read as Parquet"):
        opened(tmp_path, f"chat:{tmp_path}/c.parquet")


def test_questions_are_prompts_with_their_last_answers(tmp_path):
    source = lines(tmp_path, GOOD, say(("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "e")))
    train = opened(tmp_path, source, length=64).train
    tokenizer = ByteTokenizer()
    assert train.question(0) == (tokenizer.encode("1+1="), tokenizer.encode("2"))
    prompt, answer = train.question(1)
    assert answer == tokenizer.encode("e")
    assert tokenizer.decode(prompt) == "useraassistantbcuserdassistant"


def test_the_same_question_is_never_on_both_sides(tmp_path):
    records = [{"prompt": str(i % 50), "response": str(i)} for i in range(200)]
    examples = opened(tmp_path, lines(tmp_path, *records), heldout=0.3)
    sides = [{tuple(split.question(i).prompt) for i in range(split.num_documents)}
             for split in (examples.train, examples.heldout)]
    assert sides[0].isdisjoint(sides[1]) and all(sides)
    assert examples.train.num_documents + examples.heldout.num_documents == 200


def test_the_store_is_used_again_and_knows_its_settings(tmp_path):
    source = lines(tmp_path, *[GOOD] * 5)
    first, again = opened(tmp_path, source), opened(tmp_path, source)
    assert first.fingerprint == again.fingerprint
    assert opened(tmp_path, lines(tmp_path, *[GOOD] * 6)).fingerprint != first.fingerprint
    assert sorted(p.name for p in (tmp_path / "cache").iterdir() if not p.name.startswith("examples-")) == []
    trained = opened(tmp_path, lines(tmp_path, *[{"prompt": "what is it? ", "response": "it is what it is"}] * 50),
                     name="sentencepiece")
    assert trained.tokenizer.decode(trained.train.document(0)) == "what is it? it is what it is"


@pytest.mark.parametrize(("source", "message"), [
    ("text:x", "reads chat:PATH and tasks:NAME:COUNT"),
    ("tasks:juggling", "unknown task 'juggling'; known: reverse"),
    ("tasks:sort:many", "'many' is not a number of examples"),
    ("tasks:sort:9:one", "'one' is not a seed"),
    ("chat:/nowhere.jsonl", "no such file"),
])
def test_bad_sources(tmp_path, source, message):
    with pytest.raises(InputError, match=message):
        opened(tmp_path, source)


def test_tasks_are_right_and_of_many_lengths():
    made = {name: list(synthetic.examples(name, 300)) for name in synthetic.TASKS}
    for examples in made.values():
        assert len({prompt for prompt, _ in examples}) == 300
    for prompt, response in made["sort"]:
        assert list(response) == sorted(prompt.removeprefix("sort ").removesuffix("="))
        assert 3 <= len(response) <= 12
    for prompt, response in made["reverse"]:
        assert prompt == f"reverse {response[::-1]}=" and 3 <= len(response) <= 7
    for prompt, response in made["last"]:
        assert response == sorted(prompt.removeprefix("last ").removesuffix("="))[-1]
    for prompt, response in made["addition"]:
        a, b = map(int, prompt.removeprefix("add ").removesuffix("=").split("+"))
        *lines_, total = response.split(" ")
        assert int(total) == a + b
        assert all(eval(re.sub(r"\b0+(?=\d)", "", line.replace("=", "=="))) for line in lines_)
    for prompt, response in made["count"]:
        start, stop = map(int, re.fullmatch(r"count (\d+) to (\d+)=", prompt).groups())
        assert response == " ".join(map(str, range(start, stop + 1)))
    for prompt, response in made["down"]:
        first, step = map(int, prompt.removeprefix("down ").removesuffix("=").split(" by "))
        numbers = [int(number) for number in response.split()]
        assert numbers == list(range(first, 0, -step))
    for prompt, response in made["story"]:
        have = int(re.search(r"has (\d+)", prompt)[1])
        have += sum(int(n) for n in re.findall(r"gets (\d+)", prompt))
        have -= sum(int(n) for n in re.findall(r"gives away (\d+)", prompt))
        assert response.endswith(f". {have}")
    lengths = [len(response) for examples in made.values() for _, response in examples]
    assert min(lengths) == 1 and max(lengths) >= 100
    assert list(synthetic.examples("sort", 5)) == made["sort"][:5]
    assert not set(synthetic.examples("sort", 300, seed=1)) & set(made["sort"])


def test_scorers():
    exact, numeric = scorers.make_answer_metric("exact"), scorers.make_answer_metric("numeric")
    assert [exact("", a, "ab") for a in ("ab", " ab\n", "abc")] == [1, 1, 0]
    assert [numeric("", a, "so 1,200.5") for a in ("= 1200.50", "1200.5 or 7", "none", "")] == [1, 0, 0, 0]
    assert numeric("", "no number", "none either") == 0
    assert scorers.make_answer_metric("os.path:join")("a", "b", "c") == "a/b/c"
    for name, message in [("similar", "must be one of 'exact', 'numeric', or"), ("nowhere.at:all", "No module"),
                          ("os.path:sep", "is not a function"), ("os:nothing", "nothing")]:
        with pytest.raises(ConfigError, match=message):
            scorers.make_answer_metric(name)
