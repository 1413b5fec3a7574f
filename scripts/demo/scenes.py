"""Seeded images with captions, made of the drawings of icons.py.

A scene is a background and one or two things on it; its caption is fixed by the scene, so "right in full" is
well defined: `a red apple`, `a red apple to the left of a black cat`, `a bus above the digit two`. A colour
word appears exactly for the things that `icons.THINGS` lists with colours; their drawings are painted in it.

`Renderer.scene` draws one scene at an image size; `Renderer.mosaic` packs many things into one image, for
the pre-training of the vision tower. Both say which thing covers which pixels.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, field

import numpy as np
from icons import THINGS, Icons, Thing
from PIL import Image, ImageFilter

COLOURS = {
    "red": (221, 38, 42),
    "orange": (247, 140, 20),
    "yellow": (252, 214, 42),
    "green": (70, 165, 58),
    "blue": (45, 115, 222),
    "purple": (140, 66, 190),
    "pink": (250, 140, 190),
    "black": (42, 42, 46),
    "white": (242, 242, 242),
}
COLOUR_NAMES = tuple(COLOURS)
GRIDS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
PROMPTS = (
    "Describe this image.",
    "Describe this image in one sentence.",
    "What is in this picture?",
    "What is in this image?",
    "What do you see?",
    "Caption:",
    "Describe the picture.",
    "What is this?",
)


def fit(width: int, height: int, tile: int, max_tiles: int = 4) -> tuple[tuple[int, int], tuple[int, int]]:
    """The tile grid (rows, columns) of an image and its size (width, height) after resizing."""
    best: tuple[float, int, tuple[int, int]] | None = None
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles + 1) if r * c <= max_tiles]
    scales = [(min(r * tile / height, c * tile / width), (r, c)) for r, c in grids]
    up = [s for s, _ in scales if s >= 1]
    chosen = min(up) if up else max(s for s, _ in scales)
    for scale, (r, c) in scales:
        if scale == chosen and (best is None or r * c < best[1]):
            best = (scale, r * c, (r, c))
    assert best is not None
    rows, columns = best[2]
    target_w = min(max(width, tile), columns * tile)
    target_h = min(max(height, tile), rows * tile)
    scale_w, scale_h = target_w / width, target_h / height
    if scale_w < scale_h:
        return (rows, columns), (target_w, max(1, min(int(height * scale_w), target_h)))
    return (rows, columns), (max(1, min(int(width * scale_h), target_w)), target_h)


# ------------------------------------------------------------------------------------------------ drawings
def _hsv(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).convert("HSV")).astype(np.float32)


def _body(rgba: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Which pixels carry the drawing's own colour (float mask), and its hue in degrees (None: grey)."""
    hsv = _hsv(rgba[..., :3])
    solid = rgba[..., 3] > 128
    vivid = solid & (hsv[..., 1] > 80) & (hsv[..., 2] > 60)
    if vivid.sum() < 0.25 * solid.sum():
        return (solid & (hsv[..., 2] > 0)).astype(np.float32), None
    bins = np.bincount((hsv[..., 0][vivid] * 24 / 256).astype(int) % 24, minlength=24).astype(float)
    smooth = bins + np.roll(bins, 1) + np.roll(bins, -1)
    hue = (int(smooth.argmax()) + 0.5) * 360 / 24
    distance = np.abs((hsv[..., 0] * 360 / 256 - hue + 180) % 360 - 180)
    near = np.clip((45 - distance) / 12, 0, 1) * np.clip((hsv[..., 1] - 40) / 40, 0, 1)
    return (near * solid).astype(np.float32), hue


def paint(rgba: np.ndarray, colour: str) -> np.ndarray:
    """The drawing with its own colour replaced; shading, outline and other colours stay."""
    mask, hue = _body(rgba)
    rgb = rgba[..., :3].astype(np.float32)
    light = rgb.max(-1) * 0.5 + rgb.mean(-1) * 0.5
    middle = max(float(np.median(light[mask > 0.5])) if (mask > 0.5).any() else 128.0, 1.0)
    ratio = light / middle
    target = np.array(COLOURS[colour], np.float32)
    if hue is None and middle < 100:  # a black drawing: lift it, keep little shading
        ratio = 1 + (ratio - 1) * 0.25
    dark = target * np.clip(ratio, 0.0, 1.0)[..., None] ** (0.8 if colour != "black" else 0.5)
    lift = np.clip((ratio - 1) * (0.9 if colour != "black" else 0.25), 0, 0.8)[..., None]
    painted = dark + (255 - dark) * lift
    out = rgb + (painted - rgb) * mask[..., None]
    return np.concatenate([np.clip(out, 0, 255).astype(np.uint8), rgba[..., 3:]], -1)


