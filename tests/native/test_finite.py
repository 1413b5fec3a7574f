"""native/src/finite.c, compiled here with flags that let a compiler assume that there are no NaN."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture(scope="module", params=["-O3", "-O3 -ffast-math", "-O0"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "this test compiles C, as installing the package does: install gcc or clang"
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    target = tmp_path_factory.mktemp("finite") / "libfinite.so"
    sources = [NATIVE / "src" / "finite.c"]
    includes = [f"-I{folder}" for folder in (NATIVE / "src", NATIVE / "include", package.parent / "include")]
    libraries = [f"-L{package / 'lib'}", "-lggml-base", f"-Wl,-rpath,{package / 'lib'}"]
    subprocess.run(
        [
            *(compiler, "-std=gnu11", *request.param.split(), "-shared", "-fPIC", *includes, *sources),
            *("-o", target, *libraries),
        ],
        check=True,
    )
    library = ctypes.CDLL(str(target))
    library.finite_bytes.restype = library.finite_f32.restype = ctypes.c_bool
    return library


def finite(library: ctypes.CDLL, type: str, values: npt.NDArray[np.generic]) -> bool:
    return bool(
        library.finite_bytes(
            int(gguf.GGMLQuantizationType[type]),
            values.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(values.nbytes),
        )
    )


@pytest.mark.parametrize(
    ("type", "bits", "infinity"),
    [("F32", np.uint32, 0x7F800000), ("F16", np.uint16, 0x7C00), ("BF16", np.uint16, 0x7F80)],
)
def test_bits(library: ctypes.CDLL, type: str, bits: type[np.unsignedinteger[Any]], infinity: int) -> None:
    """All numbers next to an edge are finite; infinities and NaN of every kind are not, wherever they are."""
    sign = (infinity << 1) & ~infinity & np.iinfo(bits).max
    edges = [
        0,
        1,
        infinity - 1,
        sign,
        sign | 1,
        sign | (infinity - 1),
        infinity >> 1,
        infinity & (infinity << 1),
    ]
    good = np.array(edges * 37, bits)
    for n in (1, 2, 3, 15, 16, 17, 64, len(good)):
        assert finite(library, type, good[:n].copy())
    quiet = infinity | (infinity & -infinity) >> 1
    for bad in (infinity, infinity | 1, quiet, sign | infinity, sign | quiet, np.iinfo(bits).max):
        for n in (1, 2, 15, 17, 100):
            for at in {0, n // 2, n - 1}:
                values = good[:n].copy()
                values[at] = bad
                assert not finite(library, type, values)


def test_a_large_array(library: ctypes.CDLL) -> None:
    values = np.random.default_rng(0).standard_normal(128256).astype(np.float32)
    assert finite(library, "F32", values)
    for at in (0, 1, 64127, 128255):
        for bad in (np.nan, np.inf, -np.inf):
            changed = values.copy()
            changed[at] = bad
            assert not finite(library, "F32", changed)


def test_time(library: ctypes.CDLL, request: pytest.FixtureRequest) -> None:
    """The values of one token of the 11B model: its logits, their input, and what is watched in 40 layers. At
    five tokens a second 0.5 % of a token is 1 ms. Run with -s it prints the microseconds."""
    if request.node.callspec.params["library"] != "-O3":
        return
    sizes = [128256, 4096] + 40 * [4096, 14336]
    values = [np.random.default_rng(n).standard_normal(n).astype(np.float32) for n in sizes]
    pointers = [(v.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(v.size)) for v in values]
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        assert all(library.finite_f32(*pointer) for pointer in pointers)
        seconds.append(time.perf_counter() - start)
    print(f"{1e6 * min(seconds):.0f} us")
    assert min(seconds) < 0.001


QUANTIZED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ2_S"),
    *("IQ2_XXS", "IQ2_XS", "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)


@pytest.mark.parametrize("name", QUANTIZED)
def test_scales_of_blocks(library: ctypes.CDLL, name: str) -> None:
    """NaN at any place of a block is found exactly where it makes the block's numbers NaN."""
    kind = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    n_scales = 0
    for at in range(size - 1):
        blocks = np.zeros((3, size), np.uint8)
        blocks[1, at : at + 2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
        with np.errstate(all="ignore"):
            numbers = gguf.quants.dequantize(blocks, kind)
        is_finite = bool(np.isfinite(numbers).all())
        assert finite(library, name, blocks) == is_finite, at
        n_scales += not is_finite
    assert n_scales == (2 if name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else 1)
