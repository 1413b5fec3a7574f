"""`mllama info`: what is in model files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..words import show_name, show_size
from .terminal import echo, echo_json
from .verbose import verbose_option

if TYPE_CHECKING:
    from ..backend.types import HParams
    from ..inspect.info import ModelInfo


LAYOUTS = {
    "canonical": "canonical, as `mllama convert` writes it",
    "A": "A: two files, of Ollama 0.4 to 0.6 or the Hugging Face hub",
    "B": "B: one file, of Ollama since 0.7",
    "unknown": "unknown: names as `mllama convert` gives them, by another program",
}


@click.command(
    "info",
    epilog="\b\nExamples:\n"
    "  mllama info demo\n"
    "  mllama info text.gguf mmproj.gguf\n"
    "  mllama info --json all.gguf | jq .hparams.n_ctx_train",
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each model, one a line.")
@verbose_option
def info_command(files: tuple[str, ...], as_json: bool) -> None:
    """Show layout, shape, types and memory of each FILE: a path, or a model's name as for -m.

    A text file and a projector, given together, are one model. All checks of loading are made, but the
    weights are not read.
    """
    from ..inspect.info import model_info
    from ..store.resolve import resolve

    for index, model in enumerate(model_info([path for file in files for path in resolve(file).paths])):
        if as_json:
            echo_json(_as_dict(model))
            continue
        if index:
            echo()
        for title, words in _lines(model):
            echo(f"{title:18}  {words}" if words else title)


def _as_dict(model: ModelInfo) -> dict[str, Any]:
    return {
        "files": [
            {**asdict(file), "path": str(file.path), "quantized": file.quantized} for file in model.files
        ],
        "layout": model.layout,
        "repairs": model.repairs,
        "hparams": None if model.hparams is None else asdict(model.hparams),
        "memory": [{**asdict(need), "total": need.total} for need in model.memory],
    }


def _lines(model: ModelInfo) -> Iterator[tuple[str, str]]:
    for file in model.files:
        more = f" and {file.n_files - 1} more" if file.n_files > 1 else ""
        yield "file", f"{file.path}{more} ({show_size(file.size)})"
        yield "  holds", f"{file.part}, {file.n_tensors} tensors"
        if file.name:
            yield "  name", show_name(file.name)
        yield "  written by", show_name(file.converter) or "another program"
        for part, types in (("text", file.text_types), ("vision", file.vision_types)):
            if types:
                yield f"  {part} types", ", ".join(f"{kind} {show_size(n)}" for kind, n in types.items())
        yield "  quantized", "yes" if file.quantized else "no"
    if model.layout is None or model.hparams is None:
        yield "layout", "projector alone; give the text file too to see the whole model"
        return
    yield "layout", LAYOUTS.get(model.layout, model.layout)
    for repair in model.repairs:
        yield "  repaired", repair
    yield from _shape(model.hparams)
    yield "memory", "weights + self-attention cache + one image of all tiles + buffers, on the CPU"
    for need in model.memory:
        parts = (need.weights, need.self_kv, need.cross_kv, need.compute + need.vision)
        yield f"  n_ctx {need.n_ctx}", f"{show_size(need.total)} = {' + '.join(map(show_size, parts))}"


def _shape(h: HParams) -> Iterator[tuple[str, str]]:
    yield (
        "text",
        f"{h.n_layer} layers, {h.n_embd} wide, feed-forward {h.n_ff}, "
        f"{h.n_head} heads of {h.head_dim}, {h.n_head_kv} for K and V",
    )
    yield "  cross-attention", f"layers {', '.join(map(str, h.cross_layers))}"
    yield "  RoPE", f"base {h.rope_freq_base:g}, {h.rope_dim} dimensions"
    yield "  n_ctx trained", str(h.n_ctx_train)
    yield "  vocabulary", f"{h.vocab_size} logits, image token {h.image_token_id}"
    if not h.has_vision:
        yield "vision", "none"
        return
    yield (
        "vision",
        f"{h.n_vision_layer} + {h.n_vision_global_layer} global layers, {h.vision_embd} wide, "
        f"feed-forward {h.vision_ff}, {h.vision_head} heads, {h.n_intermediate} intermediate states",
    )
    yield (
        "  image",
        f"up to {h.max_tiles} tiles of {h.image_size} pixels, patches of {h.patch_size}, "
        f"{h.n_positions} positions a tile (padded to {h.n_positions_padded})",
    )
