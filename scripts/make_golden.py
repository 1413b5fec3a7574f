"""Compute tests/golden/model_*.npz with the oracle, so that plain pytest needs no torch.

    python scripts/make_golden.py            write them
    python scripts/make_golden.py --check    compare what is there with what is computed now

Needs the extra ``parity``. Inputs come from tests/golden_cases.py, weights from tests/tiny.py, both from the
name of the architecture alone. A file holds

    about            JSON: how it was made, sha256 of the weights
    states_<id>      float32 [tiles, positions, width]: cross_attention_states of that aspect_ratio_id
    logits_<case>    float32 [tokens, 48]: golden_cases.condense of the logits at every position
    greedy_<case>    int32 [32]: the tokens that follow, each the most likely
    margin_<case>    float32: the smallest lead of those tokens over the second, in logits
    states_<type>, logits_<type>_<case>
                     some of these with matrices rounded as a GGUF of type bf16 or f16 holds them
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

from golden_cases import (  # noqa: E402
    GOLDEN_DIR,
    HALF_CASES,
    HALF_IMAGE,
    HALF_TOLERANCES,
    N_GREEDY,
    GoldenImage,
    case,
    cases,
    condense,
    grid_images,
    relative_error,
)
from oracle import Oracle  # noqa: E402
from tiny import ARCHS, Arch, make_checkpoint, make_weights  # noqa: E402


def weights_sha256(arch: Arch) -> str:
    digest = hashlib.sha256()
    for name, values in make_weights(arch).items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").data)
    return digest.hexdigest()


def compute(arch: Arch, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    oracle = Oracle(make_checkpoint(arch, folder / arch.name))
    about = {
        "command": "python scripts/make_golden.py",
        "oracle": "tests/parity/oracle.py: MllamaForConditionalGeneration, float32, eager attention",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "architecture": arch.name,
        "weights_sha256": weights_sha256(arch),
    }
    out: dict[str, np.ndarray[Any, Any]] = {"about": np.array(json.dumps(about, indent=1))}
    for image in grid_images(arch):
        out[f"states_{image.aspect_ratio_id}"] = oracle.states(image.pixels(arch), image.aspect_ratio_id)
    for prompt in cases(arch):
        images = [oracle.states(p.pixels(arch), p.aspect_ratio_id) for p in prompt.images]
        out[f"logits_{prompt.name}"] = condense(oracle.logits(prompt.tokens, images))
        greedy, margin = oracle.greedy(prompt.tokens, N_GREEDY, images)
        out[f"greedy_{prompt.name}"] = np.array(greedy, dtype=np.int32)
        out[f"margin_{prompt.name}"] = np.array(margin, dtype=np.float32)
    for kind in HALF_TOLERANCES:
        rounded = Oracle(folder / arch.name, kind)
        image = GoldenImage(HALF_IMAGE)
        out[f"states_{kind}"] = rounded.states(image.pixels(arch), image.aspect_ratio_id)
        for name in HALF_CASES:
            prompt = case(arch, name)
            images = [rounded.states(p.pixels(arch), p.aspect_ratio_id) for p in prompt.images]
            out[f"logits_{kind}_{name}"] = condense(rounded.logits(prompt.tokens, images))
    return out


def compare(name: str, new: dict[str, np.ndarray[Any, Any]], path: Path) -> bool:
    """Print how far the stored numbers are from the new ones; True if that is no more than rounding."""
    good = True
    with np.load(path) as old:
        if set(old.files) != set(new):
            print(f"{name}: other entries: {sorted(set(old.files) ^ set(new))}")
            return False
        worst = 0.0
        for key in old.files:
            if key.startswith(("states", "logits")):
                worst = max(worst, relative_error(old[key], new[key]))
            elif key.startswith("greedy") and not np.array_equal(old[key], new[key]):
                print(f"{name}: {key} differs")
                good = False
    print(f"{name}: largest relative difference {worst:.1e}")
    return good and worst < 3e-6


def main() -> int:
    parser = argparse.ArgumentParser(description="Compute the golden numbers of the tests.")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHS.values():
            new, path = compute(arch, Path(folder)), GOLDEN_DIR / f"model_{arch.name}.npz"
            if check:
                good &= compare(arch.name, new, path)
                continue
            np.savez_compressed(path, **cast("dict[str, Any]", new))
            margin = min(float(v) for k, v in new.items() if k.startswith("margin"))
            print(
                f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes, smallest greedy margin {margin:.1e}"
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
