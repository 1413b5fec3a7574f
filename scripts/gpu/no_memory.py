#!/usr/bin/env python3
"""Captions while another process holds the memory of the card: one line of error, or fewer layers; no crash.

    python scripts/gpu/no_memory.py PYTHON

This process holds the memory, by torch; PYTHON runs mllama_gguf. Exit code 77: no torch with CUDA.
"""

from __future__ import annotations

import subprocess
import sys

try:
    import torch
except ImportError as e:
    print(f"no torch: {e}")
    sys.exit(77)

LEFT = 100 * 2**20  # bytes; less than CUDA needs to start


def caption(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.argv[1], "-m", "mllama_gguf", "caption", "examples/apple.png", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=25)
    words = (done.stderr or done.stdout).strip()
    print(f"{' '.join(options)}: exit code {done.returncode}, {words}", flush=True)
    return done


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 77
    torch.zeros(1, device="cuda")
    held = []
    for size in (2**30, 2**26, 2**24):
        while torch.cuda.mem_get_info()[0] > LEFT + size:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    all_layers = caption("-ngl", "-1")
    for options in ([], ["-ngl", "0"]):
        fitting = caption(*options)
        if fitting.returncode or fitting.stdout.strip() != "a red apple":
            print(f"{' '.join(options) or '-ngl auto'} does not run elsewhere")
            return 1
    if all_layers.returncode not in (0, 1, 2, 3) or "Traceback" in all_layers.stderr:
        print("-ngl -1 does not end by an error of one line")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
