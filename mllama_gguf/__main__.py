"""The command `mllama`, also `python -m mllama_gguf`. Small, so that Ctrl-C is heeded from the first
moment."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from .cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
