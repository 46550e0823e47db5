"""What runs inside the sandbox: gives up its rights, then executes the program that it reads. Started by `sandbox.py`.

It imports nothing of this project, so that it starts fast and has nothing worth reaching for. Standard input holds one
JSON line with the limits and the program; when the program has run to its end, a token that only the parent knows is
written to a pipe. A program that exits early, however politely, has not run to its end.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIGKILL, EPERM = 9, 1
ALLOW, DENY = 0x7FFF0000, 0x00050000 | EPERM
# Classic BPF: load a word of the seccomp data, jump if equal / if bits are set, return.
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# No new processes or threads, no sockets, no signals to others, nothing that changes files, no way around the filter.
# System call numbers of each architecture; `open` and `openat` are refused when they would write.
SYSTEM_CALLS = {
    "x86_64": {
        "audit": 0xC000003E,
        "open": {2: 1, 257: 2},  # number: which argument holds the flags
        "denied": (
            41, 42, 43, 49, 50, 53, 288,  # socket, connect, accept, bind, listen, socketpair, accept4
            56, 57, 58, 59, 322, 435,  # clone, fork, vfork, execve, execveat, clone3
            62, 200, 234, 129, 297, 424, 101, 310, 311, 438,  # signals, ptrace, process_vm, pidfd
            76, 77, 82, 83, 84, 85, 86, 87, 88, 258, 259, 263, 264, 265, 266, 285, 316, 437,  # truncate … openat2
            90, 91, 92, 93, 94, 260, 268, 280, 132, 235, 261, 452, 133,  # chmod, chown, utime, mknod
            188, 189, 190, 197, 198, 199,  # extended attributes
            165, 166, 155, 161, 169, 170, 171, 272, 308, 428, 429, 430, 431, 432, 442,  # mount, chroot, unshare, setns
            319, 425, 426, 427, 304, 321, 298, 323, 250, 248, 249, 175, 313, 246, 320,  # memfd, io_uring, bpf …
            29, 30, 31, 67, 64, 65, 66, 68, 69, 70, 71, 240, 241,  # shared memory, semaphores, message queues
            160, 302, 141, 142, 144, 203, 314,  # limits, priorities
        ),
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "open": {56: 2},
        "denied": (
            198, 199, 200, 201, 202, 203, 242,
            220, 221, 281, 435,
            129, 130, 131, 138, 240, 424, 117, 270, 271, 438,
            33, 34, 35, 36, 37, 38, 45, 46, 47, 276, 437,
            52, 53, 54, 55, 88, 452,
            5, 6, 7, 14, 15, 16,
            39, 40, 41, 51, 97, 268, 428, 429, 430, 431, 432, 442, 161, 162, 142,
            279, 425, 426, 427, 265, 280, 241, 282, 217, 218, 219, 105, 273, 104, 294,
            194, 195, 196, 197, 190, 191, 192, 193, 186, 187, 188, 189, 180, 181,
            164, 261, 140, 118, 119, 122, 274,
        ),
    },
}


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def filter_bytes(calls: dict) -> bytes:
    """The seccomp filter as an array of `struct sock_filter`: whatever it refuses fails with EPERM."""
    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    program = [instruction(LOAD, ARCHITECTURE), instruction(JUMP_EQUAL, calls["audit"], 1, 0),
               instruction(RETURN, DENY), instruction(LOAD, NUMBER)]
    # x86-64 has a second set of numbers, from here on.
    program += [instruction(JUMP_AT_LEAST, 0x40000000, 0, 1), instruction(RETURN, DENY)]
    for number in calls["denied"]:
        program += [instruction(JUMP_EQUAL, number, 0, 1), instruction(RETURN, DENY)]
    for number, argument in calls["open"].items():
        program += [instruction(JUMP_EQUAL, number, 0, 4), instruction(LOAD, ARGUMENT + 8 * argument),
                    instruction(JUMP_BITS, WRITES, 0, 1), instruction(RETURN, DENY), instruction(RETURN, ALLOW)]
    return b"".join([*program, instruction(RETURN, ALLOW)])


def confine(seconds: int, megabytes: int) -> None:
    """Limits, then no way back. Raises OSError where the kernel refuses the filter."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL)
    # A network of its own, with nothing in it, where that is allowed; sockets are refused in any case.
    if libc.unshare(CLONE_NEWNET) != 0:
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
    for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, megabytes << 20),
                         (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64)):
        resource.setrlimit(limit, (value, value))
    code = filter_bytes(SYSTEM_CALLS[platform.machine()])
    program = _Program(len(code) // 8, code)
    if (libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)) != 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses the sandbox")


def main() -> None:
    """Reads the task, confines itself, runs the program, reports."""
    result = int(sys.argv[1])
    task = json.loads(sys.stdin.readline())
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    os.close(silence)
    token, program = task.pop("token"), task.pop("program")
    confine(**task)
    os.write(result, b"started\n")
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # whatever the program raises is its failure, also SystemExit
        os.write(result, f"{type(error).__name__}: {error}"[:200].encode(errors="replace"))
        os._exit(1)
    os.write(result, token.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
