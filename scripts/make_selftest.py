#!/usr/bin/env python3
"""Write mllama_gguf/data/selftest.json: what `mllama doctor` compares each device with.

python scripts/make_selftest.py            # write it
python scripts/make_selftest.py --check    # fail if it is not what is computed now

The numbers are those of the demo model in plain numpy and double precision (tests/reference.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference import Reference  # noqa: E402

from mllama_gguf.inspect.selftest import FILE, STATES_STEP, image  # noqa: E402
from mllama_gguf.store.resolve import resolve  # noqa: E402
from mllama_gguf.vision.preprocess import preprocess_image  # noqa: E402

IMAGE_TOKEN = 1024
BOS = 989
TOKENS = (BOS, IMAGE_TOKEN, *range(300, 320))


def compute() -> str:
    """The content of the file."""
    reference = Reference(resolve("demo").text)
    tiled = preprocess_image(image(), tile_size=80, max_tiles=4)
    states = reference.states(tiled.pixels, tiled.aspect_ratio_id, tiled.n_tiles)
    logits = reference.logits(TOKENS, [states])[-1]

    def rounded(values: np.ndarray) -> list[float]:
        return [float(f"{value:.7g}") for value in values]

    content = {
        "tokens": TOKENS,
        "states": rounded(states.reshape(-1)[::STATES_STEP]),
        "logits": rounded(logits),
    }
    return json.dumps(content) + "\n"


def same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the numbers are the same, but for the order in which a processor adds."""
    names = ("states", "logits")
    if old["tokens"] != new["tokens"] or any(len(old[name]) != len(new[name]) for name in names):
        return False
    return all(np.allclose(old[name], new[name], rtol=1e-5, atol=1e-6) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    text = compute()
    if not parser.parse_args().check:
        FILE.write_text(text, "utf-8")
    elif not same(json.loads(FILE.read_text("utf-8")), json.loads(text)):
        sys.exit(f"{FILE}: not what is computed now; run python scripts/make_selftest.py")


if __name__ == "__main__":
    main()
