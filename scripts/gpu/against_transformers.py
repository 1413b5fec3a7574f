#!/usr/bin/env python3
"""The same work as full_shape.py by transformers in BF16 on the same card: encode, a prompt, tokens a second.

    python scripts/gpu/against_transformers.py [--device cuda] [--small]

Needs the torch and transformers of the machine. Random weights of the 11B shape; --small is for a rehearsal.
The bandwidth is that of a large copy, reads and writes together. One line of JSON for each measurement.
Exit code 77: no torch, no transformers or no memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

try:
    import torch
    from transformers import MllamaConfig, MllamaForConditionalGeneration
except ImportError as e:
    print(f"no transformers with torch: {e}")
    sys.exit(77)

NEEDED = 26 * 2**30
ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
PROMPT, TOKENS = 512, 64
SMALL = {
    "text_config": {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "cross_attention_layers": [1], "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 32, "num_hidden_layers": 6, "num_global_layers": 2, "attention_heads": 4,
        "intermediate_size": 64, "image_size": 56, "vision_output_dim": 64,
        "intermediate_layers_indices": [2],
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers in BF16 at the 11B shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this script")
    args = parser.parse_args()
    if args.device == "cuda" and (not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < NEEDED):
        print("no CUDA device with 26 GiB of free memory")
        return 77
    # What is not named is the 11B model's.
    parts: dict[str, Any] = SMALL if args.small else {"text_config": {}, "vision_config": {"image_size": 560}}
    text = {**parts["text_config"], "rope_scaling": ROPE, "rope_theta": 500000.0}
    config = MllamaConfig(text_config=text, vision_config=parts["vision_config"])
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device=args.device).eval()
    with torch.no_grad():
        for values in model.parameters():
            values.normal_(std=0.02)
        for values in model.buffers():
            values.zero_()
        measure(model, config, args.device)
    return 0


def measure(model: Any, config: Any, device: str) -> None:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(what: str, work: Callable[[], Any], count: int = 5, **values: Any) -> None:
        seconds = []
        for _ in range(count + 1):
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[1:])  # kernels are made the first time
        print(json.dumps({"what": what, **values, "seconds": median}), flush=True)

    if device == "cuda":
        source = torch.ones(2**30, device=device)
        target = torch.empty_like(source)
        for _ in range(2):
            wait()
            start = time.perf_counter()
            target.copy_(source)
            wait()
            seconds = time.perf_counter() - start
        print(json.dumps({"what": "bandwidth", "bytes_per_second": 2 * source.nbytes / seconds}), flush=True)
        del source, target
    core = getattr(model, "model", model)
    side = config.vision_config.image_size
    pixels = torch.randn(1, 1, 4, 3, side, side, dtype=torch.bfloat16, device=device)
    ids = torch.tensor([[1]], device=device)
    for tiles in (1, 4):
        mask = (torch.arange(4, device=device) < tiles).long()[None, None]

        def encode(mask: Any = mask) -> Any:
            found = core.vision_model(pixel_values=pixels, aspect_ratio_ids=ids, aspect_ratio_mask=mask)
            return core.multi_modal_projector(found.last_hidden_state)

        timed("encode", encode, tiles=tiles)
    count = PROMPT if device == "cuda" else 16
    prompt = torch.randint(1, config.text_config.vocab_size - 16, (1, count), device=device)
    timed("prompt", lambda: model(input_ids=prompt, use_cache=True), tokens=prompt.shape[1])
    past = model(input_ids=prompt, use_cache=True).past_key_values
    one = prompt[:, :1]
    count = TOKENS if device == "cuda" else 2
    timed("decode", lambda: model(input_ids=one, past_key_values=past, use_cache=True), count)


if __name__ == "__main__":
    sys.exit(main())
