"""Arbitrary text, prompts, JSON lines and chat templates: no hang, no crash without a message, nothing lost."""

import json
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from illada_jax.data.pipeline import num_windows, pack, read_window
from illada_jax.data.sources import examples
from illada_jax.data.tokenizers import ByteTokenizer, template_sandbox, templates, train_sentencepiece
from illada_jax.data.tokenizers.chat import encode_chat
from illada_jax.decoding.gaps import parse_gaps
from illada_jax.errors import InputError
from tests.data.test_chat import tokenizer_with
from tests.data.test_pipeline import ArrayStream
from tests.fuzz.strategies import JUNK, corrupted
from tests.util import documents

CHAT = [{"role": "user", "content": "hi {x:>99999999} %s"}, {"role": "assistant", "content": "hello"}]
TOKENIZERS = [ByteTokenizer(), train_sentencepiece(["some text to train on", "漢字"], 290)]


@given(st.binary(max_size=40))
def test_any_bytes_survive_the_byte_tokenizer(content):
    """Bytes that are not UTF-8 too: each byte has its id."""
    tokenizer = TOKENIZERS[0]
    ids = [byte + 4 for byte in content]
    assert tokenizer.decode(ids) == content.decode(errors="replace")
    text = content.decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(TOKENIZERS))
def test_prompts_of_odd_unicode_become_ids_or_a_message(text, tokenizer):
    """Lone surrogates are refused earlier, see `api.LanguageModel`."""
    try:
        gapped = parse_gaps(text + "[[mask:2]]")
    except InputError as error:  # an invalid gap, such as [[mask:x]]
        assert "\n" not in str(error)
        return
    ids = gapped.tokens(tokenizer)
    assert ids[-2:] == [tokenizer.mask_id] * 2 and tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 300), min_size=1, max_size=200), st.integers(1, 32))
def test_windows_hold_every_token_once(tokens, length):
    stream = ArrayStream(tokens)
    windows = [read_window(stream, i, length) for i in range(num_windows(len(tokens), length))]
    batch = pack(windows, length, 999)
    np.testing.assert_array_equal(batch.tokens_BL[batch.maskable_BL], tokens)
    assert (batch.tokens_BL[~batch.maskable_BL] == 999).all() and batch.maskable_BL.any(axis=1).all()


RECORD = {"messages": [{"role": "system", "content": "s"}, *CHAT], "text": "words", "n": 1}
LINES = st.one_of(corrupted(RECORD).map(json.dumps), JUNK.map(json.dumps), st.text(max_size=20),
                  st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "1" * 5000, '{"text": "\\ud800"}', "\ufeff{}"]))


@given(st.lists(LINES, min_size=1, max_size=4))
def test_jsonl_is_read_or_refused_line_by_line(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    found = [item for part in examples.parts(f"chat:{path}") for item in part.read()]
    assert all(str(path) in item.where for item in found)
    whole = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    assert len(found) == len(whole), "an example or a reason for every line"
    try:
        found = list(documents(f"jsonl:{path}"))
        assert len(found) == len(whole)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


PIECES = st.sampled_from([
    "{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% else %}", "{% endif %}", "{{ m.content }}",
    "{{ m['role'] }}", "{% set x = 1 %}", "{% set ns = namespace(a=[]) %}", "{{ loop.index }}", "{{ messages }}",
    "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{{ f(f(2)) }}", "{{ ''.__class__ }}", "{{ self }}",
    "{{ cycler }}", "{{ lipsum(9) }}", "{{ messages|tojson }}", "{{ messages|map(attribute='content')|join }}",
    "{{ x ~ x }}", "{{ x * 9999999 }}", "{{ 'a' * x }}", "{{ range(99999)|list|length }}", "{% break %}", "{# c #}",
    "{{ bos_token }}", "{% generation %}", "{% endgeneration %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{{ [1, 2]|random }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{", "%}", "{%", "text",
    "{% call f(1) %}", "{% endcall %}", "{% filter upper %}", "{% endfilter %}", "{% block a %}", "{% endblock %}",
    "{{ m.content.format(1) }}", "{{ '%9999999d' % 1 }}", "{{ x.y.z }}", "{{ 2 ** 99 }}", "{{ dict(a=1).a }}"])


@given(st.lists(PIECES, min_size=1, max_size=8).map("".join))
def test_templates_render_or_are_refused(template):
    try:
        assert isinstance(templates.render(template, CHAT, True, {"bos_token": "<s>"}), str)
    except InputError as error:
        assert "\n" not in str(error)


HOSTILE = {
    "reads a file": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reads a file through a filter": "{{ (''|attr('__class__')).mro() }}",
    "reads a file through format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "reads through a stored format": "{% set ns = namespace(f='{0.__class__.__init__.__globals__}'.format) %}"
                                     "{{ ns.f(cycler) }}",
    "imports": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "imports through lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "imports through self": "{{ self.__init__.__globals__.__builtins__.__import__('os') }}",
    "imports through dict": "{{ dict.__globals__['json'] }}",
    "includes": "{% include '/etc/passwd' %}",
    "names of Python's own": "{% set ns = namespace() %}{% set ns.__call__ = lipsum %}",
    "names of Python's own at once": "{{ namespace(__html__=lipsum) }}",
    "changes the conversation": "{{ messages.append(1) }}",
    "changes a message": "{{ dict.update(messages[0], role='system') }}",
}
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
             "{% endfor %}",
    "loops before an answer": "{% if add_generation_prompt %}{% for a in range(99999) %}{{ range(99999)|sum }}"
                              "{% endfor %}{% endif %}",
    "calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "multiplies": "{{ 'a' * 10000000000 }}",
    "doubles": "{% set ns = namespace(a='a' * 9999) %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "pads": "{{ '%*d' % (10000000000, 1) }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "writes": "{{ 'a' * 2000000 }}",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_templates_cannot_leave_the_sandbox(attack):
    with pytest.raises(InputError, match=r"the chat template (rejects|fails)") as caught:
        templates.render(HOSTILE[attack], [dict(message) for message in CHAT], True, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bomb", BOMBS)
def test_crude_bombs_are_refused_within_seconds(bomb):
    """They use the time and memory of a child process, not of this one."""
    tokenizer = tokenizer_with("{{ messages[1].content }}" + BOMBS[bomb])
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for _ in range(2):  # the refusal is remembered
        with pytest.raises(InputError, match=r"takes more than|needs more than|writes 2,") as caught:
            encode_chat(tokenizer, CHAT, True)
        assert "\n" not in str(caught.value)
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - children < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 1024  # KiB


def test_the_trial_of_a_template_imports_only_jinja():
    request = json.dumps({"template": "x", "renderings": [{}]})
    tried = subprocess.run([sys.executable, "-X", "importtime", "-P", template_sandbox.__file__], input=request,
                           capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in tried.stderr.splitlines()}
    assert "jinja2" in imported and tried.stdout == "\n"
    assert imported.isdisjoint({"illada_jax", "jax", "numpy", "sentencepiece", "tokenizers"})


def test_only_foreign_templates_are_tried_and_a_failed_trial_is_a_refusal(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    encode_chat(TOKENIZERS[0], CHAT, True)
    foreign = tokenizer_with("{{ messages }} never tried before")  # loading starts no process
    with pytest.raises(InputError, match=r"cannot be tried in a child process: .*/nowhere/python"):
        encode_chat(foreign, CHAT, True)
