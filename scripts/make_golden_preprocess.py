"""Make tests/golden/preprocess.json: the pixels of our images by transformers' MllamaImageProcessor.

    pip install '.[parity]' && python scripts/make_golden_preprocess.py

Pillow's resize is not the same in all versions, so run it once for each that matters (for another Pillow than
the installed one: `pip install --target DIR --no-deps pillow==VERSION`, then with PYTHONPATH=DIR). A run adds
its Pillow's hashes to those in the file; delete the file to start again.

The images are formulas (tests/preprocess_cases.py), so the file holds sizes and hashes only. Nothing of
this package's own preprocessing is used.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import transformers
from PIL import Image
from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from preprocess_cases import MODES_OF_OUR_OWN, golden_cases, make_image

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden" / "preprocess.json"
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def readable(mode: str, image: Image.Image) -> Image.Image:
    """The input of the reference: the image itself, except for modes that it reads wrongly."""
    if mode not in MODES_OF_OUR_OWN:
        return image
    if mode == "La":
        return image.convert("LA")
    grey = np.round(np.asarray(image).astype(np.float64) / 257)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def key(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["mode"], *case["size"], case["tile_size"], case["max_tiles"]


def version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(".")[:3])


def main() -> None:
    old: dict[str, Any] = {"made": {"pillow": []}, "cases": []}
    if TARGET.exists():
        old = json.loads(TARGET.read_text())
    cases: list[dict[str, Any]] = []
    for mode, width, height, tile_size, max_tiles in golden_cases():
        processor = MllamaImageProcessor(
            size={"height": tile_size, "width": tile_size},
            max_image_tiles=max_tiles,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
        )
        result = processor(readable(mode, make_image(mode, width, height)))
        pixels = result["pixel_values"][0, 0]
        assert pixels.dtype == np.float32 and pixels.shape == (max_tiles, 3, tile_size, tile_size)
        cases.append(
            {
                "mode": mode,
                "size": [width, height],
                "tile_size": tile_size,
                "max_tiles": max_tiles,
                "n_tiles": int(result["num_tiles"][0][0]),
                "aspect_ratio_id": int(result["aspect_ratio_ids"][0, 0]),
                "sha256": hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest(),
            }
        )
    pillows = old["made"]["pillow"]
    known: list[dict[str, str]] = [{} for _ in cases]
    if [key(c) for c in old["cases"]] == [key(c) for c in cases]:
        for case, hashes in zip(old["cases"], known, strict=True):
            stored = case["sha256"]
            hashes.update(
                zip(pillows, [stored] * len(pillows) if isinstance(stored, str) else stored, strict=True)
            )
    else:
        pillows = []
    pillows = sorted({*pillows, PIL.__version__}, key=version)
    for case, hashes in zip(cases, known, strict=True):
        hashes[PIL.__version__] = case["sha256"]
        if len(set(hashes.values())) > 1:
            case["sha256"] = [hashes[p] for p in pillows]
    made = {
        "script": "scripts/make_golden_preprocess.py",
        "reference": "transformers MllamaImageProcessor",
        "transformers": transformers.__version__,
        "pillow": pillows,
        "numpy": np.__version__,
        "sha256 of": "pixel_values[0, 0], float32 little-endian, C order; a list: one for each Pillow",
    }
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(f'{{\n "made": {json.dumps(made)},\n "cases": [\n{lines}\n ]\n}}\n')
    print(f"{TARGET}: {len(cases)} cases")


if __name__ == "__main__":
    main()
