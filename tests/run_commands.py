"""Runs several commands of the package in one process, which imports and compiles once.

    python -m tests.run_commands < commands.json > results.json

A command is {"argv": ["python", "-m", "illada_jax.MODULE", …] or ["python", FILE, …], "stdin": text}; its result
{"code", "stdout", "stderr", "cpu_seconds"}.
"""

import contextlib
import io
import json
import runpy
import sys
import time
import traceback

from absl import app, flags

from illada_jax import console

console.hard_exit = sys.exit
app.define_help_flags()
_ABSL = set(flags.FLAGS)


def run(argv: list[str], stdin: str) -> dict:
    """Runs one command as the shell would."""
    for name in set(flags.FLAGS) - _ABSL:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    out, err, code, started = io.StringIO(), io.StringIO(), 0, time.process_time()
    module = argv[1] == "-m"
    sys.argv = argv[2:] if module else argv[1:]
    sys.stdin = io.StringIO(stdin)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if module:
                runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(argv[1], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    seconds = round(time.process_time() - started, 2)
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue(), "cpu_seconds": seconds}


if __name__ == "__main__":
    results = [run(**command) for command in json.load(sys.stdin)]
    json.dump(results, sys.__stdout__)
