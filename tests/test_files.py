"""Files are read within limits, JSON by one reader: no directory, FIFO, size, depth or half a character breaks it."""

import ast
import json
import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from illada_jax import files
from illada_jax.errors import InputError
from illada_jax.files import parse_json, read_file, read_json

PACKAGE = pathlib.Path(files.__file__).parent
# Calls of json.loads that read no file: other JSON is read by `parse_json` and `read_json`.
OWN = {
    "parallel/hosts.py": "values of other processes",
    "evaluate.py": "a copy", "evaluation/manifest.py": "a copy",
    "evaluation/lm_eval_model.py": "a context that the adapter has encoded",
    "evaluation/code_runner.py": "standard input", "data/tokenizers/template_sandbox.py": "standard input",
    "generate.py": "lines, with their numbers", "data/sources/examples.py": "lines, with their numbers",
    "data/sources/files.py": "lines, with their numbers",
}


def nested(depth, kind):
    return {"list": "[" * depth + "]" * depth, "object": '{"a":' * depth + "1" + "}" * depth,
            "mixed": '[{"a":' * (depth // 2) + "1" + "}]" * (depth // 2)}[kind]


@pytest.mark.parametrize("kind", ["list", "object", "mixed"])
@pytest.mark.parametrize("depth", [66, 900, 10**5, 10**6])
def test_deep_json_is_an_input_error(kind, depth):
    with pytest.raises(InputError, match=r"^x: nested too deeply"):
        parse_json(nested(depth, kind), "x", kind=object)
    assert parse_json(nested(64, kind), "x", kind=object)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value), "x", kind=object) == value
    assert parse_json(json.dumps(value).encode(), "x", kind=object) == value


@given(st.binary())
def test_any_bytes_are_json_or_an_input_error(content):
    try:
        parse_json(content, "x")
    except InputError as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)


@pytest.mark.parametrize(("content", "message"), [
    (b'{"a": "\xe2\x82', "not JSON"), (b"", "not JSON"), (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    (b"[1]", "must be a JSON object"), (b"x" * 6001, "has 6,001 bytes; must have at most 6,000")])
def test_the_reader_names_what_is_wrong(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"^{tmp_path}/x\.json: {message}"):
        read_json(tmp_path / "x.json", max_bytes=6000)
    with pytest.raises(InputError, match=r"nothing: cannot be read: No such file"):
        read_json(tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["directory", "FIFO", "device", "link to a FIFO", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = odd_file(tmp_path / "x", kind)
    with pytest.raises(InputError, match=rf"^{path}: "):
        read_file(path)


def odd_file(path, kind):
    if kind == "directory":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o140600)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path.with_name("fifo") if kind.startswith("link") else path)
        if kind.startswith("link"):
            path.symlink_to(path.with_name("fifo"))
    return path


def test_json_files_have_one_reader():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads"):
                found.add(str(path.relative_to(PACKAGE)))
    assert found - {"files.py"} == OWN.keys()
