"""A bucket gs://… that lives in a local directory, for all code of this process: `python -m tests.training.bucket`.

Two libraries reach object storage on their own: fsspec, for all that goes through epath, and TensorStore, which speaks
HTTP, for arrays. Both see the same objects here. As in a real bucket there are no directories but what names suggest,
objects appear whole when they are closed, and nothing can be appended to.
"""

import json
import os
import pathlib
import re
import sys
import tempfile
import threading
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec


class Objects:
    """Objects by `BUCKET/NAME`, each a file."""

    def __init__(self, directory):
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(exist_ok=True)

    def file(self, name):
        return self._directory / urllib.parse.quote(name, safe="")

    def names(self, prefix=""):
        names = (urllib.parse.unquote(path.name) for path in self._directory.iterdir())
        return sorted(name for name in names if name.startswith(prefix) and not name.startswith("?"))

    def writer(self, name):
        return _Writer(self, name)

    def write(self, name, content):
        with self.writer(name) as file:
            file.write(content)


class _Writer:
    """A file that replaces its target when it is closed."""

    def __init__(self, objects, name):
        handle, self._partial = tempfile.mkstemp(prefix="%3F", dir=objects.file("x").parent)
        self._file, self._target = os.fdopen(handle, "wb"), objects.file(name)

    def close(self):
        if not self._file.closed:
            self._file.close()
            os.replace(self._partial, self._target)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def file_system(objects):
    """The class that fsspec makes a file system of."""

    class Bucket(fsspec.AbstractFileSystem):
        protocol = ("gcs", "gs")
        cachable = False

        def ls(self, path, detail=True, **_):
            path = self._strip_protocol(path)
            found = {}
            for name in objects.names():
                if name == path:
                    found[name] = {"name": name, "size": objects.file(name).stat().st_size, "type": "file"}
                elif name.startswith(f"{path}/"):
                    child = f"{path}/{name[len(path) + 1 :].split('/')[0]}"
                    size = objects.file(name).stat().st_size if child == name else 0
                    found[child] = {"name": child, "size": size, "type": "file" if child == name else "directory"}
            if not found:
                raise FileNotFoundError(path)
            return list(found.values()) if detail else list(found)

        def _open(self, path, mode="rb", **_):
            if mode == "rb":
                return open(objects.file(path), "rb")
            if mode == "wb":
                return objects.writer(path)
            raise NotImplementedError(f"{mode}: objects cannot be changed")

        def mkdir(self, path, **_):
            pass

        def makedirs(self, path, exist_ok=False):
            if not exist_ok and self.exists(path):
                raise FileExistsError(path)

        def rm(self, path, recursive=False, **_):
            for name in self._below(path) if recursive else [self._strip_protocol(path)]:
                objects.file(name).unlink()

        def mv(self, source, target, **_):
            source, target = self._strip_protocol(source), self._strip_protocol(target)
            for name in self._below(source):
                os.replace(objects.file(name), objects.file(target + name[len(source) :]))

        def _below(self, path):
            path = self._strip_protocol(path)
            names = [name for name in objects.names(path) if name == path or name.startswith(f"{path}/")]
            if not names:
                raise FileNotFoundError(path)
            return names

    return Bucket


def http_handler(objects):
    """The part of the JSON API of Google Cloud Storage that TensorStore uses."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self, code, content=b"", **headers):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _asked(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            bucket, name = re.match(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?$", url.path).groups()
            return bucket, urllib.parse.unquote(name or query.get("name", "")), query

        def _generation(self, name):
            file = objects.file(name)
            return file.stat().st_mtime_ns if file.exists() else 0

        def do_GET(self):
            bucket, name, query = self._asked()
            if not name:
                names = [n[len(bucket) + 1 :] for n in objects.names(f"{bucket}/{query.get('prefix', '')}")]
                return self._answer(200, {"items": [{"name": n, "size": "0"} for n in names]})
            path = f"{bucket}/{name}"
            generation = self._generation(path)
            if not generation:
                return self._answer(404)
            if query.get("ifGenerationNotMatch") == str(generation):
                return self._answer(304)
            content = objects.file(path).read_bytes()
            headers = {"x_goog_generation": generation}
            part = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not part:
                return self._answer(200, content, **headers)
            first, last = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._answer(206, content[first : last + 1], **headers)

        def do_POST(self):
            bucket, name, query = self._asked()
            content = self.rfile.read(int(self.headers["Content-Length"]))
            path = f"{bucket}/{name}"
            if query.get("ifGenerationMatch", str(self._generation(path))) != str(self._generation(path)):
                return self._answer(412)
            objects.write(path, content)
            return self._answer(200, {"name": name, "generation": str(self._generation(path)),
                                      "size": str(len(content))})

        def do_DELETE(self):
            bucket, name, _ = self._asked()
            objects.file(f"{bucket}/{name}").unlink(missing_ok=True)
            return self._answer(204)

    return Handler


def mount(directory):
    """Makes gs://… of this process the objects in a directory. Call it before TensorStore is imported."""
    objects = Objects(directory)
    server = ThreadingHTTPServer(("localhost", 0), http_handler(objects))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://localhost:{server.server_port}"
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "anyone"
    fsspec.register_implementation("gcs", file_system(objects), clobber=True)
    fsspec.register_implementation("gs", file_system(objects), clobber=True)
    # Orbax asks Google's own client whether the bucket has real directories before it deletes.
    plain = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: plain)
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    sys.modules |= {"google.cloud": cloud, "google.cloud.storage": storage}
    return objects


if __name__ == "__main__":
    directory, command, *sys.argv[1:] = sys.argv[1:]
    mount(directory)
    import importlib

    from illada_jax import cli

    cli.run(importlib.import_module(f"illada_jax.{command}").main)
