"""Runs one generated program; `code_execution.py` starts this file in the sandbox, where the package is not visible.

Standard input holds one line of JSON: the program, a secret token and the limits. Standard output gets `STARTED`, then
the token if the program ran to its end, or else the error that it raised.
"""

import json
import os
import resource
import sys
import types

STARTED = b"\n"
NOBODY = 65534
PROCESSES, OPEN_FILES, FILE_BYTES = 32, 64, 16 << 20


def limit(seconds: int, megabytes: int) -> None:
    """Sets hard limits per process, gives up root, and lets the kernel kill this process first if memory runs out."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    for name, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, megabytes << 20),
                        (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_NPROC, PROCESSES),
                        (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(name, (value, value))
    if os.getuid() == 0:  # the kernel does not limit root's number of processes
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def main() -> None:
    """Reads the task and waits for the process that runs the program; when this process ends, all others are killed."""
    task = json.loads(sys.stdin.readline())
    child = os.fork()
    if not child:
        run(task)
    while os.wait()[0] != child:  # as the first process in the sandbox, it also reaps the orphans of others
        pass


def run(task: dict) -> None:
    """Runs the program in its own module, reports the verdict and exits."""
    report = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    limit(task["seconds"], task["megabytes"])
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    # Local names: the program may patch `os`, and a process that it forks must not report.
    write, leave, get_pid, pid, token = os.write, os._exit, os.getpid, os.getpid(), task["token"].encode()
    write(report, STARTED)
    try:
        exec(compile(task["program"], "program.py", "exec"), vars(module))
        verdict = token
    except BaseException as error:  # SystemExit too: a program that exits has not run to its end
        verdict = f"{type(error).__name__}: {error}"[:200].encode(errors="replace")
    if get_pid() == pid:
        write(report, verdict)
    leave(0)


if __name__ == "__main__":
    main()
