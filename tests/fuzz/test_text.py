"""Text, prompts, JSONL and chat templates of any kind: no hang, no crash without a message, nothing lost."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from illada_jax.data.pipeline import num_windows, pack, read_window
from illada_jax.data.sources import examples
from illada_jax.data.sources import registry as sources
from illada_jax.data.tokenizers.chat import encode_chat
from illada_jax.data.tokenizers.tokenizer import ByteTokenizer, train_sentencepiece
from illada_jax.decoding.gaps import parse_gaps
from illada_jax.errors import InputError
from tests.data.test_chat import tokenizer_with
from tests.data.test_pipeline import ArrayStream
from tests.fuzz.strategies import JUNK, spoilt

CHAT = [{"role": "user", "content": "hi {x:>99999999} %s"}, {"role": "assistant", "content": "hello"}]
TOKENIZERS = [ByteTokenizer(), train_sentencepiece(["some text to train on", "漢字"], 290)]


@given(st.binary(max_size=40))
def test_any_bytes_survive_the_byte_tokenizer(content):
    """Also those that are no UTF-8: ids stand for bytes one by one."""
    tokenizer = TOKENIZERS[0]
    ids = [byte + 4 for byte in content]
    assert tokenizer.decode(ids) == content.decode(errors="replace")
    text = content.decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(TOKENIZERS))
def test_prompts_of_odd_unicode_become_ids_or_a_message(text, tokenizer):
    """Halves of surrogate pairs are refused before, see `api.LanguageModel`."""
    try:
        gapped = parse_gaps(text + "[[mask:2]]")
    except InputError as error:  # a gap that is none, such as [[mask:x]]
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
LINES = st.one_of(spoilt(RECORD).map(json.dumps), JUNK.map(json.dumps), st.text(max_size=20),
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
        documents = list(sources.documents(f"jsonl:{path}"))
        assert len(documents) == len(whole)
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
        ids = encode_chat(tokenizer_with(template), CHAT, True)
        assert all(isinstance(i, int) for i in ids)
    except InputError as error:
        assert "\n" not in str(error)


ATTACKS = {
    "reads a file": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reads a file through a filter": "{{ (''|attr('__class__')).mro() }}",
    "reads a file through format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "imports": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "imports through lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "imports through self": "{{ self.__init__.__globals__.__builtins__.__import__('os') }}",
    "includes": "{% include '/etc/passwd' %}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
             "{% endfor %}",
    "loops in filters": "{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "multiplies": "{{ 'a' * 10000000000 }}",
    "multiplies backwards": "{{ 10000000000 * [1] }}",
    "doubles": "{% set ns = namespace(a='a' * 9999) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "joins": "{% set ns = namespace(a='a' * 9999) %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "pads": "{{ 'a'.center(10000000000) }}",
    "pads by a filter": "{{ 'a'|center(10000000000) }}",
    "pads by a format": "{{ '%010000000000d' % 1 }}",
    "pads by a format's argument": "{{ '%*d' % (10000000000, 1) }}",
    "pads by format": "{{ '{:>10000000000}'.format(1) }}",
    "pads by the format filter": "{{ '%10000000000d'|format(1) }}",
    "powers": "{{ 9 ** 9 ** 9 }}",
    "replaces": "{% set ns = namespace(a='a' * 10000) %}{% for i in range(9) %}"
                "{% set ns.a = ns.a.replace('a', ns.a) %}{% endfor %}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_templates_cannot_leave_or_exhaust_the_sandbox(attack):
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        encode_chat(tokenizer_with("{{ messages[1].content }}" + ATTACKS[attack]), CHAT, True)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 30
