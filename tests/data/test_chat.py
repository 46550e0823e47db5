"""Chat templates: rendered as transformers does, contents yield no special tokens, each answer has one end token."""

import functools
import json

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from illada_jax.data.tokenizers import ByteTokenizer, load_tokenizer, tokenizer_from_files, train_sentencepiece
from illada_jax.data.tokenizers.chat import chat_format, encode_chat, encode_conversation
from illada_jax.errors import InputError
from tests.data import toy_tokenizers

CHATML = ("{% for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}\n"
          "{% endfor %}\n{% if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' -}}\n{% endif %}")
TRIMMING = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_end|>' }}"
            "{% generation %}{{ m['content'] | trim }}{% endgeneration %}{{ '<|eot|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>' }}{% endif %}")
NO_SYSTEM = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
             "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}")
# Drops the thoughts of earlier turns, as templates of reasoning models do.
FORGETFUL = ("{% for m in messages %}{% set c = m.content %}"
             "{% if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}"
             "{% endif %}{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# Additions of transformers to Jinja: arguments of tojson, breaks, the scope of generation, namespaces.
EXTRAS = ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set x = 1 %}{% set ns.n = ns.n + 1 %}"
          "{% generation %}{% set x = 2 %}{{ {'é': m.content, 'a': [x]} | tojson(indent=1, separators=(',', ':')) }}"
          "{{ dict(c=m.content) | tojson(ensure_ascii=True, sort_keys=True) }}{% endgeneration %}{{ x }}{{ ns.n }}"
          "{% if m.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% if loop.index == 3 %}{% break %}{% endif %}"
          "{% endfor %}")
TEMPLATES = {"chatml": CHATML, "trimming": TRIMMING, "no_system": NO_SYSTEM, "forgetful": FORGETFUL}
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|mdm_mask|>"]
CHAT = [{"role": "user", "content": " What is 2 + 2?  "},
        {"role": "assistant", "content": "<think>easy</think>\nFour, I think."},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes.\n"}]


def vocabulary() -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["user assistant\nWhat think is this? <|im_ <|"] * 9, trainer)
    return tokenizer.to_str()


def tokenizer_with(template: str):
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "mask_token": None,
              "chat_template": template}
    return tokenizer_from_files({"tokenizer.json": vocabulary().encode(),
                                 "tokenizer_config.json": json.dumps(config).encode()})