def natural_colour(rgba: np.ndarray) -> str | None:
    """The colour word that plainly holds for a drawing as it is, if any."""
    mask, hue = _body(rgba)
    if hue is None or mask.sum() < 0.4 * (rgba[..., 3] > 128).sum():
        return None
    mean = np.median(rgba[..., :3][mask > 0.5], axis=0) / 255
    h, s, v = colorsys.rgb_to_hsv(*mean.tolist())
    h *= 360
    if s < 0.55 or v < 0.5:
        return None
    for name, low, high in (
        ("red", -14, 8),
        ("orange", 24, 36),
        ("yellow", 45, 58),
        ("green", 85, 145),
        ("blue", 195, 225),
        ("purple", 265, 290),
    ):
        if low <= h <= high or low <= h - 360 <= high:
            return name
    return None


def ink(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flat colours inside dark outlines, as a comic would draw it."""
    image = Image.fromarray(rgba)
    rgb = image.convert("RGB").filter(ImageFilter.MedianFilter(5))
    levels = int(rng.integers(3, 7))
    flat = np.asarray(rgb).astype(np.float32)
    flat = np.round(flat / 255 * levels) / levels * 255
    alpha = rgba[..., 3].astype(np.float32)
    grey = np.asarray(rgb.convert("L")).astype(np.float32)
    shifted = [np.roll(grey, s, a) for a in (0, 1) for s in (2, -2)]
    edges = np.max([np.abs(grey - s) for s in shifted], axis=0)
    width = int(rng.choice([3, 5, 7]))
    inner = np.asarray(Image.fromarray(alpha.astype(np.uint8)).filter(ImageFilter.MinFilter(width)))
    border = (alpha > 128) & (inner < 128)
    lines = np.clip((edges - 45) / 40, 0, 1) * (rng.random() < 0.7)
    lines = np.maximum(lines * (alpha > 200), border)
    line = Image.fromarray((lines * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    line_part = np.clip(np.asarray(line).astype(np.float32) / 255 * 1.3, 0, 1)[..., None]
    out = flat * (1 - line_part) + float(rng.integers(0, 50)) * line_part
    return np.concatenate([np.clip(out, 0, 255).astype(np.uint8), rgba[..., 3:]], -1)


def wash(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smoothed and lightly shaded, as a rendering would look."""
    size = rgba.shape[0]
    rgb = np.asarray(Image.fromarray(rgba).convert("RGB").filter(ImageFilter.MedianFilter(5))).astype(
        np.float32
    )
    angle = rng.random() * 2 * np.pi
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    shade = (np.cos(angle) * x + np.sin(angle) * y)[..., None] * rng.uniform(10, 50)
    return np.concatenate([np.clip(rgb + shade, 0, 255).astype(np.uint8), rgba[..., 3:]], -1)


@dataclass
class Drawing:
    """One drawing in premultiplied RGBA at 128, 64 and 32 pixels, and its mean colour."""

    mips: list[Image.Image]
    mean: np.ndarray

    @classmethod
    def of(cls, rgba: np.ndarray) -> Drawing:
        """Premultiply and shrink."""
        full = Image.fromarray(rgba).convert("RGBa")
        weight = rgba[..., 3:].astype(np.float32) / 255
        mean = (rgba[..., :3] * weight).sum((0, 1)) / max(float(weight.sum()), 1.0)
        mips = [
            full,
            full.resize((64, 64), Image.Resampling.BOX),
            full.resize((32, 32), Image.Resampling.BOX),
        ]
        return cls(mips, mean)


@dataclass
class Placed:
    """One thing in an image: what it is, its colour (None: none named), and its middle."""

    thing: int
    colour: str | None
    x: float = 0.0
    y: float = 0.0
    alpha: tuple[int, int, np.ndarray] | None = field(default=None, repr=False)

    @property
    def phrase(self) -> str:
        """What a caption calls it."""
        return THINGS[self.thing].phrase(self.colour)


def caption(things: list[Placed], relation: str | None) -> str:
    """The one caption of a scene."""
    if relation is None:
        return things[0].phrase
    return f"{things[0].phrase} {relation} {things[1].phrase}"


class Renderer:
    """Draws scenes from a set of drawings; `strong` turns the training augmentation on."""

    def __init__(self, icons: Icons, tile: int, *, strong: bool, seed: int = 0) -> None:
        self.tile, self.strong = tile, strong
        self.choices: dict[tuple[int, str | None], list[list[Drawing]]] = {}
        style = np.random.default_rng(seed)
        for pixels, thing, _family in zip(icons.pixels, icons.thing, icons.family, strict=True):
            colours: tuple[str | None, ...] = THINGS[thing].colours or (None,)
            for colour in colours:
                versions = [pixels if colour is None else paint(pixels, colour)]
                if colour is not None and natural_colour(pixels) == colour:
                    versions.append(pixels)
                drawings = [Drawing.of(v) for v in versions]
                if strong:
                    drawings += [Drawing.of(ink(v, style)) for v in versions]
                    drawings += [Drawing.of(wash(versions[0], style))]
                self.choices.setdefault((int(thing), colour), []).append(drawings)
        self.things = sorted({thing for thing, _ in self.choices})
        self.sizes: dict[tuple[int, int], np.ndarray] = self._sizes()

    def _sizes(self) -> dict[tuple[int, int], np.ndarray]:
        """Image sizes that lead to each grid, up to 8 tiles a side."""
        rng = np.random.default_rng(1)
        found: dict[tuple[int, int], list[tuple[int, int]]] = {grid: [] for grid in GRIDS}
        tile = self.tile
        for _ in range(60000):
            area, aspect = np.exp(rng.uniform(np.log(0.25), np.log(16))), np.exp(rng.uniform(-1.6, 1.6))
            w, h = round(tile * (area * aspect) ** 0.5), round(tile * (area / aspect) ** 0.5)
            if min(w, h) < tile * 0.4 or max(w, h) > 8 * tile:
                continue
            grid, (tw, th) = fit(w, h, tile)
            rows, columns = grid
            if min(tw, th) >= 0.55 * tile and (w <= columns * tile * 4 and h <= rows * tile * 4):
                found[grid].append((w, h))
        return {grid: np.array(pairs) for grid, pairs in found.items()}

    # -------------------------------------------------------------------------------------------- pieces
    def pick(self, rng: np.random.Generator, thing: int | None = None) -> tuple[Placed, Drawing]:
        """A thing, a colour it may have, and one drawing of it (families weigh alike)."""
        if thing is None:
            thing = int(self.things[rng.integers(len(self.things))])
        spec: Thing = THINGS[thing]
        colour = str(spec.colours[rng.integers(len(spec.colours))]) if spec.colours else None
        families = self.choices[thing, colour]
        drawings = families[rng.integers(len(families))]
        if not self.strong:
            return Placed(thing, colour), drawings[0]
        plain = 2 if len(drawings) > 3 else 1
        draw = rng.random()
        if draw < 0.6:
            return Placed(thing, colour), drawings[rng.integers(plain)]
        if draw < 0.9:
            return Placed(thing, colour), drawings[plain + rng.integers(plain)]
        return Placed(thing, colour), drawings[-1]

    def background(self, rng: np.random.Generator, w: int, h: int) -> np.ndarray:
        """White, coloured, graded or noisy, float32 [h, w, 3]."""
        kind = rng.random()
        if kind < 0.25:
            return np.full((h, w, 3), 255 - (rng.random() < 0.3) * rng.uniform(0, 12), np.float32)
        base = self._hue(rng)
        out = np.empty((h, w, 3), np.float32)
        out[:] = base
        if kind > 0.55:
            other = self._hue(rng)
            if kind < 0.75 or rng.random() < 0.5:  # graded
                angle = rng.random() * 2 * np.pi
                ramp = (
                    np.cos(angle) * np.linspace(-1, 1, w)[None]
                    + np.sin(angle) * np.linspace(-1, 1, h)[:, None]
                )
                out += (np.clip(ramp * 0.5 + 0.5, 0, 1)[..., None] * (other - base)).astype(np.float32)
            if kind > 0.75:  # noisy
                strength = rng.uniform(6, 32)
                cell = int(rng.choice([1, 1, 2, 4, 10]))
                grid = rng.normal(0, strength, (-(-h // cell), -(-w // cell), 3 if rng.random() < 0.6 else 1))
                noise = grid.repeat(cell, 0).repeat(cell, 1)[:h, :w]
                out += noise.astype(np.float32)
        return out

    @staticmethod
    def _hue(rng: np.random.Generator) -> np.ndarray:
        value, saturation = rng.uniform(0.25, 1.0), rng.uniform(0, 0.9)
        if rng.random() < 0.5:
            value, saturation = rng.uniform(0.8, 1.0), rng.uniform(0.05, 0.45)
        return np.array(colorsys.hsv_to_rgb(rng.random(), saturation, value), np.float32) * 255

    def _recolour(self, rgba: np.ndarray, placed: Placed, rng: np.random.Generator) -> np.ndarray:
        """Colour augmentation of a drawn thing, float32 premultiplied [h, w, 4] in and out."""
        alpha = rgba[..., 3:]
        rgb = rgba[..., :3]
        named = placed.colour is not None
        if rng.random() < 0.8:
            mix = np.eye(3, dtype=np.float32)
            grey = np.full((3, 3), 1 / 3, np.float32)
            saturation = rng.uniform(0.75, 1.25) if named else rng.uniform(0.3, 1.5)
            if not named and rng.random() < 0.06:
                saturation = 0.0
            mix = grey + (mix - grey) * saturation
            turn = rng.normal(0, 5 if named else 14)
            if not named and rng.random() < 0.08:
                turn = rng.uniform(-180, 180)
            c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
            third, root = (1 - c) / 3, s / 3**0.5
            spin = np.array(
                [
                    [c + third, third - root, third + root],
                    [third + root, c + third, third - root],
                    [third - root, third + root, c + third],
                ],
                np.float32,
            )
            gain = rng.uniform(0.92, 1.08, (3, 1)) if named else rng.uniform(0.8, 1.2, (3, 1))
            contrast = rng.uniform(0.8, 1.15) if named else rng.uniform(0.6, 1.3)
            matrix = (mix @ spin * gain * contrast).astype(np.float32)
            offset = (1 - contrast) * 127 + (rng.normal(0, 8) if named else rng.normal(0, 16))
            rgb = rgb @ matrix.T + offset * (alpha / 255)
        if rng.random() < 0.06:
            step = float(rng.choice([32, 64, 85]))
            rgb = np.round(rgb / step) * step
        return np.concatenate([np.clip(rgb, 0, alpha), alpha], -1)

    def place(
        self,
        canvas: np.ndarray,
        placed: Placed,
        drawing: Drawing,
        rng: np.random.Generator,
        size: float,
        centre: tuple[float, float],
    ) -> None:
        """Draw a thing, `size` pixels on its longer side, into a float32 canvas."""
        h, w = canvas.shape[:2]
        strong = self.strong
        digit = THINGS[placed.thing].noun.startswith("the ")
        turn = np.radians(rng.normal(0, 12 if strong else 4))
        if strong and not digit and rng.random() < 0.06:
            turn = rng.uniform(-np.pi, np.pi)
        shear = rng.normal(0, 0.1) if strong else 0.0
        stretch = np.exp(rng.normal(0, 0.1)) if strong else 1.0
        flip = -1.0 if (not digit and rng.random() < 0.5) else 1.0
        box = int(np.ceil(size * (1 + 0.35 * min(1, abs(turn) + abs(shear))))) + 1
        mip = drawing.mips[0 if size > 64 else 1 if size > 32 else 2]
        side = mip.size[0]
        c, s = np.cos(turn), np.sin(turn)
        forward = (
            np.array([[c, -s], [s, c]])
            @ np.array([[1, shear], [0, 1]])
            @ np.diag([flip * stretch, 1 / stretch])
        )
        inverse = np.linalg.inv(forward * (size / side))
        x0, y0 = round(centre[0] - box / 2), round(centre[1] - box / 2)
        shift = np.array([side / 2, side / 2]) - inverse @ np.array([centre[0] - x0, centre[1] - y0])
        data = (inverse[0, 0], inverse[0, 1], shift[0], inverse[1, 0], inverse[1, 1], shift[1])
        drawn = mip.transform((box, box), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        left, top, right, bottom = max(0, x0), max(0, y0), min(w, x0 + box), min(h, y0 + box)
        if right <= left or bottom <= top:
            return
        rgba = np.asarray(drawn)[top - y0 : bottom - y0, left - x0 : right - x0].astype(np.float32)
        if strong:
            rgba = self._recolour(rgba, placed, rng)
        part = canvas[top:bottom, left:right]
        part *= 1 - rgba[..., 3:] / 255
        part += rgba[..., :3]
        placed.x, placed.y = centre
        placed.alpha = (left, top, rgba[..., 3] / 255)

    def _canvas(self, rng: np.random.Generator, w: int, h: int, means: list[np.ndarray]) -> np.ndarray:
        """A background that none of the things vanishes on."""
        canvas = self.background(rng, w, h)
        for _ in range(6):
            ground = canvas[:: max(1, h // 4), :: max(1, w // 4)].mean((0, 1))
            if all(np.abs(m - ground).max() > 48 for m in means):
                break
            canvas = self.background(rng, w, h)
        return canvas

    def _finish(self, canvas: np.ndarray, rng: np.random.Generator) -> Image.Image:
        if self.strong and rng.random() < 0.25:
            canvas = canvas + rng.normal(0, rng.uniform(2, 10), canvas.shape).astype(np.float32)
        image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
        if self.strong and rng.random() < 0.12:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
        return image

    # -------------------------------------------------------------------------------------------- images
    def scene(
        self, rng: np.random.Generator, w: int, h: int, count: int
    ) -> tuple[Image.Image, list[Placed], str | None]:
        """An image of `w` x `h` with one or two things, and their relation."""
        chosen = [self.pick(rng) for _ in range(count)]
        while count == 2 and chosen[0][0].thing == chosen[1][0].thing:
            chosen[1] = self.pick(rng)
        canvas = self._canvas(rng, w, h, [d.mean for _, d in chosen])
        if count == 1:
            size = min(w, h) * rng.uniform(0.5, 0.95)
            cx, cy = (self._between(rng, size / 2, side - size / 2) for side in (w, h))
            self.place(canvas, chosen[0][0], chosen[0][1], rng, size, (cx, cy))
            return self._finish(canvas, rng), [chosen[0][0]], None
        beside = rng.random() < (0.5 if 0.75 < w / h < 1.33 else float(w > h))
        long, short = (w, h) if beside else (h, w)
        cut = long * rng.uniform(0.42, 0.58)
        middles = []
        for (placed, drawing), (low, high) in zip(chosen, ((0.0, cut), (cut, float(long))), strict=True):
            size = min(high - low, short) * rng.uniform(0.62, 0.98)
            middles.append((placed, drawing, size, self._between(rng, low + size / 2, high - size / 2)))
        gap = middles[1][3] - middles[0][3]
        across = [self._between(rng, m[2] / 2, short - m[2] / 2) for m in middles]
        if abs(across[0] - across[1]) > 0.6 * gap:
            across = [short / 2 + (a - short / 2) * 0.6 * gap / abs(across[0] - across[1]) for a in across]
        for (placed, drawing, size, along), other in zip(middles, across, strict=True):
            self.place(canvas, placed, drawing, rng, size, (along, other) if beside else (other, along))
        relation = "to the left of" if beside else "above"
        return self._finish(canvas, rng), [c[0] for c in chosen], relation

    @staticmethod
    def _between(rng: np.random.Generator, low: float, high: float) -> float:
        return rng.uniform(low, high) if high > low else (low + high) / 2

    def mosaic(
        self, rng: np.random.Generator, w: int, h: int, cell: float
    ) -> tuple[Image.Image, list[Placed]]:
        """An image full of things, one in each cell of about `cell` pixels."""
        columns, rows = max(1, round(w / cell)), max(1, round(h / cell))
        chosen = [self.pick(rng) for _ in range(rows * columns)]
        canvas = self.background(rng, w, h)
        cw, ch = w / columns, h / rows
        for i, (placed, drawing) in enumerate(chosen):
            left, top = i % columns * cw, i // columns * ch
            if len(chosen) > 1 and rng.random() < 0.5:  # a ground of its own, so that contrast varies
                y0, y1, x0, x1 = int(top), int(top + ch), int(left), int(left + cw)
                canvas[y0:y1, x0:x1] = self._canvas(rng, x1 - x0, y1 - y0, [drawing.mean])
            size = min(cw, ch) * rng.uniform(0.7, 1.05)
            centre = (
                left + self._between(rng, size * 0.45, cw - size * 0.45),
                top + self._between(rng, size * 0.45, ch - size * 0.45),
            )
            self.place(canvas, placed, drawing, rng, size, centre)
        return self._finish(canvas, rng), [c[0] for c in chosen]

    def size_for(self, rng: np.random.Generator, grid: tuple[int, int]) -> tuple[int, int]:
        """An image size (width, height) that leads to `grid`."""
        pairs = self.sizes[grid]
        w, h = pairs[rng.integers(len(pairs))]
        return int(w), int(h)
