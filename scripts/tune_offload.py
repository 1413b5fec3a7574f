#!/usr/bin/env python3
"""The fastest settings for a model on this machine. The same as `mllama tune`:

python scripts/tune_offload.py IMAGE -m MODEL --out DIR
"""

import sys

from mllama_gguf.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["tune", *sys.argv[1:]]))
