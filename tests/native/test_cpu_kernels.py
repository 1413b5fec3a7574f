"""Our own attention, of images and of text, and GELU on the CPU against the plain graph, the
double-precision reference and math.erf.

Which kernels run here depends on the processor; the portable one runs everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
from golden_cases import GoldenImage, relative_error, tiled
from helpers import TinyFiles
from reference import Reference

from mllama_gguf import Aborted, Mllama, RequestError
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import LocalModel
from mllama_gguf.convert.huggingface import convert
from mllama_gguf.convert.quantize import quantize

Files = Callable[[str], TinyFiles]
Floats = npt.NDArray[np.float32]

VARIABLE = "MLLAMA_CPU_KERNEL"
NAMES = ("avx512bf16", "avx512", "avx2", "neonbf16", "neon", "portable", "amx")


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
    images = [tiled(arch, GoldenImage(aspect_ratio_id)) for aspect_ratio_id in (1, 2, 6)]
    for n_threads in (1, 2, 5):
        states = {}
        for kernel in ("off", *KERNELS):
            monkeypatch.setenv(VARIABLE, kernel)
            with Mllama(text, mmproj, n_ctx=64, n_threads=n_threads) as model:
                states[kernel] = [model.encode_image(image).states for image in images]
        for kernel in KERNELS:
            for ours, plain in zip(states[kernel], states["off"], strict=True):
                assert relative_error(ours, plain) <= 2e-6, (kernel, n_threads)


@pytest.mark.parametrize("head_dim", [32, 40, 56, 80, 104, 128])
def test_weights_of_bf16(head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of BF16 factors where the processor has it, F32 elsewhere: right for every grid, and the same
    bits whatever the number of threads."""
    arch, text, mmproj = make(tmp_path, head_dim, type="bf16", image_size=42, patch_size=7)
    reference = Reference(mmproj)
    for aspect_ratio_id, n_tiles in ((1, 1), (2, 2), (6, 4)):
        image = GoldenImage(aspect_ratio_id)
        expected = reference.states(image.pixels(arch), aspect_ratio_id, n_tiles)
        for kernel in KERNELS:
            monkeypatch.setenv(VARIABLE, kernel)
            found = []
            for n_threads in (1, 3):
                with Mllama(text, mmproj, n_ctx=64, n_threads=n_threads, image_cache=False) as model:
                    found.append(model.encode_image(tiled(arch, image)).states)
            np.testing.assert_array_equal(*found)
            assert relative_error(found[0], expected) <= 1e-2, (kernel, aspect_ratio_id)


