"""The command `mllama`, also `python -m mllama_gguf`. Small, so that Ctrl-C is obeyed from the first
moment."""

import atexit
import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    obeyed, code = False, 0
    atexit.register(lambda: _end_interrupted() if code == 130 else None)  # the first one runs last
    try:
        import signal

        obeyed = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in a background job
        if obeyed:
            signal.signal(signal.SIGINT, _end)
        _open_closed_streams()
        if "_MLLAMA_COMPLETE" in os.environ:  # set by the scripts of `mllama completion`
            from .cli.completing import complete

            code = complete(sys.argv[1:])
        else:
            from .cli.main import run

            if obeyed:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            code = run(sys.argv[1:])
            if obeyed:
                signal.signal(signal.SIGINT, _end)
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _end(*_: object) -> None:
    """Ctrl-C while modules are imported, or while Python ends: nothing is to be lost, and an exception would
    come out as a traceback, or get lost."""
    try:
        os.write(2, b"Interrupted\n")
    finally:
        os._exit(130)


def _end_interrupted() -> None:
    """End here, because `python -m` may end by SIGINT in place of the exit code: it does so if the exception
    went through code that was text, as a dataclass has, even where it was caught."""
    from contextlib import suppress

    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it
            stream.flush()
    os._exit(130)


def _open_closed_streams() -> None:
    """Connect standard streams that the caller closed (`2>&-`) to the null device. Otherwise the next file
    that is opened, a model say, would get the number 2, and messages would go there."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False))


if __name__ == "__main__":
    main()
