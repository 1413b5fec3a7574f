"""Folders that people take for a checkpoint to convert: what they are, and the way out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..reading import read_text
from ..words import show_name

# Ends of the names of tensors that quantizers add.
_QUANTIZED = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".qweight", ".qzeros", ".scales",
    ".weight_scale", ".weight_scale_inv", ".weight_packed",
)  # fmt: skip


def check_folder_kind(directory: Path) -> None:
    """Raise ModelError that says what a folder is, if it is known and cannot be converted."""
    names = sorted(path.name for path in directory.iterdir())
    has_weights = any(name.endswith(".safetensors") and not _is_adapter(name) for name in names)
    if not has_weights and any(_is_adapter(name) for name in names):
        base = _base_model(directory / "adapter_config.json")
        raise ModelError(
            f"{directory}: a LoRA adapter (PEFT) and not a whole model; merge it into its base model{base} "
            "first: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...)"
        )
    if has_weights:
        return
    for name in names:
        if name.startswith("consolidated.") and name.endswith((".pth", ".pt")):
            raise ModelError(
                f"{directory}: Meta's own format ({show_name(name)}); take the checkpoint of the "
                "Hugging Face hub, in safetensors"
            )
        if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and not name.startswith("training_args"):
            raise ModelError(
                f"{directory}: its weights are a pickle ({show_name(name)}), which may run code when it is "
                "read; save them as safetensors: model.save_pretrained(folder, safe_serialization=True)"
            )
        if name.endswith(".gguf"):
            raise ModelError(f"{directory}: {show_name(name)} is GGUF already; give it to -m as it is")


def check_not_quantized(file: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, bool]]) -> None:
    """Raise ModelError for a checkpoint whose weights are quantized.

    file:    config.json, for the message; config: what it says
    tensors: names, and whether a tensor is of a float type
    """
    found = config.get("quantization_config")
    found = found if isinstance(found, dict) else {}
    named = str(found.get("quant_method") or ("bitsandbytes" if found else ""))
    signs = [(name, name.endswith(_QUANTIZED) or ".quant_state." in name) for name, _ in tensors]
    is_packed = bool(found) and not all(is_float for _, is_float in tensors)
    if not any(sign for _, sign in signs) and not is_packed:
        return  # weights that were made floats again
    bits = next((n for n in (4, 8) if found.get(f"load_in_{n}bit") or found.get("bits") == n), None)
    how = f"{named or 'another program'}{f', {bits} bits' if bits else ''}"
    raise ModelError(
        f"{file}: the weights are quantized already ({how}); convert the 16-bit checkpoint: merge adapters "
        "into that, or save what model.dequantize() of transformers gives; then choose --type q4_k_m"
    )


def _is_adapter(name: str) -> bool:
    return name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def _base_model(file: Path) -> str:
    try:
        name = json.loads(read_text(file)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return f" ({show_name(name, 100)})" if isinstance(name, str) and name else ""
