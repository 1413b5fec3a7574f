"""The images of the preprocessing tests, made from formulas so that every machine gets the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

GOLDEN = json.loads((Path(__file__).parent / "golden" / "preprocess.json").read_text())

GRID_SIZES = {  # (rows, columns) of four tiles: a (width, height) in tiles that gets it
    (1, 1): (0.7, 0.9),
    (1, 2): (1.9, 0.8),
    (1, 3): (2.8, 0.6),
    (1, 4): (3.9, 0.5),
    (2, 1): (0.8, 1.9),
    (2, 2): (1.7, 1.6),
    (3, 1): (0.6, 2.8),
    (4, 1): (0.5, 3.9),
}

MODES = (
    "1", "L", "L+transparency", "LA", "La", "P", "P+transparency", "P+alphas", "P+RGBA palette", "PA", "RGB",
    "RGB+transparency", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B", "I",
)  # fmt: skip

# What the reference cannot do (La), or does by clipping to white (16-bit grey): ours differ on purpose.
MODES_OF_OUR_OWN = ("La", "I;16", "I;16B", "I")


def pattern(width: int, height: int, channels: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, channels]: slopes, edges and noise, so that a wrong filter or offset shows."""
    y = np.arange(height, dtype=np.uint32)[:, None, None]
    x = np.arange(width, dtype=np.uint32)[None, :, None]
    c = np.arange(channels, dtype=np.uint32)[None, None, :]
    noise = (
        x * np.uint32(2654435761) ^ y * np.uint32(2246822519) ^ (c + np.uint32(seed)) * np.uint32(3266489917)
    ) >> 9
    slope = x * (3 + c) + y * (5 - c)
    block = ((x // 7 + y // 5 + c) % 3) * 60
    values: npt.NDArray[np.uint8] = ((slope + block + (noise & 63)) & 255).astype(np.uint8)
    return values


def make_image(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """A PIL image in one of MODES."""
    base, _, variant = mode.partition("+")
    size = (width, height)
    one = pattern(width, height, 1, seed)[..., 0]
    if base == "1":
        return Image.frombytes("L", size, ((one > 127) * np.uint8(255)).tobytes()).convert(
            "1", dither=Image.Dither.NONE
        )
    if base.startswith("I"):
        wide = one.astype(np.int64) * 257 + pattern(width, height, 1, seed + 1)[..., 0] - 128
        wide = wide.clip(0, 65535)
        kind = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[base]
        if base == "I":
            return Image.fromarray(wide.astype(kind))
        return Image.frombytes(base, size, wide.astype(kind).tobytes())
    if base in ("P", "PA"):
        colours = pattern(256, 1, 4, seed + 2)[0]
        image = Image.frombytes("P", size, one.tobytes())
        if variant == "RGBA palette":
            image.putpalette(colours.tobytes(), "RGBA")
        else:
            image.putpalette(colours[:, :3].tobytes())
        if base == "PA":
            image = image.convert("PA")
            image.putalpha(Image.fromarray(one[::-1].copy()))
        if variant == "transparency":
            image.info["transparency"] = int(one[0, 0])
        elif variant == "alphas":
            image.info["transparency"] = colours[:, 3].tobytes()
        return image
    channels = len(Image.new(base, (1, 1)).getbands())
    pixels = pattern(width, height, channels, seed)
    if base in ("La", "RGBa"):  # premultiplied: no sample above alpha
        pixels[..., :-1] = np.minimum(pixels[..., :-1], pixels[..., -1:])
    image = Image.frombytes(base, size, pixels.tobytes())
    if variant:
        image.info["transparency"] = tuple(pixels[0, 0].tolist()) if channels > 1 else int(pixels[0, 0, 0])
    return image


def golden_cases() -> list[tuple[str, int, int, int, int]]:
    """(mode, width, height, tile_size, max_tiles) of the stored hashes."""
    cases = []
    for tile in (560, 84, 37):
        for w, h in GRID_SIZES.values():
            cases.append(("RGB", round(w * tile), round(h * tile), tile, 4))
    for size in (
        (1, 1),
        (2, 1),
        (1, 3),
        (560, 560),
        (561, 560),
        (1120, 1120),
        (1121, 1119),
        (2240, 560),
        (90, 2000),
    ):
        cases.append(("RGB", *size, 560, 4))
    for size in ((6000, 40), (40, 6000), (6000, 1), (1, 6000), (37, 5999), (3000, 2000)):
        cases.append(("RGB", *size, 28, 4))
    for tiles in (1, 2, 3, 5, 6, 9):
        for size in ((200, 90), (90, 200), (150, 149), (400, 50), (50, 400)):
            cases.append(("RGB", *size, 48, tiles))
    for mode in MODES:
        if mode not in ("RGB", "LAB", "HSV"):  # those two are converted in floating point
            cases.append((mode, 75, 53, 32, 4))
            cases.append((mode, 20, 100, 56, 4))
    # Pseudo-random sizes, linear congruential so that no library's generator matters.
    state = 12345
    for _case in range(60):
        numbers = []
        for _ in range(3):
            state = (state * 1103515245 + 12345) % 2**31
            numbers.append(state >> 8)
        width, height = (1 + n % (2 ** (n % 11) + 1) for n in numbers[:2])
        cases.append(("RGB", width, height, (14, 56, 70)[numbers[2] % 3], 4))
    return cases


def golden_hash(case: dict[str, Any]) -> str:
    """The hash for the installed Pillow: that of the newest Pillow in the file which is not newer."""

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split(".")[:2])

    if isinstance(case["sha256"], str):
        return case["sha256"]
    index = sum(version(p) <= version(PIL.__version__) for p in GOLDEN["made"]["pillow"]) - 1
    hashes: list[str] = case["sha256"]
    return hashes[max(index, 0)]
