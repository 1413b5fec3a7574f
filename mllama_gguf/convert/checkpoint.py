"""Find the tensors of a Hugging Face checkpoint: safetensors headers and JSON files. Reads no weights.

Neither torch nor transformers is needed. Everything that is wrong is a `ModelError` that names the file and
the value.

Format: https://github.com/huggingface/safetensors (README, "Format")
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..errors import ModelError
from ..gguf.writer import GGUF
from ..reading import open_regular, parse_json, read_text
from ..words import brief, one_line, os_reason, show_name
from .others import check_folder_kind, check_not_quantized

SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 as its bits
_LARGEST_HEADER = 100_000_000  # bytes, as the format says
_MOST_DIMENSIONS = 8  # of a tensor


@dataclass(frozen=True)
class Source:
    """Where one tensor of the checkpoint lies."""

    file: Path
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file

    @property
    def item_size(self) -> int:
        return np.dtype(SAFETENSORS_TYPES[self.dtype]).itemsize


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_text(path))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read as JSON: {one_line(e)}") from e
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value of a JSON file is a string that UTF-8 can hold: JSON may have half of a character."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _read_safetensors_header(path: Path) -> dict[str, Source]:
    """The tensors of one safetensors file, with every offset checked against the size of the file."""
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise ModelError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            if length > _LARGEST_HEADER:
                raise ModelError(
                    f"{path}: not a safetensors file: a header of {length} bytes; at most {_LARGEST_HEADER} "
                    "are allowed"
                )
            header = parse_json(f.read(length))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e}") from e
    except ValueError as e:
        if isinstance(e, ModelError):
            raise
        raise ModelError(f"{path}: not a safetensors file: {e}") from e
    if not isinstance(header, dict):
        raise ModelError(f"{path}: not a safetensors file: the header is not a JSON object")

    sources = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        where = f"{path}: tensor {show_name(name)}"
        try:
            dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
            begin, end = (int(n) for n in info["data_offsets"])
            if len(shape) > _MOST_DIMENSIONS or not all(0 <= n < 1 << 63 for n in (*shape, begin, end)):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise ModelError(f"{where}: broken entry in the header: {brief(info, 300)}") from e
        if dtype not in SAFETENSORS_TYPES:
            # An error only if we need the tensor; the plan checks its type.
            sources[name] = Source(path, name, dtype, shape, 8 + length + begin)
            continue
        source = Source(path, name, dtype, shape, 8 + length + begin)
        n_bytes = math.prod(shape) * source.item_size
        if end - begin != n_bytes:
            raise ModelError(f"{where}: {end - begin} bytes for {dtype} {list(shape)}, {n_bytes} needed")
        if 8 + length + end > size:
            raise ModelError(
                f"{path}: truncated: tensor {show_name(name)} ends at byte {8 + length + end} of {size}"
            )
        sources[name] = source
    return sources


def _old_name(name: str) -> str | None:
    """The name of a tensor with the prefixes of transformers up to 4.51 (None: not a weight).

    Newer versions write ``model.language_model.``, ``model.vision_model.``, ``model.multi_modal_projector.``
    and ``lm_head.``.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return None
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return old + name[len(new) :]
    return name


class Checkpoint:
    """A Hugging Face checkpoint directory: its JSON files and where its tensors lie. Holds no weights."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        try:
            check_folder_kind(self.directory)
        except OSError as e:
            raise ModelError(f"{self.directory}: cannot be listed: {os_reason(e)}") from e
        self.config_file = self.directory / "config.json"
        self.config = read_json(self.config_file)
        self.sources: dict[str, Source] = {}  # by old name
        for source in self._all_sources():
            name = _old_name(source.name)
            if name is None:
                continue
            if name in self.sources:
                raise ModelError(
                    f"{source.file}: tensor {show_name(source.name)} is also in {self.sources[name].file}"
                )
            self.sources[name] = source
        tensors = [(source.name, source.dtype in SAFETENSORS_TYPES) for source in self.sources.values()]
        check_not_quantized(self.config_file, self.config, tensors)

    def _all_sources(self) -> Iterator[Source]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index}: no weight_map")
            headers: dict[str, dict[str, Source]] = {}
            for name, file in weight_map.items():
                file = str(file)
                if Path(file).name != file or len(file) > 255 or not file.isprintable():
                    raise ModelError(
                        f"{index}: tensor {show_name(name)}: {brief(file)} is not a plain file name"
                    )
                if file not in headers:
                    headers[file] = _read_safetensors_header(self.directory / file)
                if name not in headers[file]:
                    raise ModelError(
                        f"{self.directory / file}: tensor {show_name(name)} is missing (it is named in "
                        f"{index.name})"
                    )
                yield headers[file][name]
        elif single.exists():
            yield from _read_safetensors_header(single).values()
        else:
            raise ModelError(f"{self.directory}: neither {single.name} nor {index.name}")

    def files(self) -> list[Path]:
        """All files of the directory but those that were converted before."""

        def converted(path: Path) -> bool:
            try:
                return GGUF.fits(path)
            except OSError:
                return False

        return [path for path in self.directory.iterdir() if not converted(path)]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory, {} if it does not exist."""
        path = self.directory / name
        return read_json(path) if path.exists() else {}
