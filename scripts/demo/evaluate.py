#!/usr/bin/env python3
"""How often the demo model is right, measured on the shipped GGUF through our own runtime.

    python scripts/demo/evaluate.py --cache DIR [--n 400] [--seed 1] [--json] [--torch HF_DIR]

Held-out images of all eight tile grids in equal numbers, in three sets: single things of the eight families
that were trained on, single things of the family that never was (openmoji), and two things in relation.
`named` counts captions that name every thing in its place, `full` those that are right to the letter.
With `--torch` the same images go through the torch model of a Hugging Face directory instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from icons import HELD_OUT_FAMILY, THINGS, TRAIN_FAMILIES, load_icons
from model import CONFIG
from PIL import Image
from scenes import COLOUR_NAMES, GRIDS, PROMPTS, Placed, Renderer, caption, fit

Captioner = Callable[[Image.Image], str]


def names_right(reply: str, placed: list[Placed]) -> bool:
    """Whether the reply names the things in their order, whatever their colours."""
    parts = reply.replace(" to the left of ", "|").replace(" above ", "|").split("|")
    if len(parts) != len(placed):
        return False
    return all(
        part in {THINGS[p.thing].phrase(c) for c in (None, *COLOUR_NAMES)}
        for part, p in zip(parts, placed, strict=True)
    )


def native() -> Captioner:
    """The bundled model in our own runtime."""
    from mllama_gguf import Mllama

    model = Mllama.from_pretrained("demo")
    return lambda image: model.caption(image, prompt=PROMPTS[0], max_tokens=48).strip()


def in_torch(directory: Path) -> Captioner:
    """The torch model, from a Hugging Face directory."""
    import torch
    from model import DemoModel
    from safetensors.torch import load_file
    from tokenizer import build, prompt_ids
    from train import patchify

    model, tokenizer, tile = DemoModel(CONFIG).eval(), build(), CONFIG["vision"]["image_size"]
    model.load_state_dict(load_file(directory / "model.safetensors"))
    stop = {tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|end_of_text|>")}
    prompt = prompt_ids(tokenizer, PROMPTS[0])

    def run(image: Image.Image) -> str:
        grid, size = fit(image.width, image.height, tile)
        patches = patchify(image.resize(size, Image.Resampling.BILINEAR), grid)
        with torch.no_grad():
            _, states = model.encode(torch.from_numpy(patches)[None], grid, True)
            return tokenizer.decode(model.generate(prompt, states, stop)[0])

    return run


def measure(
    captioner: Captioner, families: tuple[str, ...], things: int, n: int, seed: int, cache: Path
) -> dict:
    """Shares over `n` images, in all and for each grid, with a few of the mistakes."""
    renderer = Renderer(load_icons(families, cache), CONFIG["vision"]["image_size"], strong=False)
    rng = np.random.default_rng((seed, things, len(families)))
    hits: dict[str, list[tuple[bool, bool]]] = {}
    wrong = []
    for i in range(n):
        grid = GRIDS[i % len(GRIDS)]
        image, placed, relation = renderer.scene(rng, *renderer.size_for(rng, grid), things)
        reply, wanted = captioner(image), caption(placed, relation)
        hits.setdefault(f"{grid[0]}x{grid[1]}", []).append((names_right(reply, placed), reply == wanted))
        if reply != wanted and len(wrong) < 12:
            wrong.append({"wanted": wanted, "got": reply})
    every = [hit for grid_hits in hits.values() for hit in grid_hits]

    def share(pairs: list[tuple[bool, bool]]) -> dict:
        named, full = np.mean(pairs, axis=0)
        return {"named": round(float(named), 4), "full": round(float(full), 4)}

    return {"n": n, **share(every), "grids": {g: share(h) for g, h in hits.items()}, "wrong": wrong}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where icons.py keeps the drawings")
    parser.add_argument("--n", type=int, default=400, help="images in each of the three sets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--torch", type=Path, metavar="HF_DIR")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="caption these files and stop")
    args = parser.parse_args()
    captioner = in_torch(args.torch) if args.torch else native()
    if args.images:
        for path in args.images:
            print(f"{path.name}: {captioner(Image.open(path).convert('RGB'))}")
        return
    figures = {
        "single": measure(captioner, TRAIN_FAMILIES, 1, args.n, args.seed, args.cache),
        "unseen": measure(captioner, (HELD_OUT_FAMILY,), 1, args.n, args.seed, args.cache),
        "pair": measure(captioner, TRAIN_FAMILIES, 2, args.n, args.seed, args.cache),
    }
    if args.json:
        print(json.dumps({"seed": args.seed, **figures}, indent=1))
        return
    for name, result in figures.items():
        print(f"{name}: named {result['named']:.1%}, right in full {result['full']:.1%} of {result['n']}")
        print("   " + ", ".join(f"{g} {s['named']:.0%}/{s['full']:.0%}" for g, s in result["grids"].items()))
        for pair in result["wrong"][:5]:
            print(f"   wanted: {pair['wanted']}; got: {pair['got']}")


if __name__ == "__main__":
    main()
