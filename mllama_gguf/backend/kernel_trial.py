"""The process of a trial of CPU kernels. It is run as a file, without the package and its imports, so that it
starts quickly.

It computes some rounds, each with all tables in turn, so that a disturbance does not hit one of them alone. A
line of JSON goes out before each computation, [round, index], and after it, [round, index, seconds, error,
words]; words: why the table does not work, or "".
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

ROUNDS = 3
SECONDS = 0.002  # of a table in a round
THREADS = 1


class Result(ctypes.Structure):
    """`mllama_cpu_trial`"""

    _fields_ = (("seconds", ctypes.c_double), ("error", ctypes.c_double), ("right", ctypes.c_bool))


def main(library: str, tasks: str) -> None:
    """Try tables. tasks: JSON, a list of [number of the part, name of a kernel]."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its death is expected: leave no core file
    except (ImportError, OSError, ValueError):
        pass
    lib = ctypes.CDLL(library)
    lib.mllama_last_error.restype = ctypes.c_char_p
    attempt = lib.mllama_cpu_try
    number_type, out = ctypes.c_int32, ctypes.POINTER(Result)
    attempt.argtypes = (ctypes.c_char_p, number_type, number_type, ctypes.c_double, ctypes.c_bool, out)
    failed = set()
    for number in range(ROUNDS):
        for index, (part, kernel) in enumerate(json.loads(tasks)):
            if index in failed:
                continue
            say(number, index)
            result, words = Result(), ""
            if attempt(kernel.encode(), part, THREADS, SECONDS, number == 0, ctypes.byref(result)) != 0:
                words = lib.mllama_last_error().decode("utf-8", "replace")
            elif not result.right:
                words = f"a result is off by {result.error:.3g} of the usual size"
            if words:
                failed.add(index)
                say(number, index, None, None, words)
            else:
                say(number, index, result.seconds, result.error, "")
    os._exit(0)  # what happens at exit is not tried


def say(*values: object) -> None:
    """Write a line that arrives even if the next instruction ends the process."""
    os.write(1, json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
