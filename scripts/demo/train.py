#!/usr/bin/env python3
"""Train the demo model, in phases that share one model, optimizer state and step counter.

    tower    the vision encoder alone, on mosaics: name the thing (and colour) on every patch
    decoder  captions of scenes of all eight grids for the text side alone, beside mosaics for the tower
    joint    the same, with the captions' gradient going through the whole model
    exact    as joint, with all pad rows and unused tiles as the real model computes them

    python scripts/demo/train.py --cache DIR --run DIR --phase tower --steps 3000
    python scripts/demo/train.py --cache DIR --run DIR --phase joint --steps 8000   # continues from there

`--steps` counts from the very start. An interrupted run continues from its last checkpoint (every three
minutes). Images are drawn by separate processes from the seed and the step number, so a run is
reproducible.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evaluate import names_right
from icons import HELD_OUT_FAMILY, THINGS, TRAIN_FAMILIES, Icons, load_icons
from model import CONFIG, DemoModel
from PIL import Image
from scenes import COLOUR_NAMES, GRIDS, PROMPTS, Placed, Renderer, caption, fit
from tokenizer import build, prompt_ids
from torch import Tensor, nn

TILE, PATCH = CONFIG["vision"]["image_size"], CONFIG["vision"]["patch_size"]
SIDE = TILE // PATCH
GROUND = len(THINGS)  # the class of an empty patch
IGNORE = -100
RELATIONS = (None, "to the left of", "above")
IMAGE_BUDGET = 128  # tiles a batch


# -------------------------------------------------------------------------------------------------- batches
def patchify(image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """An image at its target size on its black canvas, as uint8 [tiles, patches, 3 * PATCH^2]."""
    rows, columns = grid
    canvas = np.zeros((rows * TILE, columns * TILE, 3), np.uint8)
    canvas[: image.height, : image.width] = np.asarray(image)
    parts = canvas.reshape(rows, SIDE, PATCH, columns, SIDE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(parts).reshape(rows * columns, SIDE * SIDE, 3 * PATCH * PATCH)


def label_patches(things: list[Placed], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every patch the thing (or GROUND, or IGNORE), the colour (or IGNORE), and its weight."""
    rows, columns = grid
    high, wide = rows * SIDE, columns * SIDE
    cover = np.zeros((len(things), high, wide), np.float32)
    for i, placed in enumerate(things):
        if placed.alpha is None:
            continue
        left, top, alpha = placed.alpha
        y0, x0 = top // PATCH, left // PATCH
        y1, x1 = -(-(top + alpha.shape[0]) // PATCH), -(-(left + alpha.shape[1]) // PATCH)
        block = np.zeros(((y1 - y0) * PATCH, (x1 - x0) * PATCH), np.float32)
        oy, ox = top - y0 * PATCH, left - x0 * PATCH
        block[oy : oy + alpha.shape[0], ox : ox + alpha.shape[1]] = alpha
        share = block.reshape(y1 - y0, PATCH, x1 - x0, PATCH).mean((1, 3))
        y1, x1 = min(y1, high), min(x1, wide)
        cover[i, y0:y1, x0:x1] = share[: y1 - y0, : x1 - x0]
    best = cover.argmax(0)
    top_cover = cover.max(0)
    names = np.array([t.thing for t in things])
    hues = np.array([COLOUR_NAMES.index(t.colour) if t.colour else IGNORE for t in things])
    thing = np.where(top_cover > 0.1, names[best], np.where(cover.sum(0) < 0.02, GROUND, IGNORE))
    colour = np.where(top_cover > 0.1, hues[best], IGNORE)
    weight = np.zeros((high, wide), np.float32)
    for i in range(len(things)):
        mine = (best == i) & (top_cover > 0.1)
        weight[mine] = cover[i][mine] / max(float(cover[i][mine].sum()), 1e-6)
    empty = thing == GROUND
    weight[empty] = 0.2 / max(1, int(empty.sum()))

    def tiled(a: np.ndarray) -> np.ndarray:
        parts = a.reshape(rows, SIDE, columns, SIDE).transpose(0, 2, 1, 3)
        return parts.reshape(rows * columns, SIDE * SIDE)

    return tiled(thing).astype(np.int64), tiled(colour).astype(np.int64), tiled(weight)


def blur_like_upscaling(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """What a small original looks like once it is enlarged to the tile."""
    if size[0] >= image.width:
        return image
    return image.resize(size, Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR)


def make_batch(renderer: Renderer, tokenizer, kind: str, seed: int) -> dict:
    """One batch of a single grid. kind: `mosaic` or `scene`."""
    rng = np.random.default_rng(seed)
    odds = (
        np.array([3, 1, 0.7, 0.7, 1, 2, 0.7, 0.7])
        if kind == "mosaic"
        else np.array([1, 1, 1, 1, 1, 2, 1, 1.0])
    )
    grid = GRIDS[rng.choice(8, p=odds / odds.sum())]
    tiles = grid[0] * grid[1]
    batch: dict = {"kind": kind, "grid": grid}
    patches, labels, replies, relations = [], [], [], []
    count = IMAGE_BUDGET // tiles
    for _ in range(count):
        w, h = renderer.size_for(rng, grid)
        _, target = fit(w, h, TILE)
        if kind == "mosaic":
            full = (grid[1] * TILE, grid[0] * TILE)
            target = full if rng.random() < 0.6 else target
            most = min(full) if rng.random() < 0.3 else 84
            cell = float(np.exp(rng.uniform(np.log(36), np.log(most))))
            image, things = renderer.mosaic(rng, *target, cell)
        else:
            image, things, relation = renderer.scene(rng, *target, 1 if rng.random() < 0.45 else 2)
            prompt = PROMPTS[0] if rng.random() < 0.6 else PROMPTS[rng.integers(len(PROMPTS))]
            reply = tokenizer.encode(caption(things, relation) + "<|eot_id|>", add_special_tokens=False)
            replies.append((prompt_ids(tokenizer, prompt), reply))
            relations.append(RELATIONS.index(relation))
        image = blur_like_upscaling(image, (w, h))
        patches.append(patchify(image, grid))
        labels.append(label_patches(things, grid))
    batch["patches"] = np.stack(patches)
    batch["thing"], batch["colour"], batch["weight"] = (np.stack(x) for x in zip(*labels, strict=True))
    if replies:
        longest = max(len(p) + len(r) for p, r in replies)
        batch["relation"] = np.array(relations)
        tokens = np.full((count, longest), tokenizer.pad_token_id, np.int64)
        targets = np.full((count, longest), IGNORE, np.int64)
        for i, (p, r) in enumerate(replies):
            tokens[i, : len(p) + len(r)] = p + r
            targets[i, len(p) - 1 : len(p) + len(r) - 1] = r
        batch["tokens"], batch["targets"] = tokens[:, :-1], targets[:, :-1]
    return batch


def produce(
    queue: mp.Queue, renderer: Renderer, plan: tuple[str, float], first: int, stride: int, seed: int
) -> None:
    """A process that draws every `stride`-th batch from step `first` on."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(5)
    torch.set_num_threads(1)
    tokenizer = build()
    phase, share = plan
    step = first
    while True:
        rng = np.random.default_rng((seed, step, 77))
        kind = "mosaic" if phase == "tower" or rng.random() < share else "scene"
        queue.put((step, make_batch(renderer, tokenizer, kind, int(rng.integers(1 << 62)))))
        step += stride


# ------------------------------------------------------------------------------------------------ optimizer
class Muon:
    """Orthogonalised momentum for the matrices of the layers, batched by shape (Jordan et al., 2024)."""

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for m in matrices:
            self.groups.setdefault((m.shape[0], m.shape[1]), []).append(m)
        self.buffers = {shape: torch.zeros(len(ms), *shape) for shape, ms in self.groups.items()}
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self.factors: dict[int, float] = {}  # of the rate, by parameter

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for shape, matrices in self.groups.items():
            live = [i for i, m in enumerate(matrices) if m.grad is not None]
            if not live:
                continue
            buffer = self.buffers[shape]
            grads = torch.stack([matrices[i].grad for i in live])
            buffer[live] = buffer[live].lerp(grads, 1 - self.momentum)
            x = grads.lerp(buffer[live], self.momentum)
            flip = shape[0] > shape[1]
            x = x.transpose(1, 2) if flip else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for a, b, c in ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                            (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)):  # fmt: skip
                gram = x @ x.transpose(1, 2)
                x = a * x + (b * gram + c * gram @ gram) @ x
            x = x.transpose(1, 2) if flip else x
            rate = self.lr * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            factors = [self.factors.get(id(matrices[i]), 1.0) for i in live]
            for i, update, factor in zip(live, x, factors, strict=True):
                matrices[i].mul_(1 - self.lr * scale * self.decay).add_(update, alpha=-rate * factor)

    def state_dict(self) -> dict:
        return {str(k): v for k, v in self.buffers.items()}

    def load_state_dict(self, state: dict) -> None:
        for k in self.buffers:
            if str(k) in state and state[str(k)].shape == self.buffers[k].shape:
                self.buffers[k] = state[str(k)]


# ----------------------------------------------------------------------------------------------- evaluation
class Evaluation:
    """Fixed held-out images, drawn at full size and resized as the preprocessing does."""

    def __init__(self, icons: Icons, count: int, seed: int, things: int) -> None:
        renderer = Renderer(icons, TILE, strong=False)
        rng = np.random.default_rng(seed)
        self.batches: list[dict] = []
        per_grid: dict = {grid: [] for grid in GRIDS}
        for i in range(count):
            grid = GRIDS[i % 8]
            w, h = renderer.size_for(rng, grid)
            image, placed, relation = renderer.scene(rng, w, h, things)
            _, target = fit(w, h, TILE)
            small = image.resize(target, Image.Resampling.BILINEAR)
            scale = target[0] / w
            for p in placed:
                p.x, p.y = p.x * scale, p.y * scale
            per_grid[grid].append((patchify(small, grid), placed, relation))
        for grid, items in per_grid.items():
            for i in range(0, len(items), 32):
                part = items[i : i + 32]
                self.batches.append(
                    {
                        "grid": grid,
                        "patches": torch.from_numpy(np.stack([p for p, _, _ in part])),
                        "placed": [placed for _, placed, _ in part],
                        "captions": [caption(placed, relation) for _, placed, relation in part],
                    }
                )

    @torch.no_grad()
    def tower(self, model: DemoModel, heads: nn.Module) -> float:
        """Share of single things named right by the sum over all patches (the pre-training's own measure)."""
        right = total = 0
        for batch in self.batches:
            final, _ = model.encode(batch["patches"], batch["grid"], False)
            scores = heads.thing(final[:, :, 1:]).flatten(1, 2).log_softmax(-1)
            inside = 1 - scores[..., GROUND].exp()
            best = (scores[..., :GROUND].exp() * inside[..., None]).sum(1).argmax(-1)
            for guess, placed in zip(best.tolist(), batch["placed"], strict=True):
                right += guess == placed[0].thing
                total += 1
        return right / total

    @torch.no_grad()
    def captions(
        self, model: DemoModel, tokenizer, exact: bool
    ) -> tuple[float, float, list[tuple[str, str]]]:
        """Share with every thing named right and in order, share right in full, and (wanted, got) pairs."""
        prompt = prompt_ids(tokenizer, PROMPTS[0])
        stop = {tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|end_of_text|>")}
        named = full = 0
        pairs = []
        for batch in self.batches:
            _, states = model.encode(batch["patches"], batch["grid"], exact)
            replies = [tokenizer.decode(r) for r in model.generate(prompt, states, stop)]
            for reply, wanted, placed in zip(replies, batch["captions"], batch["placed"], strict=True):
                full += reply == wanted
                named += names_right(reply, placed)
                pairs.append((wanted, reply))
        return named / len(pairs), full / len(pairs), pairs


class Heads(nn.Module):
    """Linear readers of the patches, for training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.thing = nn.Linear(width, GROUND + 1)
        self.colour = nn.Linear(width, len(COLOUR_NAMES))
        self.relation = nn.Linear(width, len(RELATIONS))


# ----------------------------------------------------------------------------------------------------- train
def split_parameters(
    model: DemoModel, heads: Heads
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Layer matrices for Muon; tables; everything else."""
    matrices, tables, others = [], [], []
    for name, p in model.named_parameters():
        if p.ndim == 2 and (".layers." in name or "multi_modal_projector" in name):
            matrices.append(p)
        elif "embedding" in name or "embed_tokens" in name or "lm_head" in name:
            tables.append(p)
        else:
            others.append(p)
    return matrices, tables, others + list(heads.parameters())


def word_of(tokenizer) -> Tensor:
    """For every thing the token that tells it from the others, as it appears inside a caption."""
    words = [t.noun.split()[-1 if t.noun.startswith("the ") else 0] for t in THINGS]
    return torch.tensor([tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words])


def text_loss(model: DemoModel, batch: dict, states: Tensor) -> Tensor:
    """Cross-entropy on the reply's tokens."""
    tokens, targets = torch.from_numpy(batch["tokens"]), torch.from_numpy(batch["targets"])
    hidden = model.decode(tokens, states)
    wanted = targets != IGNORE
    return F.cross_entropy(model.logits(hidden[wanted]), targets[wanted])


def losses(
    model: DemoModel, heads: Heads, batch: dict, exact: bool, words: Tensor | None, through: bool
) -> dict[str, Tensor]:
    """Cross-entropy on patches, and on the reply's tokens where the batch has captions.

    words: also let the projected states name the thing in the decoder's own vocabulary, so that the decoder
    has little more to learn than where to look. through: let the captions' gradient into the tower.
    """
    patches = torch.from_numpy(batch["patches"])
    out: dict[str, Tensor] = {}
    if "tokens" in batch and not through:
        with torch.no_grad():
            final, both = model.see(patches, batch["grid"], exact)
        states = model.multi_modal_projector(both)
        batch["both"] = both
    else:
        final, both = model.see(patches, batch["grid"], exact)
        states = model.multi_modal_projector(both)
    thing, colour = (torch.from_numpy(batch[k]).flatten() for k in ("thing", "colour"))
    weight = torch.from_numpy(batch["weight"]).flatten()
    keep = (thing != IGNORE) & (weight > 0)
    thing, colour, weight = thing[keep], colour[keep], weight[keep]
    named = thing != GROUND
    if words is not None:
        shown = states[:, :, 1:].reshape(-1, states.shape[-1])[keep][named]
        scores = model.logits(model.language_model.model.norm(shown))
        each = F.cross_entropy(scores, words[thing[named]], reduction="none")
        out["word"] = (each * weight[named]).sum() / weight[named].sum()
    feats = final[:, :, 1:].reshape(-1, final.shape[-1])[keep]
    scores = heads.thing(feats)
    each = F.cross_entropy(scores, thing, reduction="none", label_smoothing=0.05)
    out["patch"] = (each * weight).sum() / weight.sum()
    with torch.no_grad():
        hit = (scores.argmax(-1) == thing)[named].float() * weight[named]
        out["hit"] = hit.sum() / weight[named].sum()
    painted = colour != IGNORE
    if painted.any():
        each = F.cross_entropy(heads.colour(feats[painted]), colour[painted], reduction="none")
        out["colour"] = (each * weight[painted]).sum() / weight[painted].sum()
    if "tokens" in batch:
        out["text"] = text_loss(model, batch, states)
        out["relation"] = F.cross_entropy(
            heads.relation(final[:, :, 0].mean(1)), torch.from_numpy(batch["relation"])
        )
    return out


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where icons.py keeps the drawings")
    parser.add_argument("--run", type=Path, required=True, help="checkpoints and log")
    parser.add_argument("--phase", choices=("tower", "decoder", "joint", "exact"), required=True)
    parser.add_argument("--steps", type=int, required=True, help="stop at this step, counted from the start")
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--decay-from", type=int, default=0, help="let the rate fall to nothing from here on")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--text-rate", type=float, default=0.5, help="the decoder's share of --lr")
    parser.add_argument("--projector-rate", type=float, default=0.05, help="the projector's share of --lr")
    parser.add_argument("--table-rate", type=float, default=0.25, help="the embeddings' share of --adam-lr")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument(
        "--mosaics", type=float, default=0.3, help="share of mosaic batches beside the scenes"
    )
    parser.add_argument(
        "--exact-share", type=float, default=0.1, help="share of exact batches in phase joint"
    )
    parser.add_argument("--patch-weight", type=float, default=0.5)
    parser.add_argument("--word-weight", type=float, default=0.3)
    parser.add_argument("--relation-weight", type=float, default=0.3)
    parser.add_argument("--eval-every", type=int, default=150)
    parser.add_argument("--eval-count", type=int, default=320)
    parser.add_argument("--reuse", type=int, default=2, help="how often a drawn batch is looked at")
    parser.add_argument("--replays", type=int, default=2, help="older batches of states in each decoder step")
    parser.add_argument("--pool", type=int, default=100, help="how many batches of states to keep")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=1e9)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    icons = load_icons(TRAIN_FAMILIES, args.cache)
    renderer = Renderer(icons, TILE, strong=True, seed=args.seed)
    held_out = load_icons((HELD_OUT_FAMILY,), args.cache)
    evaluations = {
        "single": Evaluation(icons, args.eval_count, 900001, 1),
        "unseen": Evaluation(held_out, args.eval_count, 900002, 1),
        "pair": Evaluation(icons, args.eval_count, 900003, 2),
    }

    model, heads = DemoModel(CONFIG), Heads(CONFIG["vision"]["hidden_size"])
    both = nn.ModuleDict({"model": model, "heads": heads})
    matrices, tables, others = split_parameters(model, heads)
    muon = Muon(matrices, args.lr)
    adam = torch.optim.AdamW(
        [{"params": tables, "factor": args.table_rate}, {"params": others, "factor": 1.0}],
        lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0,
    )  # fmt: skip
    # The inputs of the projector and the values it feeds are large, so equal steps would be too long there.
    muon.factors = {id(p): args.text_rate for n, p in model.named_parameters() if "language_model" in n}
    muon.factors[id(model.multi_modal_projector.weight)] = args.projector_rate
    average = {k: v.detach().clone() for k, v in both.named_parameters()}
    step, saved = 0, args.run / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        both.load_state_dict(state["weights"])
        average, step = state["average"], state["step"]
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        adam.param_groups[0]["factor"] = args.table_rate
        print(f"continues from step {step}", flush=True)

    def save() -> None:
        state = {
            "weights": both.state_dict(), "average": average, "step": step,
            "muon": muon.state_dict(), "adam": adam.state_dict(),
        }  # fmt: skip
        torch.save(state, saved.with_suffix(".tmp"))
        os.replace(saved.with_suffix(".tmp"), saved)

    def evaluate() -> dict:
        """Figures of the averaged weights."""
        own = {k: v.detach().clone() for k, v in both.named_parameters()}
        for k, v in both.named_parameters():
            v.data.copy_(average[k])
        out: dict = {}
        if args.phase == "tower":
            out = {k: round(evaluations[k].tower(model, heads), 4) for k in ("single", "unseen")}
        else:
            for k, e in evaluations.items():
                named, full, pairs = e.captions(model, tokenizer, exact=True)
                out[k] = [round(named, 4), round(full, 4)]
                if k != "pair":
                    out[k].append(round(e.tower(model, heads), 4))
                out[f"{k}_wrong"] = [p for p in pairs if p[0] != p[1]][:4]
        for k, v in both.named_parameters():
            v.data.copy_(own[k])
        return out

    queue: mp.Queue = mp.Queue(maxsize=8)
    plan = (args.phase, args.mosaics)
    workers = [
        mp.Process(
            target=produce, args=(queue, renderer, plan, step + i, args.workers, args.seed), daemon=True
        )
        for i in range(args.workers)
    ]
    for w in workers:
        w.start()
    words = None if args.phase == "tower" else word_of(tokenizer)
    log = (args.run / "log.jsonl").open("a")
    begun = last_save = time.time()
    first = step
    total: dict[str, list[float]] = {}
    waited = 0.0
    recent: list[dict] = []
    pool: list[dict] = []
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))  # save, then end
    while step < args.steps and time.time() - begun < args.max_seconds and not stopped:
        t = time.time()
        if step % args.reuse == 0 or not recent:
            recent.append(queue.get()[1])
            batch = recent[-1]
        else:  # drawing costs as much as learning: look at a recent batch again
            batch = recent[int(np.random.default_rng((args.seed, step, 9)).integers(len(recent)))]
        recent = recent[-24:]
        waited += time.time() - t
        exact = args.phase == "exact" or (
            args.phase in ("decoder", "joint")
            and "tokens" in batch
            and np.random.default_rng((args.seed, step, 5)).random() < args.exact_share
        )
        parts = losses(model, heads, batch, exact, words, args.phase != "decoder")
        text = parts.get("text", torch.zeros(()))
        patch_weight = args.patch_weight if "text" in parts else 1.0
        loss = (
            text
            + args.word_weight * parts.get("word", torch.zeros(()))
            + args.relation_weight * parts.get("relation", torch.zeros(()))
            + patch_weight * (parts["patch"] + 0.5 * parts.get("colour", torch.zeros(())))
        )
        for p in both.parameters():
            p.grad = None
        loss.backward()
        if (
            args.phase == "decoder" and "tokens" in batch
        ):  # the tower stands still: look at older states again
            chance = np.random.default_rng((args.seed, step, 11))
            for old in (pool[int(i)] for i in chance.integers(len(pool), size=args.replays if pool else 0)):
                text_loss(model, old, model.multi_modal_projector(old["both"])).backward()
            pool.append({k: batch[k] for k in ("both", "tokens", "targets")})
            pool = pool[-args.pool :]
        scale = min(1.0, (step + 1 - first + (first > 0) * 20) / args.warmup)
        if args.decay_from and step >= args.decay_from:
            scale *= max(0.02, (args.steps - step) / (args.steps - args.decay_from))
        muon.step(scale)
        torch.nn.utils.clip_grad_norm_(tables + others, 1.0)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * scale * group["factor"]
        adam.step()
        step += 1
        keep = min(args.ema, step / (step + 20))
        with torch.no_grad():
            for k, v in both.named_parameters():
                average[k].lerp_(v, 1 - keep)
        for k, v in parts.items():
            total.setdefault(k, []).append(float(v.detach()))
        if step % 25 == 0:
            rate = (time.time() - begun) / (step - first)
            means = {k: round(float(np.mean(v)), 3) for k, v in total.items()}
            print(f"step {step} {rate:.2f} s/step wait {waited / (step - first):.2f} {means}", flush=True)
            total = {}
        if step % args.eval_every == 0 or step == args.steps:
            t = time.time()
            out = evaluate()
            line = {"step": step, "seconds": round(time.time() - begun), "phase": args.phase, **out}
            print(json.dumps(line), f"({time.time() - t:.1f} s)", flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if time.time() - last_save > 180:
            save()
            last_save = time.time()
    save()
    for w in workers:
        w.terminate()


if __name__ == "__main__":
    main()
