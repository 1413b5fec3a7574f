"""The keys and the tensor table of a GGUF file, without its data.

The `gguf` package makes numpy views of every one of some 400,000 strings of a vocabulary, which takes
seconds; this reader skips the arrays that are not asked for. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..reading import open_regular
from ..words import brief, os_reason, show_name

# Arrays longer than this (vocabulary, merges) are read as their length only.
LONGEST_ARRAY = 1024

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24  # keys or tensors: far above any real file, so that a broken count fails immediately


@dataclass(frozen=True)
class LongArray:
    """Stands for an array that was skipped."""

    length: int


@dataclass(frozen=True)
class TensorEntry:
    """One line of the tensor table."""

    name: str
    ne: tuple[int, ...]  # fastest first, as ggml counts
    type: int  # ggml_type
    offset: int  # bytes, from the start of the data of its file
    part: int = 0  # its file, an index of GGUFFile.paths

    @property
    def type_name(self) -> str:
        return _type_name(self.type)

    @property
    def n_values(self) -> int:
        return math.prod(self.ne)

    @property
    def n_bytes(self) -> int:
        """Size of the data; 0 for a type that the installed `gguf` does not know."""
        import gguf

        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.type)]
        except (KeyError, ValueError):
            return 0
        return self.n_values // block * size


@dataclass(frozen=True)
class GGUFFile:
    """The head of a GGUF file, or of the files of a split model together."""

    path: Path  # the first file
    version: int
    keys: dict[str, Any]  # of the first file: numbers, strings, lists, and LongArray for long ones
    tensors: tuple[TensorEntry, ...]
    more: tuple[Path, ...] = ()  # the other files of a split model, in order
    data_offsets: tuple[int, ...] = (0,)  # bytes from the start to the data, of each file
    key_spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # bytes of each key, name and value

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return (self.path, *self.more)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def alignment(self) -> int:
        """Tensors start at multiples of this many bytes, from the start of the data."""
        return int(self.keys.get("general.alignment", 32))

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    @property
    def has_text(self) -> bool:
        return any(t.name == "token_embd.weight" for t in self.tensors)

    @property
    def has_vision(self) -> bool:
        return any(t.name.startswith("v.") for t in self.tensors)

    def data(self, tensor: TensorEntry, chunk: int) -> Iterator[bytes]:
        """The bytes of a tensor, `chunk` at a time. Raises ModelError if the file ends before them."""
        path = self.paths[tensor.part]
        try:
            with open_regular(path) as file:
                file.seek(self.data_offsets[tensor.part] + tensor.offset)
                rest = tensor.n_bytes
                while rest:
                    data = file.read(min(rest, chunk))
                    if not data:
                        raise ModelError(f"{path}: the file ends inside tensor {show_name(tensor.name)}")
                    rest -= len(data)
                    yield data
        except OSError as e:
            raise ModelError(f"{path}: {os_reason(e)}") from e


def read_gguf(path: str | os.PathLike[str], *, whole: Collection[str] = ()) -> GGUFFile:
    """Read the keys and the tensor table of a GGUF file; of the first file of a split model, also the tensor
    tables of the others.

    whole: names of arrays to read however long they are

    Raises ModelError, naming the file, if it cannot be read or is not a whole GGUF header, and for files of a
    split model that are missing or do not belong together.
    """
    first = _read_one(Path(path), whole)
    count = first.keys.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return first
    number = first.keys.get("split.no")
    if number != 0:
        raise ModelError(
            f"{path}: not the first of the {count} files of a model; give NAME-00001-of-{count:05}.gguf"
        )
    suffix = f"-00001-of-{count:05}.gguf"
    if not first.path.name.endswith(suffix):
        raise ModelError(
            f"{path}: part 1 of a model in {count} files; its name must end in {suffix} "
            "for the others to be found"
        )
    stem = first.path.name.removesuffix(suffix)
    tensors, more, offsets = list(first.tensors), [], list(first.data_offsets)
    for i in range(1, count):
        other = first.path.with_name(f"{stem}-{i + 1:05}-of-{count:05}.gguf")
        if not other.exists():
            raise ModelError(f"{other}: part {i + 1} of {count} of the model is missing")
        part = _read_one(other, ())
        if (part.keys.get("split.no"), part.keys.get("split.count")) != (i, count):
            raise ModelError(
                f"{other}: this is not part {i + 1} of {count}, as its name says; download it again"
            )
        more.append(other)
        offsets += part.data_offsets
        tensors += [replace(tensor, part=i) for tensor in part.tensors]
    return replace(first, tensors=tuple(tensors), more=tuple(more), data_offsets=tuple(offsets))


def _read_one(path: Path, whole: Collection[str]) -> GGUFFile:
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path, whole).read()
    except OSError as e:
        raise ModelError(f"{path}: {os_reason(e)}") from e
    except ValueError as e:
        if isinstance(e, ModelError):
            raise
        raise ModelError(f"{path}: not a GGUF file: it is empty") from e  # mmap's own error
    except (struct.error, IndexError, OverflowError) as e:
        raise ModelError(f"{path}: the GGUF header is truncated or damaged") from e


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path, whole: Collection[str]) -> None:
        self._data = data
        self._path = path
        self._whole = whole
        self._at = 0

    def read(self) -> GGUFFile:
        if self._data[:4] != b"GGUF":
            raise ModelError(f"{self._path}: not a GGUF file (it starts with {self._data[:4]!r})")
        self._at = 4
        version = self._scalar("<I")
        if version and version & 0xFFFF == 0:
            raise ModelError(
                f"{self._path}: a big-endian GGUF file; convert it with gguf-py's gguf_convert_endian.py"
            )
        if version == 1:
            raise ModelError(
                f"{self._path}: GGUF version 1, of 2023, is not supported; convert the model again"
            )
        if version not in (2, 3):
            raise ModelError(f"{self._path}: GGUF version {version} is not supported")
        n_tensors, n_keys = self._scalar("<Q"), self._scalar("<Q")
        if max(n_tensors, n_keys) > _MAX_COUNT:
            raise ModelError(f"{self._path}: damaged GGUF header: {n_tensors} tensors and {n_keys} keys")
        keys, spans = {}, {}
        for _ in range(n_keys):
            start = self._at
            name = self._string()
            keys[name] = self._value(self._scalar("<I"), whole=name in self._whole)
            spans[name] = (start, self._at)
        tensors = []
        for _ in range(n_tensors):
            name = self._string()
            n_dims = self._scalar("<I")
            if n_dims > 4:
                raise ModelError(f"{self._path}: tensor {brief(name)} has {n_dims} dimensions")
            ne = tuple(self._scalar("<Q") for _ in range(n_dims))
            tensors.append(TensorEntry(name, ne, self._scalar("<I"), self._scalar("<Q")))
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{self._path}: damaged GGUF header: alignment {brief(alignment)}")
        data = -(-self._at // alignment) * alignment
        return GGUFFile(self._path, version, keys, tuple(tensors), data_offsets=(data,), key_spans=spans)

    def _scalar(self, format: str) -> Any:
        (value,) = struct.unpack_from(format, self._data, self._at)
        self._at += struct.calcsize(format)
        return value

    def _skip(self, n_bytes: int) -> None:
        self._at += n_bytes
        if self._at > len(self._data):
            raise IndexError(self._at)

    def _string(self) -> str:
        length = self._scalar("<Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8", "replace")

    def _value(self, kind: int, *, whole: bool = False) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(whole)
        if kind not in _SCALARS:
            raise ModelError(f"{self._path}: damaged GGUF header: value type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self, whole: bool) -> list[Any] | LongArray:
        kind, length = self._scalar("<I"), self._scalar("<Q")
        if kind == _ARRAY:
            raise ModelError(f"{self._path}: damaged GGUF header: array of arrays")
        if whole or length <= LONGEST_ARRAY:
            return [self._value(kind) for _ in range(length)]
        if kind == _STRING:
            unpack, data, at = struct.unpack_from, self._data, self._at
            for _ in range(length):
                at += 8 + unpack("<Q", data, at)[0]
            self._at = at
            self._skip(0)
        elif kind in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise ModelError(f"{self._path}: damaged GGUF header: value type {kind}")
        return LongArray(length)


def _type_name(kind: int) -> str:
    import gguf

    try:
        return gguf.GGMLQuantizationType(kind).name
    except ValueError:
        return f"type {kind}"