def library_rendering(template: str, messages: list, add_generation_prompt: bool) -> list[int]:
    """The ids from jinja2 and `tokenizers`: the whole text is rendered, then special tokens are matched in it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text = environment.from_string(plain).render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>")
    return tokenizers.Tokenizer.from_str(vocabulary()).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["chatml", "trimming", "forgetful"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_renders_as_the_library_does(name, add_generation_prompt, turns):
    got = encode_chat(tokenizer_with(TEMPLATES[name]), CHAT[:turns], add_generation_prompt)
    assert got == library_rendering(TEMPLATES[name], CHAT[:turns], add_generation_prompt)


@pytest.mark.parametrize("template", [CHATML, TRIMMING, FORGETFUL, EXTRAS])
def test_renders_as_transformers_does(template, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_with(template).save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    system = [{"role": "system", "content": "Be brief.\n"}]
    for messages in (CHAT[:1], CHAT, system + CHAT[:3]):
        for prompt in (True, False):
            want = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
            assert encode_chat(load_tokenizer(tmp_path), messages, prompt) == want


@given(parts=st.lists(st.sampled_from([*SPECIALS, "<|im_", "start|>", "<", ">", "|", "s>", "<|eot", " ", "\n", "a",
                                       "\U000f0000", "\U000f0001"]), max_size=6),
       name=st.sampled_from(["bytes", "sentencepiece", *TEMPLATES]))
@settings(max_examples=300, deadline=None)
def test_contents_never_become_special_tokens(tokenizers_by_name, parts, name):
    tokenizer, content = tokenizers_by_name[name], "".join(parts)
    turns = lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": text}]  # noqa: E731
    specials = set(tokenizer.special_tokens.values())
    only_specials = lambda ids: [i for i in ids if i in specials]  # noqa: E731
    ids = encode_chat(tokenizer, turns(content), True)
    assert only_specials(ids) == only_specials(encode_chat(tokenizer, turns("x"), True))
    if name not in ("trimming", "no_system"):  # these change white space at the edges
        assert content in tokenizer.decode(ids)


@pytest.fixture(scope="module")
def tokenizers_by_name():
    return {"bytes": ByteTokenizer(), "sentencepiece": train_sentencepiece(["user assistant what"] * 9, 280),
            **{name: tokenizer_with(template) for name, template in TEMPLATES.items()}}


def test_half_a_special_token_is_not_completed_by_the_template():
    tokenizer = tokenizer_with("{% for m in messages %}<|im_{{ m.content }}end|>{% endfor %}")
    end_id = tokenizer.special_tokens["<|im_end|>"]
    ids = encode_chat(tokenizer, [{"role": "user", "content": " start|> <|im_"}], False)
    assert not {end_id, tokenizer.special_tokens["<|im_start|>"]} & set(ids)
    assert tokenizer.decode(ids) == "<|im_ start|> <|im_end|>"


def test_default_template_by_hand():
    tokenizer = ByteTokenizer()
    bos, eos, text = tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "<eos>"},
                {"role": "assistant", "content": "A"}]
    head = [bos, *text("system"), bos, *text("S"), bos, *text("user"), bos, *text("<eos>"),
            bos, *text("assistant"), bos]
    assert encode_chat(tokenizer, messages[:2], True) == head
    assert encode_chat(tokenizer, messages, False) == [*head, *text("A"), eos]
    ids, is_answer, _ = encode_conversation(tokenizer, messages)
    assert ids == [*head, *text("A"), eos]
    assert is_answer == [False] * len(head) + [True, True]


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("trimming", "<|eot|>"), ("no_system", "</s>"),
                                           ("forgetful", "<|im_end|>")])
def test_each_answer_ends_with_one_end_token(name, end):
    tokenizer = tokenizer_with(TEMPLATES[name])
    end_id = tokenizer.special_tokens[end]
    assert chat_format(tokenizer).end_id == end_id
    ids, is_answer, _ = encode_conversation(tokenizer, CHAT)
    answers = [[]]
    for token, flag in zip(ids, is_answer, strict=True):
        if flag:
            answers[-1].append(token)
        elif answers[-1]:
            answers.append([])
    texts = [tokenizer.decode(answer).strip() for answer in answers]
    first = "Four, I think." if name == "forgetful" else "<think>easy</think>\nFour, I think."
    assert texts == [first, "Yes."]
    assert all(answer[-1] == end_id and answer.count(end_id) == 1 for answer in answers)
    assert ids[-1] == end_id


def test_system_message_is_prepended_to_the_first_user_message_without_a_system_role():
    tokenizer = tokenizer_with(NO_SYSTEM)
    system = {"role": "system", "content": "Be brief."}
    merged = [{"role": "user", "content": "Be brief.\n\nHi"}]
    assert encode_chat(tokenizer, [system, {"role": "user", "content": "Hi"}], True) == library_rendering(
        NO_SYSTEM, merged, True)
    with pytest.raises(InputError, match="no system role"):
        encode_chat(tokenizer, [system], True)


def test_template_travels_with_the_tokenizer(tmp_path):
    saved = tokenizer_with(CHATML)
    saved.save(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").chat_template == CHATML
    assert saved.fingerprint == tokenizer_with(TRIMMING).fingerprint  # the same ids: weights fit both
    (tmp_path / "a" / "chat_template.jinja").write_text(TRIMMING)
    assert load_tokenizer(tmp_path / "a").chat_template == TRIMMING
    assert load_tokenizer(tmp_path / "a" / "tokenizer.json").chat_template == TRIMMING
    ByteTokenizer().save(tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    bytes_ = load_tokenizer(tmp_path / "b")
    with pytest.raises(InputError, match="does not render the content of assistant messages"):
        encode_chat(bytes_, CHAT[:1], True)


NAMED = [{"name": "tools", "template": CHATML}, {"name": "rag", "template": TRIMMING}]


@pytest.mark.parametrize(("name", "content"), [
    ("chat_template.jinja", CHATML), ("chat_template.json", {"chat_template": CHATML}),
    ("tokenizer_config.json", {"chat_template": CHATML}), ("tokenizer_config.json", {"chat_template": NAMED[:1]}),
    ("chat_template.json", {"chat_template": [*NAMED[1:], {"name": "default", "template": CHATML}]}),
])
def test_a_template_is_found_wherever_it_is(name, content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(vocabulary())
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(path)):
        assert tokenizer.chat_template == CHATML
        tokenizer.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").chat_template == CHATML


def test_of_several_templates_one_must_be_chosen(tmp_path):
    files = {"tokenizer.json": vocabulary().encode(),
             "tokenizer_config.json": json.dumps({"chat_template": NAMED, "eos_token": "</s>"}).encode()}
    tokenizer = tokenizer_from_files(files)
    assert tokenizer.encode("text needs no template")
    with pytest.raises(InputError, match=r"several chat templates: tools, rag; choose .* --chat_template"):
        encode_chat(tokenizer, CHAT[:1], True)
    with pytest.raises(InputError, match=r"chat_template = 'default': unknown; the tokenizer has tools, rag"):
        tokenizer.choose_chat_template("default")
    tokenizer.choose_chat_template("rag")
    assert tokenizer.chat_template == TRIMMING
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == TRIMMING


PHI = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.parametrize(("template", "ends"), [
    (CHATML, ["<|im_end|>", "<|im_start|>"]), (TRIMMING, ["<|eot|>", "<|im_start|>"]),
    (NO_SYSTEM, ["</s>", "<|im_start|>"]), (FORGETFUL, ["<|im_end|>", "<|im_start|>"]),
    (PHI, ["<|end|>", "<|assistant|>", "<|user|>"]),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}", ["</s>"]),
    # Takes one turn only.
    ("{% if messages | length > 2 %}{{ raise_exception('long') }}{% endif %}"
     "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}", ["</s>"]),
])
def test_an_answer_ends_where_a_turn_begins(template, ends):
    table = tokenizers.Tokenizer.from_str(vocabulary())
    table.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer = tokenizer_from_files({"tokenizer.json": table.to_str().encode(), "tokenizer_config.json": json.dumps(
        {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}).encode()})
    assert list(chat_format(tokenizer).stop_ids) == [tokenizer.special_tokens[end] for end in ends]


@pytest.mark.parametrize("make", [toy_tokenizers.llama, functools.partial(toy_tokenizers.llama, "first"),
                                  functools.partial(toy_tokenizers.llama, "always"), toy_tokenizers.unigram])
def test_blanks_of_a_chat_are_those_of_the_library(make):
    tokenizer = tokenizer_from_files({**toy_tokenizers.files_of(make()), "chat_template.jinja": (
        b"{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
        b"{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}")})
    text = "<|turn|>user\nthe cat <|end|><|turn|>assistant\nis a<|end|><|turn|>user\n then<|end|><|turn|>assistant\n"
    messages = [{"role": role, "content": content} for role, content in (
        ("user", "the cat "), ("assistant", "is a"), ("user", " then"))]
    assert encode_chat(tokenizer, messages, True) == make().encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("messages", "message"), [
    ([], "must not be empty"),
    ("hello", "must be a list of objects"),
    (["hello"], "message 1: must be an object"),
    ([{"role": "user"}], "message 1: has no 'content'"),
    ([{"role": "robot", "content": "x"}], "message 1: unknown role 'robot'"),
    ([{"role": "user", "content": None}], "message 1: content must be a string"),
    ([CHAT[0], {"role": "system", "content": "x"}], "message 2: a system message must come first"),
])
def test_bad_messages(messages, message):
    with pytest.raises(InputError, match=message):
        encode_chat(ByteTokenizer(), messages, True)


@pytest.mark.parametrize(("template", "message"), [
    ("{% for m in messages %}", "broken, line 1"),
    ("{{ messages[0].content }}{{ messages[7].content + 'x' }}", "rejects"),
    ("{{ messages[0].content.__class__.__mro__ }}{{ messages.append(1) }}", "rejects"),
])
def test_bad_templates(template, message):
    with pytest.raises(InputError, match=message):
        encode_chat(tokenizer_with(template), CHAT[:1], True)


def test_unreadable_tokenizer_config():
    with pytest.raises(InputError, match="no chat template can be read"):
        tokenizer_from_files({"tokenizer.json": vocabulary().encode(), "tokenizer_config.json": b"[1]"})


def test_conversation_without_an_answer():
    with pytest.raises(InputError, match="no answer to learn"):
        encode_conversation(ByteTokenizer(), CHAT[:1])
