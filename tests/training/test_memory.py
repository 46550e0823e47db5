"""Memory that a save leaves behind."""

import ctypes
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import tensorstore
from etils import epath

from illada_jax.config import Config
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.training.checkpoints import Checkpoints

_BLOCK, _BLOCKS = 60_000, 1000  # bytes: too small to be mapped singly


def resident():
    """Resident bytes of this process without pages of files."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_memory_that_threads_of_a_save_have_freed_is_returned(tmp_path):
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    kept = []

    def work():
        blocks = [libc.malloc(ctypes.c_size_t(_BLOCK)) for _ in range(_BLOCKS)]
        kept.append(libc.malloc(ctypes.c_size_t(_BLOCK)))  # above the others, so that they are not returned when freed
        for block in blocks:
            ctypes.memset(block, 1, _BLOCK)
        for block in blocks:
            libc.free(ctypes.c_void_p(block))

    with Checkpoints(epath.Path(tmp_path), Config(), ByteTokenizer(), "none") as checkpoints:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        before = resident()
        assert checkpoints.problems() == []
        assert before - resident() > 0.9 * _BLOCK * _BLOCKS
    libc.free(ctypes.c_void_p(kept[0]))


ARENAS = """
import ctypes, pathlib, sys, threading
from illada_jax.training.memory import limit_arenas
limit_arenas()
import jax
jax.numpy.zeros(1).block_until_ready()
libc, ready = ctypes.CDLL(None), threading.Barrier(21)
libc.fopen.restype = ctypes.c_void_p
def work():
    ctypes.create_string_buffer(60_000)
    ready.wait()
    ready.wait()
for _ in range(20):
    threading.Thread(target=work).start()
ready.wait()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
ready.wait()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc")
def test_threads_share_few_arenas(tmp_path):
    subprocess.run([sys.executable, "-c", ARENAS, tmp_path / "arenas.xml"], check=True)
    assert (tmp_path / "arenas.xml").read_text().count("<heap nr=") == max(1, os.cpu_count() // 2)


def test_a_save_asks_for_no_metrics_which_tensorstore_does_not_free():
    assert tensorstore.experimental_collect_matching_metrics("/tensorstore/") == []
