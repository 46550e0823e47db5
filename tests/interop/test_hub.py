"""Ids of the Hub where a directory is expected, against an endpoint on the loopback interface."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from illada_jax import api
from tests.interop.util import checkpoint

pytest.importorskip("huggingface_hub", reason="needs the extra: pip install 'illada_jax[hub]'")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/tiny-llada"


class Endpoint(http.server.ThreadingHTTPServer):
    """The part of the Hub's interface that a download needs, for one repository. `requested` lists the paths."""

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory, self.requested = directory, []
        self.cut = ""  # a file whose transfer breaks off half-way

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requested.append(self.path)
        path = self.path.partition("?")[0]
        files = {file.name: file.read_bytes() for file in self.server.directory.iterdir()}
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/{ID}/revision/") or path == f"/api/models/{ID}":
            self.answer({"id": ID, "sha": COMMIT, "private": False, "gated": False, "tags": [], "downloads": 0,
                         "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"/api/models/{ID}/tree/"):
            self.answer([{"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                         for name, content in files.items()])
        elif path.startswith(f"/{ID}/resolve/") and name in files:
            self.send(200, files[name], {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": COMMIT,
                                         "Accept-Ranges": "bytes"}, broken=name == self.server.cut)
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound" if f"/{ID}/" in path else "RepoNotFound",
                                   "X-Error-Message": "Repository not found"})

    do_HEAD = do_GET

    def answer(self, values):
        self.send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers, broken=False):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if broken else content)
        if broken:
            self.close_connection = True

    def log_message(self, *_):
        pass


def _etag(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def endpoint(tmp_path):
    directory = checkpoint(tmp_path, "llada-gqa-tied", auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    (directory / "modeling_llada.py").write_text("raise SystemExit('remote code was run')\n")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    with Endpoint(directory) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def typed(endpoint, tmp_path, command, *options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_ENDPOINT": endpoint,
                   "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run([sys.executable, "-m", f"illada_jax.{command}", *options], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)


def test_a_hub_id_is_downloaded_once_and_equals_its_directory(endpoint, tmp_path):
    downloaded = typed(endpoint.url, tmp_path, "generate", f"--checkpoint={ID}", "--prompt=ab", "--max_new_tokens=32",
                    "--output=json")
    assert downloaded.returncode == 0, downloaded.stderr
    there = api.load(str(endpoint.directory)).generate(["ab"], max_new_tokens=32)[0]
    assert json.loads(downloaded.stdout)["tokens"] == there.tokens != []
    downloaded_files = {path.rpartition("/")[2] for path in endpoint.requested if "/resolve/" in path}
    assert downloaded_files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    endpoint.shutdown()
    endpoint.server_close()
    # The server has stopped: the cached download is used.
    converted = typed(endpoint.url, tmp_path, "convert", f"--source={ID}", f"--target={tmp_path / 'workdir'}")
    assert converted.returncode == 0 and converted.stdout.endswith("workdir, llada, float32\n"), converted.stderr


@pytest.mark.parametrize("name, cut", [("someone/nothing", ""), (ID, "model.safetensors")])
def test_a_failed_download_is_one_line(endpoint, tmp_path, name, cut):
    endpoint.cut = cut
    got = typed(endpoint.url, tmp_path, "convert", f"--source={name}", f"--target={tmp_path / 'workdir'}")
    errors = [line for line in got.stderr.splitlines() if line.startswith("error: ")]
    assert got.returncode == 2 and len(errors) == 1 and "Traceback" not in got.stderr, got.stderr
    assert f"{name}: no such directory, and the Hub download failed: " in errors[0]
    assert not (tmp_path / "workdir").exists()
    if cut:  # the next attempt downloads the rest
        endpoint.cut = ""
        again = typed(endpoint.url, tmp_path, "convert", f"--source={name}", f"--target={tmp_path / 'workdir'}")
        assert again.returncode == 0, again.stderr
