"""native/src/finite.c, compiled here with flags that let a compiler assume that there are no NaN."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

NATIVE = Path(__file__).parents[2] / "native"
TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # ggml's


@pytest.fixture(scope="module", params=["-O3 -ffast-math", "-O0"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "this test compiles C, as installing the package does: install gcc or clang"
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    target = tmp_path_factory.mktemp("finite") / "libfinite.so"
    sources = [NATIVE / "src" / "finite.c", NATIVE / "src" / "status.c"]
    includes = [f"-I{folder}" for folder in (NATIVE / "src", NATIVE / "include", package.parent / "include")]
    libraries = [f"-L{package / 'lib'}", "-lggml-base", f"-Wl,-rpath,{package / 'lib'}"]
    subprocess.run(
        [
            *(compiler, "-std=gnu11", *request.param.split(), "-shared", "-fPIC", *includes, *sources),
            *("-o", target, *libraries, "-pthread"),
        ],
        check=True,
    )
    library = ctypes.CDLL(str(target))
    library.finite_bytes.restype = ctypes.c_bool
    return library


def finite(library: ctypes.CDLL, type: str, values: npt.NDArray[np.generic]) -> bool:
    return bool(
        library.finite_bytes(
            TYPES[type], values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(values.nbytes)
        )
    )


@pytest.mark.parametrize(
    ("type", "bits", "infinity"), [("f32", np.uint32, 0x7F800000), ("f16", np.uint16, 0x7C00)]
)
def test_bits(library: ctypes.CDLL, type: str, bits: type[np.unsignedinteger], infinity: int) -> None:
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
    assert finite(library, "f32", values)
    for at in (0, 1, 64127, 128255):
        for bad in (np.nan, np.inf, -np.inf):
            changed = values.copy()
            changed[at] = bad
            assert not finite(library, "f32", changed)


def test_q8_0(library: ctypes.CDLL) -> None:
    """The scale of a block counts, its whole numbers may be anything."""
    blocks = np.full((5, 34), 0xFF, np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    assert finite(library, "q8_0", blocks)
    for block in range(5):
        for bad in (np.inf, -np.inf, np.nan):
            changed = blocks.copy()
            changed[block, :2] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
            assert not finite(library, "q8_0", changed)