@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_layers(kernel: str, type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns, inputs and outputs than a block, none of them a multiple; weights of every type."""
    arch, text, mmproj = make(tmp_path, 40, type=type, image_size=84, patch_size=6, vision_ff=709)
    image = GoldenImage(6)
    expected = Reference(mmproj).states(image.pixels(arch), 6, 4)
    monkeypatch.setenv(VARIABLE, kernel)
    for n_threads in (1, 2, 5):
        with Mllama(text, mmproj, n_ctx=64, n_threads=n_threads) as model:
            error = relative_error(model.encode_image(tiled(arch, image)).states, expected)
        # BF16 instructions (our own or, for the lesser kernels, ggml's), and ggml where vectors are short,
        # round what goes into a product to the type of the weights.
        has_bf16 = {"avx512bf16", "neonbf16", "amx"} & set(KERNELS)
        rounds = (type == "bf16" and has_bf16) or (type != "f32" and kernel == "portable")
        assert error <= (1e-2 if rounds else 1e-5)


@pytest.mark.parametrize("kernel", [*KERNELS, "off"])
def test_unused_tiles_that_are_alike(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unused tile stands for all: the same as the reference, which computes each, on every grid."""
    arch, text, mmproj = make(tmp_path, 40, published=True)
    reference = Reference(mmproj)
    monkeypatch.setenv(VARIABLE, kernel)
    with Mllama(text, mmproj, n_ctx=64, n_threads=2) as model:
        for aspect_ratio_id, (rows, columns) in enumerate(arch.grids, 1):
            image = GoldenImage(aspect_ratio_id)
            expected = reference.states(image.pixels(arch), aspect_ratio_id, rows * columns)
            assert relative_error(model.encode_image(tiled(arch, image)).states, expected) <= 1e-5, (
                rows,
                columns,
            )


TEXT_ARCHS = ("square", "gqa", "wide", "threetiles")  # 1, 3, 2 and 2 heads share K and V; heads of 16 to 128


def text_logits(model: Mllama, states: list[Floats], prompts: list[tuple[int, bool]]) -> Floats:
    """Logits of all tokens of prompts, each so many tokens that see the images or not."""
    context = model._conversation.context
    context.clear()
    slot = context.image_fill(states)
    chance = np.random.default_rng(0)
    rows = []
    for n, sees in prompts:
        tokens = chance.integers(0, model.vocab_size, n).tolist()
        rows.append(context.decode(tokens, slot if sees else -1, len(states) if sees else 0, "all"))
    return np.concatenate(rows)


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", TEXT_ARCHS)
def test_text_attention(name: str, kind: str, tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens, few and many, before and after more rows than one split has: as the plain graph, and the
    same bits whatever the number of threads."""
    files = tiny_files(name)
    logits: dict[tuple[str, int], Floats] = {}
    prompts = [(1, False), (2, True), (5, False), (70, True), (1, True), (530, False), (1, True), (4, True)]
    # The plain graph rounds what it multiplies with an F16 cache, too.
    tolerance = 2e-5 if kind == "f32" else 2e-3
    for n_threads in (1, 3):
        for kernel in ("off", *KERNELS):
            monkeypatch.setenv(VARIABLE, kernel)
            with Mllama(
                files.one, n_ctx=700, n_batch=128, n_threads=n_threads, type_k=kind, type_v=kind
            ) as model:
                h = model.hparams
                n = -(-600 // (h.max_tiles * h.n_positions))
                shape = (n, h.max_tiles, h.n_positions, h.n_embd)
                states = list(np.random.default_rng(1).standard_normal(shape, np.float32))
                logits[kernel, n_threads] = text_logits(model, states, prompts)
            error = relative_error(logits[kernel, n_threads], logits["off", n_threads])
            assert error <= tolerance, (kernel, n_threads)
            assert (error == 0) == (kernel == "off"), "the kernel was not used"
    for kernel in KERNELS:
        np.testing.assert_array_equal(logits[kernel, 1], logits[kernel, 3])


@pytest.mark.parametrize("made", [*KERNELS, "off"])
def test_types_of_values(made: str, tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """In F16 only where our kernel reads them, else in F32."""
    monkeypatch.setenv(VARIABLE, made)
    sizes = {}
    for settings in (
        {},
        {"flash_attn": False},
        {"type_k": "f32"},
        {"type_k": "q8_0"},
        {"type_k": "f32", "type_v": "f32"},
    ):
        with Mllama(tiny_files("wide").one, n_ctx=256, **settings) as model:  # type: ignore[arg-type]
            h, memory = model.hparams, model._conversation.context.memory()
            values = h.head_dim * h.n_head_kv * 256 * (h.n_layer - h.n_cross_layers)
            sizes[tuple(settings.values())] = memory.self_kv / values
    half = 4 if made == "off" else 2
    assert sizes == {
        (): 2 + half,
        (False,): 2 + 4,
        ("f32",): 4 + half,
        ("q8_0",): 34 / 32 + 4,
        ("f32", "f32"): 4 + 4,
    }


@pytest.mark.parametrize("made", [*KERNELS, "off"])
def test_large_values(made: str, tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of many large values in F16 neither overflow nor lose more than their rounding."""
    prompts = [(1, True), (20, True), (2, True), (300, True), (1, True)]
    for name in ("gqa", "wide"):
        with Mllama(tiny_files(name).one, n_ctx=512, type_k="f32", type_v="f32") as model:
            h = model.hparams
            n = -(-600 // (h.max_tiles * h.n_positions))
            states = [
                np.random.default_rng(i).standard_normal((h.max_tiles, h.n_positions, h.n_embd), np.float32)
                * 2000
                for i in range(n)
            ]
            exact = text_logits(model, states, prompts)
        monkeypatch.setenv(VARIABLE, made)
        with Mllama(tiny_files(name).one, n_ctx=512, type_k="f32", type_v="f16") as model:
            assert relative_error(text_logits(model, states, prompts), exact) <= 1e-3
        monkeypatch.delenv(VARIABLE)


COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 96, 97, 200)  # less and more than groups and blocks of columns


def quantized(tiny_files: Files, folder: Path, type: str, **changes: Any) -> Path:
    source, path = tiny_files("quant").one, folder / f"{type}.gguf"
    if changes:
        arch = dataclasses.replace(tiny.ARCHS["quant"], name="other", **changes)
        source, _ = convert(tiny.make_checkpoint(arch, folder / "checkpoint"), folder / "source.gguf")
    quantize(source, path, type)
    return path


@pytest.mark.parametrize("changes", [{}, {"heads": 16, "kv_heads": 1, "vocab_size": 389}])
@pytest.mark.parametrize(
    ("target", "type", "tolerance"),
    [
        ("q4_k_m", "q4_K", 1e-5),
        ("q5_k_m", "q5_K", 1e-5),
        ("q6_k", "q6_K", 1e-5),
        ("q8_0", "q8_0", 5e-4),  # ggml rounds the factors of columns for these two to F16
        ("q4_0", "q4_0", 5e-4),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_of_quantized_weights(
    kernel: str,
    target: str,
    type: str,
    tolerance: float,
    changes: dict[str, int],
    tiny_files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any number of columns, rows that fill no block (16 and 389), all types: of the same input ggml's but
    for the order of sums, and the same bits whatever the number of threads."""
    path = quantized(tiny_files, tmp_path, target, **changes)
    seen: list[Floats] = []
    taken = {"blk.0.attn_q.weight": type, "blk.0.attn_k.weight": type}

    def tap(name: str, values: Floats | None) -> bool:
        if values is not None:
            seen.append(values.copy())
        return name in ("blk.0.q", "blk.0.k")

    logits = {}
    for name, n_threads in (("off", 2), (kernel, 1), (kernel, 3)):
        monkeypatch.setenv(VARIABLE, name)
        with Mllama(path, n_ctx=256, n_threads=n_threads) as model:
            assert {t.name: t.type for t in model._backend.model.tensors() if t.name in taken} == taken
            context = model._conversation.context
            with model.tap(tap):
                for n in COUNTS:
                    context.decode([2 + i % 300 for i in range(n)], -1, 0)
                    context.clear()
            rows = [context.decode([token], -1, 0)[0] for token in range(2, 12)]
            logits[name, n_threads] = np.stack([*rows, context.decode(list(range(2, 15)), -1, 0)[0]])
    n_seen = len(seen) // 3
    plain, ours, again = (seen[i : i + n_seen] for i in range(0, 3 * n_seen, n_seen))
    for a, b, c in zip(plain, ours, again, strict=True):
        assert relative_error(b, a) <= tolerance
        np.testing.assert_array_equal(b, c)
    np.testing.assert_array_equal(logits[kernel, 1], logits[kernel, 3])
    # Activations are rounded to 8 bits, and another last bit before that may round one differently.
    assert relative_error(logits[kernel, 1], logits["off", 2]) <= 3e-2


@pytest.mark.parametrize("weights", ["f32", "q4_k_m"])
def test_text_stops(weights: str, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort is heard, and what is computed next is right."""
    monkeypatch.setenv(VARIABLE, "portable" if weights == "f32" else KERNELS[0])
    path = tiny_files("wide").one if weights == "f32" else quantized(tiny_files, tmp_path, weights)
    stop = False
    prompt = [4] * 6000  # most of a second; the callback is asked every 50 ms
    with Mllama(path, n_ctx=6100, n_threads=2, abort=lambda: stop) as model:
        context = model._conversation.context
        context.decode([1, 2, 3], -1, 0)
        expected = context.decode(prompt, -1, 0)
        context.truncate(3)
        stop = True
        with pytest.raises(Aborted):
            context.decode(prompt, -1, 0)
        stop = False
        context.truncate(3)
        np.testing.assert_array_equal(context.decode(prompt, -1, 0), expected)


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


def made_for(path: Path, kernel: str | None, flash_attn: bool = True) -> str:
    """The kernel of a context that asks for one."""
    native = load()
    ffi, lib = native.ffi, native.lib
    model = LocalModel(path, None, Callbacks(native))
    name = ffi.NULL if kernel is None else ffi.new("char[]", kernel.encode())
    params = ffi.new("mllama_context_params *", lib.mllama_context_default_params())
    params.n_ctx, params.cpu_kernel, params.flash_attn = 256, name, flash_attn
    out = ffi.new("mllama_context **")
    with model.handle as pointer:
        native.check(lib.mllama_context_new(pointer, params, out))
        try:
            return native.text(lib.mllama_kernel_name(out[0]))
        finally:
            lib.mllama_context_free(out[0])


def test_which_kernel(tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context's parameter, then the environment, then the best; without flash_attn ggml alone."""
    path = tiny_files("square").one
    monkeypatch.setenv(VARIABLE, "off")
    for kernel in KERNELS:
        assert made_for(path, kernel) == kernel
        assert made_for(path, kernel, flash_attn=False) == "off"
    assert made_for(path, None) == made_for(path, "") == "off"
    monkeypatch.setenv(VARIABLE, "portable")
    assert made_for(path, None) == "portable"
    assert made_for(path, "off") == "off"
    for unset in (lambda: monkeypatch.setenv(VARIABLE, ""), lambda: monkeypatch.delenv(VARIABLE)):
        unset()
        assert made_for(path, None) == made_for(path, "") == KERNELS[0]
    with pytest.raises(RequestError, match="cpu_kernel is 'abacus'; it can be "):
        made_for(path, "abacus")


@pytest.mark.parametrize("name", ["square", "gqa", "wide"])
def test_an_f16_encoder_in_bf16(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vision_precision="bf16": as exact as a BF16 file where the processor has instructions for it, and exact
    elsewhere. ggml rounds the same factors on every processor, but those of attention."""
    arch, files = tiny.ARCHS[name], {}
    checkpoint = tiny.make_checkpoint(arch, tmp_path / "checkpoint")
    for type in ("f16", "bf16"):
        files[type] = convert(checkpoint, tmp_path / f"{type}.gguf", type=type)
    expected = Reference(files["f16"][1]).states(GoldenImage(2).pixels(arch), 2, math.prod(arch.grids[1]))

    def error(kernel: str, type: str, **settings: Any) -> float:
        monkeypatch.setenv(VARIABLE, kernel)
        with Mllama(*files[type], n_ctx=64, image_cache=False, **settings) as model:
            name = f"{kernel},f16=bf16" if settings else kernel
            assert model._backend.cpu_kernel == load().cpu_kernel(name)
            return relative_error(model.encode_image(tiled(arch, GoldenImage(2))).states, expected)

    for kernel in KERNELS:
        has_bf16 = kernel in ("avx512bf16", "neonbf16", "amx")
        rounded = error(kernel, "f16", vision_precision="bf16")
        assert rounded <= 7e-3
        assert has_bf16 == (rounded != error(kernel, "f16")), "the setting is not obeyed"
    assert 1e-3 <= error(f"{KERNELS[0]},bf16=ggml", "bf16") <= 7e-3


def mixed_kernels() -> list[tuple[str, str]]:
    """The best kernel here with one other table, of every part, and the part."""
    native, found = load(), []
    text, lib = native.text, native.lib
    for index in range(7):
        part = text(lib.mllama_cpu_part(index))
        tables = [text(lib.mllama_cpu_table(index, i)) for i in range(10)]
        used = text(lib.mllama_cpu_kernel_uses(KERNELS[0].encode(), index))
        found += [(f"{KERNELS[0]},{part}={table}", part) for table in tables if table not in ("", used)]
    return found


def test_parts_of_a_kernel(tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another table for a part computes the same but for rounding, and only that part changes."""
    arch, text, mmproj = make(tmp_path, 40, type="bf16", image_size=42, patch_size=7)
    f32_text, f32_mmproj = (path.with_suffix(".f32.gguf") for path in (text, mmproj))
    convert(tmp_path / "checkpoint", f32_text, mmproj=f32_mmproj, type="f32")
    q4 = quantized(tiny_files, tmp_path, "q4_k_m")
    q4_0 = quantized(tiny_files, tmp_path, "q4_0")
    image = tiled(arch, GoldenImage(6))

    def results(kernel: str) -> dict[str, Floats]:
        monkeypatch.setenv(VARIABLE, kernel)
        with (
            Mllama(text, mmproj, n_ctx=64, image_cache=False) as bf16,
            Mllama(f32_text, f32_mmproj, n_ctx=64, image_cache=False, type_k="f32", type_v="f32") as f32,
            Mllama(q4, n_ctx=64) as k_quants,
            Mllama(q4_0, n_ctx=64) as blocks_of_32,
        ):
            return {
                "bf16": bf16.encode_image(image).states,
                "f32": f32.encode_image(image).states,
                "text": f32.logits(list(range(2, 40))),
                "quantized": k_quants.logits(list(range(2, 40))),
                "quantized32": blocks_of_32.logits(list(range(2, 40))),
            }

    # Which results depend on a part
    reached = {
        "attention": {"f32", "bf16"},
        "linear": {"f32", "bf16"},
        "bf16": {"bf16"},
        "cache": {"text", "quantized", "quantized32"},
        "quantized": {"quantized", "quantized32"},  # its output is of Q6_K
        "quantized32": {"quantized32"},
        "f16": set(),
    }
    bounds = {"bf16": 1e-2, "f32": 1e-5, "text": 2e-3, "quantized": 3e-2, "quantized32": 3e-2}
    best = results(KERNELS[0])
    mixed = mixed_kernels()
    assert {part for _, part in mixed} >= {"attention", "cache"}
    for kernel, part in mixed:
        found = results(kernel)
        for name, values in found.items():
            error = relative_error(values, best[name])
            assert error <= bounds[name], (kernel, name)
            assert error == 0 or name in reached[part], (kernel, name)


def test_unknown_kernel(tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "abacus")
    for flash_attn in (True, False):
        with pytest.raises(RequestError, match="MLLAMA_CPU_KERNEL is 'abacus'"):
            Mllama(tiny_files("square").one, n_ctx=64, flash_attn=flash_attn)


def test_a_context_keeps_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is read when a context is made, and not again."""
    arch, text, mmproj = make(tmp_path, 32)
    with Mllama(text, mmproj, n_ctx=64, image_cache=False) as model:
        image = tiled(arch, GoldenImage(1))
        expected = model.encode_image(image).states
        logits = model.logits([1, 2, 3])
        model.reset()
        for name in ("off", "abacus"):
            monkeypatch.setenv(VARIABLE, name)
            np.testing.assert_array_equal(model._conversation.context.encode(image.pixels[:1], 1), expected)
            np.testing.assert_array_equal(model.logits([1, 2, 3]), logits)
            model.reset()
