"""Our own attention and GELU on the CPU against the plain graph, the double-precision reference and math.erf.

Which kernels run here depends on the processor; the portable one runs everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
from golden_cases import Picture, relative_error, tiled
from reference import Reference

from mllama_gguf import Mllama, RequestError
from mllama_gguf._native import load
from mllama_gguf.convert import convert

VARIABLE = "MLLAMA_CPU_KERNEL"
NAMES = ("avx512", "avx2", "portable")


def runs_here(name: str) -> bool:
    native = load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        return bool(native.lib.mllama_cpu_kernel() != native.ffi.NULL)


KERNELS = [name for name in NAMES if runs_here(name)]
HEAD_DIMS = [*range(32, 129, 8), 33, 50]  # the last two are left to the plain graph


def make(
    folder: Path, head_dim: int, published: bool = False, type: str = "f32", **changes: Any
) -> tuple[tiny.Arch, Path, Path]:
    """Architecture and files of a tiny model whose vision encoder has two heads of this size."""
    arch = dataclasses.replace(
        tiny.ARCHS["square"], name=f"head{head_dim}", vision_width=2 * head_dim, vision_heads=2, **changes
    )
    weights = tiny.make_weights(arch)
    if published:
        weights = tiny.unused_tiles_zero(arch, weights)
    checkpoint = tiny.make_checkpoint(arch, folder / "checkpoint", weights=weights)
    text, mmproj = convert(checkpoint, folder / "text.gguf", type=type)
    return arch, text, mmproj


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_of_every_head_size(head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """148 positions of which 37 to 148 are real: no number is a multiple of a block."""
    arch, text, mmproj = make(tmp_path, head_dim, image_size=42, patch_size=7)
    for n_threads in (1, 2, 5):
        with Mllama(text, mmproj, n_ctx=64, n_threads=n_threads) as model:
            for aspect_ratio_id in (1, 2, 6):
                image = tiled(arch, Picture(aspect_ratio_id))
                monkeypatch.setenv(VARIABLE, "off")
                plain = model.encode_image(image).states
                for kernel in KERNELS:
                    monkeypatch.setenv(VARIABLE, kernel)
                    states = model.encode_image(image).states
                    assert relative_error(states, plain) <= 2e-6, (kernel, n_threads, aspect_ratio_id)


@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_layers(kernel: str, type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns, inputs and outputs than a block, none of them a multiple; weights of every type."""
    arch, text, mmproj = make(tmp_path, 40, type=type, image_size=84, patch_size=6, vision_ff=709)
    picture = Picture(6)
    expected = Reference(mmproj).states(picture.pixels(arch), 6, 4)
    monkeypatch.setenv(VARIABLE, kernel)
    for n_threads in (1, 2, 5):
        with Mllama(text, mmproj, n_ctx=64, n_threads=n_threads) as model:
            error = relative_error(model.encode_image(tiled(arch, picture)).states, expected)
        # Where ggml multiplies, it rounds what goes into a product to the type of the weights.
        assert error <= (1e-5 if kernel != "portable" or type == "f32" else 1e-2)


@pytest.mark.parametrize("kernel", [*KERNELS, "off"])
def test_unused_tiles_that_are_alike(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unused tile stands for all: the same as the reference, which computes each, on every grid."""
    arch, text, mmproj = make(tmp_path, 40, published=True)
    reference = Reference(mmproj)
    monkeypatch.setenv(VARIABLE, kernel)
    with Mllama(text, mmproj, n_ctx=64, n_threads=2) as model:
        for aspect_ratio_id, (rows, columns) in enumerate(arch.grids, 1):
            picture = Picture(aspect_ratio_id)
            expected = reference.states(picture.pixels(arch), aspect_ratio_id, rows * columns)
            assert relative_error(model.encode_image(tiled(arch, picture)).states, expected) <= 1e-5, (
                rows,
                columns,
            )


def erf(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    native = load()
    y = np.empty_like(x)
    pointers = (native.ffi.cast("float *", a.ctypes.data) for a in (x, y))
    native.check(native.lib.mllama_erf(*pointers, x.size))
    return y


@pytest.mark.parametrize("kernel", KERNELS)
def test_erf(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats of every size, both signs, 50,001 between 0 and 5, and what is not a number."""
    monkeypatch.setenv(VARIABLE, kernel)
    bits = np.arange(0, 0x7F800000, 8191 * 3, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), np.linspace(0, 5, 50001, dtype=np.float32)])
    x = np.concatenate([x, -x])
    expected = np.array([math.erf(v) for v in x.tolist()])
    assert np.abs(erf(x) - expected).max() <= 5e-7
    special = erf(np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], np.float32))
    np.testing.assert_allclose(special, [1, -1, np.nan, 0, 0], atol=5e-7)


def test_unknown_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, text, mmproj = make(tmp_path, 32)
    with Mllama(text, mmproj, n_ctx=64) as model:
        monkeypatch.setenv(VARIABLE, "abacus")
        with pytest.raises(RequestError, match="'abacus'"):
            model.encode_image(tiled(arch, Picture(1)))
