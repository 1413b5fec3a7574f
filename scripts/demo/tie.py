#!/usr/bin/env python3
"""Between the phases tower and decoder: start the decoder from what the tower's reader already knows.

The tower's linear reader names the thing on a patch. Its directions become the coordinates of the projected
states (whitened, most telling first), its rows the output rows of the nouns' tokens, and each cross-attention
layer starts as a copy of 64 of the coordinates into the text. What is left to learn is where to look and how
to phrase it.

    python scripts/demo/tie.py --cache DIR --run DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from icons import TRAIN_FAMILIES, load_icons
from model import CONFIG, DemoModel
from scenes import Renderer
from tokenizer import build
from torch import nn
from train import GROUND, TILE, Heads, make_batch, split_parameters, word_of

CONSTANT = 2.0  # the last coordinate of the projected states hardly varies: it carries what is always so


@torch.no_grad()
def tie(model: DemoModel, heads: Heads, batches: list[dict], words: torch.Tensor) -> None:
    """Change the projector, the nouns' output rows and the values of cross-attention in place."""
    feats = []
    for batch in batches:
        final, _ = model.see(torch.from_numpy(batch["patches"]), batch["grid"], False)
        thing = torch.from_numpy(batch["thing"])
        feats.append(final[:, :, 1:][(thing >= 0) & (thing < GROUND)])
    f = torch.cat(feats).double()
    mean = f.mean(0)
    covariance = (f - mean).T @ (f - mean) / len(f)
    values, vectors = torch.linalg.eigh(covariance)
    values = values + 0.03 * values.mean()
    root, inverse = values.sqrt(), values.rsqrt()
    weight = heads.thing.weight[:GROUND].double()
    offset = weight @ mean + heads.thing.bias[:GROUND].double()
    weight = weight - weight.mean(0)
    u, s, vt = torch.linalg.svd(weight @ vectors * root)
    turn = vt @ (vectors * inverse).T  # [192, 192]: features to whitened coordinates
    width = f.shape[1]
    projector = model.multi_modal_projector
    projector.weight[:, :width] = turn.float()
    projector.weight[:, width:] = 0.0
    projector.bias.copy_(-(turn @ mean).float())
    projector.bias[-1] += CONSTANT
    rows = torch.zeros(len(weight), width)
    rows[:, : len(s)] = (u[:, : len(s)] * s).float()
    rows[:, -1] = (offset - offset.mean()).float() / CONSTANT
    head = model.language_model.lm_head.weight
    for token in words.unique():
        head[token] = rows[words == token].mean(0)
    text = CONFIG["text"]
    size, kv = text["hidden_size"] // text["num_attention_heads"], text["num_key_value_heads"]
    group = text["num_attention_heads"] // kv
    start = 0
    for index in reversed(text["cross_attention_layers"]):  # the last layer copies the most telling ones
        attention = model.language_model.model.layers[index].cross_attn
        attention.v_proj.weight.mul_(0.05)
        attention.o_proj.weight.mul_(0.2)
        for i in range(kv * size):
            attention.v_proj.weight[i, start + i] += 1.0
            for h in range(group):
                column = (i // size * group + h) * size + i % size
                attention.o_proj.weight[start + i, column] += 2.0 / group
        start += kv * size
    norm = model.language_model.model.norm.weight
    norm.fill_(1.0)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=24)
    args = parser.parse_args()
    renderer = Renderer(load_icons(TRAIN_FAMILIES, args.cache), TILE, strong=True)
    tokenizer = build()
    batches = [make_batch(renderer, tokenizer, "mosaic", 5000 + i) for i in range(args.batches)]
    model, heads = DemoModel(CONFIG), Heads(CONFIG["vision"]["hidden_size"])
    both = nn.ModuleDict({"model": model, "heads": heads})
    saved = args.run / "checkpoint.pt"
    state = torch.load(saved, weights_only=True)
    both.load_state_dict({**state["weights"], **state["average"]})
    words = word_of(tokenizer)
    tie(model, heads, batches, words)
    batch = batches[0]
    thing = torch.from_numpy(batch["thing"])
    named = (thing >= 0) & (thing < GROUND)
    with torch.no_grad():
        _, states = model.encode(torch.from_numpy(batch["patches"]), batch["grid"], False)
        scores = model.logits(model.language_model.model.norm(states[:, :, 1:][named]))
    hit = np.mean((scores.argmax(-1) == words[thing[named]]).numpy())
    print(f"patches named in the decoder's words: {hit:.1%}")
    state["weights"] = {k: v.detach().clone() for k, v in both.state_dict().items()}
    state["average"] = {k: v.detach().clone() for k, v in both.named_parameters()}
    fresh = [p for n, p in model.named_parameters() if "language_model" in n or "projector" in n]
    matrices, tables, others = split_parameters(model, heads)
    order = tables + others
    ids = {id(p) for p in fresh}
    for i, p in enumerate(order):
        if id(p) in ids and i in state["adam"]["state"]:
            del state["adam"]["state"][i]
    shapes: dict[str, int] = {}
    for p in matrices:
        key = str((p.shape[0], p.shape[1]))
        if id(p) in ids:
            state["muon"][key][shapes.get(key, 0)] = 0
        shapes[key] = shapes.get(key, 0) + 1
    torch.save(state, saved)


if __name__ == "__main__":
    main()
