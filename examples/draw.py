#!/usr/bin/env python3
"""Draw the example images beside this file: our own drawings, which the demo model was never trained on.

python examples/draw.py
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

SCALE = 4  # drawn this much larger, then reduced, for smooth edges
INK = (38, 34, 40)
Point = tuple[float, float]


class Pen:
    """Shapes in the units of the final image."""

    def __init__(self, width: int, height: int, ground: tuple[int, int, int]) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), ground)
        self.draw = ImageDraw.Draw(self.image)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        """An ellipse around (x, y)."""
        self.draw.ellipse([(x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE], fill=fill)

    def shape(self, points: list[Point], fill: tuple[int, int, int]) -> None:
        """A filled polygon."""
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=fill)

    def line(self, points: list[Point], width: float, fill: tuple[int, int, int] = INK) -> None:
        """A line with round joints."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, fill=fill, width=round(width * SCALE), joint="curve")

    def save(self, path: Path) -> None:
        """Reduce and write."""
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(path, optimize=True)


def curve(a: Point, b: Point, c: Point, steps: int = 24) -> list[Point]:
    """A quadratic curve from a to c, drawn towards b."""
    t = [i / steps for i in range(steps + 1)]
    return [
        tuple((1 - s) ** 2 * p + 2 * s * (1 - s) * q + s * s * r for p, q, r in zip(a, b, c, strict=True))  # type: ignore[misc]
        for s in t
    ]


def apple(pen: Pen, x: float, y: float, r: float) -> None:
    """A red apple with a stem and a leaf."""
    red, light = (214, 36, 44), (238, 92, 92)
    pen.line(
        curve((x, y - r * 0.62), (x + r * 0.02, y - r * 0.95), (x + r * 0.16, y - r * 1.1)),
        r * 0.11,
        (110, 68, 40),
    )
    pen.shape(
        curve((x + r * 0.08, y - r * 0.8), (x + r * 0.2, y - r * 1.25), (x + r * 0.75, y - r * 1.12))
        + curve((x + r * 0.75, y - r * 1.12), (x + r * 0.6, y - r * 0.7), (x + r * 0.08, y - r * 0.8)),
        (92, 170, 64),
    )
    outline: list[Point] = []
    for i in range(360):
        t = math.radians(i)
        dent = 1 - 0.2 * math.exp(-(((i - 270 + 180) % 360 - 180) ** 2) / 600)
        dent -= 0.07 * math.exp(-(((i - 90 + 180) % 360 - 180) ** 2) / 500)
        outline.append((x + r * math.cos(t) * (1.0 - 0.06 * math.sin(t)), y + r * 0.92 * math.sin(t) * dent))
    pen.shape(outline, red)
    pen.oval(x - r * 0.48, y - r * 0.28, r * 0.14, r * 0.22, light)


def cat(pen: Pen, x: float, y: float, r: float) -> None:
    """The face of a black cat."""
    black, pink = (44, 43, 48), (233, 150, 160)
    for side in (-1, 1):
        pen.shape(
            [
                (x + side * r * 0.95, y - r * 0.1),
                (x + side * r * 0.86, y - r * 1.1),
                (x + side * r * 0.2, y - r * 0.65),
            ],
            black,
        )
        pen.shape(
            [
                (x + side * r * 0.8, y - r * 0.45),
                (x + side * r * 0.76, y - r * 0.85),
                (x + side * r * 0.45, y - r * 0.65),
            ],
            pink,
        )
    pen.oval(x, y, r, r * 0.84, black)
    for side in (-1, 1):
        pen.oval(x + side * r * 0.42, y - r * 0.1, r * 0.17, r * 0.2, (120, 190, 90))
        pen.oval(x + side * r * 0.42, y - r * 0.1, r * 0.07, r * 0.17, (20, 20, 22))
        for tilt in (-0.08, 0.06):
            pen.line(
                [(x + side * r * 0.5, y + r * 0.32), (x + side * r * 1.15, y + r * (0.28 + tilt * 2))],
                r * 0.035,
                (190, 190, 195),
            )
        pen.line(
            curve(
                (x, y + r * 0.36), (x + side * r * 0.08, y + r * 0.55), (x + side * r * 0.28, y + r * 0.46)
            ),
            r * 0.04,
            (190, 190, 195),
        )
    pen.shape([(x - r * 0.12, y + r * 0.2), (x + r * 0.12, y + r * 0.2), (x, y + r * 0.36)], pink)


