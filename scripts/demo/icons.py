#!/usr/bin/env python3
"""The drawings that the demo model learns from: fetch, choose and rasterise eight icon families.

The families come from npm (`@iconify-json/<family>`), one JSON file each with the SVG body of every icon.
`THINGS` maps an everyday thing to the icon names to look for; a name is compared without hyphens, so that
`red-apple` also finds fxemoji's `redapple`, and `birthday-cake` finds streamline's `birthday-cake-1` to `-3`.

    python scripts/demo/icons.py --cache ~/.cache/mllama-demo     # prints which thing is missing where

Nothing that is fetched or drawn here belongs in the repository. openmoji is the held-out family: it is loaded
for evaluation only, never for training.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN_FAMILIES = (
    "noto",
    "noto-v1",
    "fluent-emoji",
    "fluent-emoji-flat",
    "twemoji",
    "emojione",
    "streamline-emojis",
    "fxemoji",
)
HELD_OUT_FAMILY = "openmoji"
RASTER = 128  # pixels a side of a cached drawing

# Things that appear in any of these colours: the drawing is repainted, so the colour word is always true.
PAINT = "red orange yellow green blue purple pink black white"

# noun phrase [| colours] : icon names. "-" before a phrase: it takes no article; "the" is kept as written.
THINGS_TEXT = f"""
apple | red green yellow : red-apple
pear : pear
tangerine : tangerine
lemon : lemon
banana : banana
watermelon : watermelon
-grapes : grapes
strawberry : strawberry
-cherries : cherries
peach : peach
pineapple : pineapple
tomato : tomato
eggplant : eggplant aubergine
carrot : carrot
-corn : ear-of-corn ear-of-maize
chili pepper : hot-pepper chilipepper
mushroom : mushroom
-bread : bread
-cheese : cheese-wedge
hamburger : hamburger
-french fries : french-fries
pizza : pizza slice-of-pizza
egg : egg
ice cream : soft-ice-cream soft-icecream
doughnut : doughnut
cookie : cookie
birthday cake : birthday-cake
candy : candy
lollipop : lollipop
honey pot : honey-pot
cup of coffee : hot-beverage
wine glass : wine-glass
cocktail : cocktail-glass
beer mug : beer-mug
monkey : monkey-face
dog : dog-face dog
cat | black white orange : cat-face cat
fox : fox fox-face foxgrin
lion : lion lion-face
tiger : tiger-face
horse : horse-face
unicorn : unicorn unicorn-face
cow : cow-face
pig : pig-face
mouse : mouse-face
rabbit : rabbit-face bunny
bear : bear bear-face
koala : koala
panda : panda panda-face
chicken : chicken
chick : front-facing-baby-chick hatching-chick hatchingchick
bird | blue red yellow : bird
penguin : penguin
frog : frog frog-face
crocodile : crocodile
turtle : turtle
snake : snake
whale : spouting-whale spurting-whale
dolphin : dolphin
fish | blue orange green : fish
octopus : octopus
snail : snail
butterfly : butterfly
ant : ant
bee : honeybee
ladybug : lady-beetle ladybeetle
spider : spider
crab : crab
elephant : elephant
camel : camel dromedary-camel
owl : owl
duck : duck
rose : rose
sunflower : sunflower
tulip | red yellow purple : tulip
blossom : cherry-blossom
seedling : seedling
pine tree : evergreen-tree evergreen
tree : deciduous-tree
palm tree : palm-tree
cactus : cactus
clover : four-leaf-clover
maple leaf : maple-leaf
car | red blue green yellow : automobile
taxi : oncoming-taxi
bus : bus
ambulance : ambulance
fire truck : fire-engine
truck : delivery-truck
tractor : tractor
bicycle : bicycle
motorcycle : motorcycle
steam train : locomotive steam-locomotive
airplane : airplane
helicopter : helicopter
rocket : rocket
sailboat : sailboat
anchor : anchor
traffic light : vertical-traffic-light
sun : sun-with-face
moon : crescent-moon
star | yellow red blue : star white-medium-star
cloud : cloud
rain cloud : cloud-with-rain raincloud
lightning bolt : high-voltage
snowflake : snowflake
snowman : snowman snowman-without-snow
-fire : fire
drop of water : droplet
rainbow : rainbow
umbrella | red blue purple : umbrella umbrella-with-rain-drops
hammer : hammer
wrench : wrench
-scissors : scissors black-scissors
key : key
lock : locked lock
light bulb : light-bulb
candle : candle
bomb : bomb
pill : pill
magnifying glass : magnifying-glass-tilted-left left-magnifying-glass
microscope : microscope
camera : camera
television : television
telephone : telephone telephone-on-modem
phone : mobile-phone cellphone
laptop : laptop laptop-computer personal-computer
book | red blue green orange : closed-book
envelope : envelope e-mail
pencil : pencil lowerleftpencil
briefcase : briefcase
backpack : backpack school-backpack school-satchel
-glasses : glasses
shirt | red blue green yellow : t-shirt running-shirt
dress | red pink blue green : dress
sneaker : running-shoe
top hat : top-hat
crown : crown
ring : ring
gem : gem-stone gem
guitar : guitar
trumpet : trumpet
soccer ball : soccer-ball
basketball : basketball basketball-and-hoop
trophy : trophy
die : game-die
balloon | red blue green yellow : balloon
gift : wrapped-gift present
bell : bell
hourglass : hourglass-done hourglass
alarm clock : alarm-clock
watch : watch
toilet : toilet
door : door
house : house-with-garden house
tent : tent
castle : castle european-castle
skull : skull
ghost : ghost
robot : robot robot-face
alien : alien
pumpkin : jack-o-lantern
heart | {PAINT} : red-heart heart-suit black-heart-suit
circle | {PAINT} : red-circle large-red-circle
square | {PAINT} : black-large-square
flag | {PAINT} : triangular-flag triangular-flag-on-post white-flag waving-white-flag
the digit zero : keycap-0
the digit one : keycap-1
the digit two : keycap-2
the digit three : keycap-3
the digit four : keycap-4
the digit five : keycap-5
the digit six : keycap-6
the digit seven : keycap-7
the digit eight : keycap-8
the digit nine : keycap-9
"""


@dataclass(frozen=True)
class Thing:
    """One everyday thing: its noun, the colours it may be painted in (none: as drawn), its icon names."""

    noun: str
    article: bool
    colours: tuple[str, ...]
    names: tuple[str, ...]

    def phrase(self, colour: str | None = None) -> str:
        """`an apple`, `a red apple`, `cherries`, `the digit two`."""
        words = f"{colour} {self.noun}" if colour else self.noun
        if not self.article:
            return words
        return ("an " if words[0] in "aeio" or words.startswith(("umbrella", "hourglass")) else "a ") + words


def _parse(text: str) -> tuple[Thing, ...]:
    things = []
    for line in text.strip().splitlines():
        head, names = line.split(":")
        noun, _, colours = head.partition("|")
        noun = noun.strip()
        article = not noun.startswith(("-", "the "))
        things.append(Thing(noun.lstrip("-"), article, tuple(colours.split()), tuple(names.split())))
    return tuple(things)


THINGS = _parse(THINGS_TEXT)


def fetch(family: str, cache: Path) -> dict:
    """The parsed icons.json of one family, downloaded with `npm pack` on first use."""
    target = cache / "icons" / family / "icons.json"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        name = f"@iconify-json/{family}"
        run = subprocess.run(
            ["npm", "pack", name, "--silent"], cwd=target.parent, check=True, capture_output=True, text=True
        )
        tarball = target.parent / run.stdout.split()[-1]
        with tarfile.open(tarball) as archive:
            for member in ("icons.json", "info.json"):
                data = archive.extractfile(f"package/{member}")
                assert data is not None
                (target.parent / member).write_bytes(data.read())
        tarball.unlink()
    return json.loads(target.read_text(encoding="utf-8"))


def find(icons: dict, names: tuple[str, ...]) -> list[str]:
    """The icons of one family for a thing: the first of `names` that exists, numbered variants included."""
    known: dict[str, list[str]] = {}
    for key in icons["icons"]:
        plain = re.sub(r"-\d$", "", key) if not key.startswith("keycap") else key
        known.setdefault(plain.replace("-", ""), []).append(key)
    for alias, entry in icons.get("aliases", {}).items():
        known.setdefault(alias.replace("-", ""), []).append(entry["parent"])
    for name in names:
        if found := known.get(name.replace("-", "")):
            return list(dict.fromkeys(found))[:3]
    return []


def rasterise(icons: dict, key: str, size: int = RASTER) -> np.ndarray:
    """One icon as uint8 RGBA [size, size, 4], cropped to what is drawn and centred."""
    import resvg_py

    icon = icons["icons"][key]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{size * 2}" height="{size * 2}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise ValueError(f"{key}: empty drawing")
    image = image.crop(box)
    scale = size / max(image.size)
    wide, high = (max(1, round(side * scale)) for side in image.size)
    image = image.convert("RGBa").resize((wide, high), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - wide) // 2, (size - high) // 2))
    return np.asarray(canvas)


@dataclass
class Icons:
    """All drawings of some families: `pixels` uint8 [n, 128, 128, 4] with the thing and family of each."""

    pixels: np.ndarray
    thing: np.ndarray
    family: list[str]


def load_icons(families: tuple[str, ...], cache: Path) -> Icons:
    """Drawings of every thing in `families`, rasterised once and kept in `cache`."""
    pixels, thing, family_of = [], [], []
    for family in families:
        stored = cache / f"{family}-{RASTER}.npz"
        if not stored.exists():
            icons = fetch(family, cache)
            drawn = [(i, rasterise(icons, key)) for i, t in enumerate(THINGS) for key in find(icons, t.names)]
            nouns = np.array([THINGS[i].noun for i, _ in drawn])
            np.savez_compressed(stored, nouns=nouns, pixels=np.stack([p for _, p in drawn]))
        data = np.load(stored)
        index = {t.noun: i for i, t in enumerate(THINGS)}
        for noun, image in zip(data["nouns"], data["pixels"], strict=True):
            if str(noun) in index:
                pixels.append(image)
                thing.append(index[str(noun)])
                family_of.append(family)
    return Icons(np.stack(pixels), np.array(thing), family_of)


def main() -> None:
    """Fetch and rasterise everything, then say how complete each family is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--sheet", action="store_true", help="write a contact sheet per family to the cache")
    args = parser.parse_args()
    counts = np.zeros(len(THINGS), int)
    for family in (*TRAIN_FAMILIES, HELD_OUT_FAMILY):
        icons = load_icons((family,), args.cache)
        have = set(icons.thing.tolist())
        if family != HELD_OUT_FAMILY:
            counts += [i in have for i in range(len(THINGS))]
        missing = [t.noun for i, t in enumerate(THINGS) if i not in have]
        print(
            f"{family}: {len(have)} of {len(THINGS)} things, {len(icons.pixels)} drawings; missing: {missing}"
        )
        if args.sheet:
            cell, columns = 64, 20
            rows = -(-len(icons.pixels) // columns)
            sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
            for i, image in enumerate(icons.pixels):
                small = Image.fromarray(image).resize((cell - 4, cell - 4))
                sheet.paste(small, (i % columns * cell + 2, i // columns * cell + 2), small)
            sheet.save(args.cache / f"sheet-{family}.png")
    print("fewest families:", sorted((int(n), t.noun) for n, t in zip(counts, THINGS, strict=True))[:30])


if __name__ == "__main__":
    main()
