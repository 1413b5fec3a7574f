#!/usr/bin/env python3
"""Write a run's averaged weights as a Hugging Face checkpoint, and prove that it is the same model.

    python scripts/demo/export.py --run DIR --out DIR --check

`--check` loads the checkpoint with transformers 4.52.4, corrects its one deviation from Meta's code
(tokens before the image get cross-attention output; a hook multiplies it by 0), and compares logits
on all eight grids.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from model import CONFIG, GRID_IDS, MEAN, STD, DemoModel
from safetensors.torch import save_file
from tokenizer import CHAT_TEMPLATE, build, prompt_ids

from mllama_gguf.errors import MllamaError

sys.path.append(str(Path(__file__).resolve().parents[1]))
import report


def hf_config(tokenizer) -> dict:
    """config.json of MllamaForConditionalGeneration."""
    vision, text = CONFIG["vision"], CONFIG["text"]
    grids = list(GRID_IDS)
    eos = [tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": text["vocab_size"],
        "torch_dtype": "float32",
        "transformers_version": "4.52.4",
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_act": "gelu",
            "num_channels": 3,
            "initializer_range": 0.02,
            "supported_aspect_ratios": [list(g) for g in grids],
            "vision_output_dim": vision["hidden_size"] * (1 + len(vision["intermediate_layers_indices"])),
            **vision,
        },
        "text_config": {
            "model_type": "mllama_text_model",
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "dropout": 0.0,
            "use_cache": True,
            "tie_word_embeddings": False,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            **text,
        },
    }


def export(model: DemoModel, out: Path) -> None:
    """Write into a new directory beside `out`, then swap it in. Only an earlier export is replaced."""
    tokenizer = build()
    config = hf_config(tokenizer)
    try:
        report.check_replaced(out, "config.json", config)
    except MllamaError as e:
        raise SystemExit(f"Error: {e}") from e
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f"{out.name}.new-", dir=out.parent))
    fresh.chmod(0o755)
    tokenizer.save_pretrained(fresh)
    settings = json.loads((fresh / "tokenizer_config.json").read_text())
    settings["chat_template"] = CHAT_TEMPLATE
    (fresh / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {k: config["text_config"][k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (fresh / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    processor = {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_mean": MEAN, "image_std": STD, "max_image_tiles": CONFIG["vision"]["max_num_tiles"],
        "resample": 2, "rescale_factor": 1 / 255,
        "size": {"height": CONFIG["vision"]["image_size"], "width": CONFIG["vision"]["image_size"]},
    }  # fmt: skip
    (fresh / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    weights = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    if out.exists():
        foreign = {path.name for path in out.iterdir()} - {path.name for path in fresh.iterdir()}
        if foreign:
            raise SystemExit(f"{out} has other files ({min(foreign)}); the new checkpoint is in {fresh}")
        old = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
        out.rename(old)
        fresh.rename(out)
        shutil.rmtree(old)
    else:
        fresh.rename(out)


def averaged(run: Path) -> DemoModel:
    """The model of a run's checkpoint with its averaged weights."""
    model = DemoModel(CONFIG)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    named = {k.removeprefix("model."): v for k, v in state["average"].items() if k.startswith("model.")}
    model.load_state_dict(named, strict=True)
    return model.eval()


@torch.no_grad()
def check(model: DemoModel, out: Path) -> float:
    """The largest difference of logits between transformers and our own torch, over all grids."""
    from transformers import MllamaForConditionalGeneration

    theirs = MllamaForConditionalGeneration.from_pretrained(out, attn_implementation="eager").eval()
    tokenizer = build()
    tokens = torch.tensor(
        [prompt_ids(tokenizer, "Describe this image.") + tokenizer.encode("a red apple")[1:]]
    )
    sees = (tokens == tokenizer.convert_tokens_to_ids("<|image|>")).cumsum(1).bool()
    hooks = [
        layer.cross_attn.register_forward_hook(lambda _m, _i, o: (o[0] * sees[..., None], *o[1:]))
        for layer in theirs.language_model.layers
        if hasattr(layer, "cross_attn")
    ]
    vision, rng, worst = CONFIG["vision"], np.random.default_rng(0), 0.0
    side, patch = vision["image_size"] // vision["patch_size"], vision["patch_size"]
    for (rows, columns), ratio in GRID_IDS.items():
        used = rows * columns
        patches = torch.from_numpy(
            rng.integers(0, 256, (1, used, side * side, 3 * patch * patch), dtype=np.uint8)
        )
        _, states = model.encode(patches, (rows, columns), True)
        ours = model.logits(model.decode(tokens, states))
        pixels = patches.float() * model.pixel_scale - model.pixel_shift
        pixels = pixels.view(used, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
        values = torch.zeros(1, 1, vision["max_num_tiles"], 3, vision["image_size"], vision["image_size"])
        values[0, 0, :used] = pixels.reshape(used, 3, vision["image_size"], vision["image_size"])
        tile_mask = torch.zeros(1, 1, vision["max_num_tiles"], dtype=torch.long)
        tile_mask[..., :used] = 1
        result = theirs(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=values,
            aspect_ratio_ids=torch.tensor([[ratio]]), aspect_ratio_mask=tile_mask,
            cross_attention_mask=(sees[..., None, None] & (tile_mask[:, None] > 0)).long(),
        )  # fmt: skip
        difference = ((result.logits - ours).norm() / ours.norm()).item()
        worst = max(worst, difference)
    for hook in hooks:
        hook.remove()
    return worst


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run of train.py; without it the weights are untrained")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = averaged(args.run) if args.run else DemoModel(CONFIG).eval()
    export(model, args.out)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {size} parameters, {size * 2 / 1e6:.1f} MB in 16 bits")
    if args.check:
        worst = check(model, args.out)
        print(f"largest relative difference to transformers: {worst:.2e}")
        if worst > 1e-5:
            raise SystemExit("not the same model")


if __name__ == "__main__":
    main()