def heart(pen: Pen, x: float, y: float, r: float) -> None:
    """A red heart."""
    points = []
    for i in range(360):
        t = math.radians(i)
        px = 16 * math.sin(t) ** 3
        py = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x + px * r / 16, y - (py + 2) * r / 16))
    pen.shape(points, (222, 40, 52))


def star(pen: Pen, x: float, y: float, r: float) -> None:
    """A yellow star."""
    points = []
    for i in range(10):
        radius = r if i % 2 == 0 else r * 0.46
        points.append((x + radius * math.sin(math.pi * i / 5), y - radius * math.cos(math.pi * i / 5)))
    pen.shape(points, (252, 210, 44))


def car(pen: Pen, x: float, y: float, r: float) -> None:
    """A blue car from the side."""
    blue, glass = (44, 112, 214), (196, 226, 244)
    pen.shape(
        curve((x - r * 0.62, y - r * 0.05), (x - r * 0.45, y - r * 0.55), (x - r * 0.2, y - r * 0.56))
        + curve((x + r * 0.2, y - r * 0.56), (x + r * 0.42, y - r * 0.52), (x + r * 0.62, y - r * 0.05)),
        blue,
    )
    pen.shape(
        [
            (x - r * 0.45, y - r * 0.08),
            (x - r * 0.3, y - r * 0.44),
            (x - r * 0.05, y - r * 0.44),
            (x - r * 0.05, y - r * 0.08),
        ],
        glass,
    )
    pen.shape(
        [
            (x + r * 0.05, y - r * 0.08),
            (x + r * 0.05, y - r * 0.44),
            (x + r * 0.24, y - r * 0.44),
            (x + r * 0.44, y - r * 0.08),
        ],
        glass,
    )
    body = curve((x - r, y + r * 0.3), (x - r, y - r * 0.1), (x - r * 0.6, y - r * 0.1))
    body += curve((x + r * 0.6, y - r * 0.1), (x + r, y - r * 0.05), (x + r, y + r * 0.3))
    pen.shape(body, blue)
    pen.oval(x + r * 0.92, y + r * 0.08, r * 0.06, r * 0.08, (250, 226, 120))
    for side in (-0.55, 0.55):
        pen.oval(x + r * side, y + r * 0.3, r * 0.22, r * 0.22, (40, 40, 44))
        pen.oval(x + r * side, y + r * 0.3, r * 0.1, r * 0.1, (190, 194, 200))


def balloon(pen: Pen, x: float, y: float, r: float) -> None:
    """A red balloon on a string."""
    pen.line(
        curve((x, y + r), (x + r * 0.3, y + r * 1.4), (x - r * 0.05, y + r * 1.9)), r * 0.05, (120, 120, 126)
    )
    pen.shape([(x, y + r * 0.92), (x - r * 0.14, y + r * 1.12), (x + r * 0.14, y + r * 1.12)], (180, 26, 36))
    pen.oval(x, y, r * 0.82, r, (220, 38, 46))
    pen.oval(x - r * 0.34, y - r * 0.42, r * 0.13, r * 0.22, (244, 120, 120))


def main() -> None:
    """All images."""
    here = Path(__file__).parent
    pen = Pen(480, 480, (255, 255, 255))
    apple(pen, 240, 262, 170)
    pen.save(here / "apple.png")
    pen = Pen(640, 400, (214, 232, 244))
    apple(pen, 165, 220, 118)
    cat(pen, 475, 215, 125)
    pen.save(here / "apple-and-cat.png")
    pen = Pen(1280, 320, (238, 238, 226))
    car(pen, 330, 165, 150)
    heart(pen, 960, 160, 115)
    pen.save(here / "wide.png")
    pen = Pen(300, 1200, (222, 240, 224))
    balloon(pen, 150, 260, 120)
    star(pen, 150, 900, 125)
    pen.save(here / "tall.png")


if __name__ == "__main__":
    main()
