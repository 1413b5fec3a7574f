"""Images copied into the cross-attention cache from disk: the same to the bit, and when it is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from golden_cases import case, tiled
from helpers import TinyFiles, noisy_image

from mllama_gguf import Aborted, ImageEmbedding, Mllama, ModelError, RequestError
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.context import LocalContext
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import LocalModel
from mllama_gguf.cache.disk import ImageCache
from mllama_gguf.cache.identity import file_stamps, weights_sha256
from mllama_gguf.convert.huggingface import convert
from mllama_gguf.gguf.reader import read_gguf

Files = Callable[[str], TinyFiles]


def image_kv_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.image_kv")}


class Watched:
    """Opens models and notes what was computed: images encoded, and images filled from states."""

    def __init__(self) -> None:
        self.encoded = 0
        self.filled = 0

    @contextmanager
    def open(self, *paths: Path, **options: Any) -> Iterator[Mllama]:
        self.encoded = self.filled = 0
        with Mllama(*paths, n_ctx=512, progress=self._progress, **options) as model:
            fill = model._conversation.context.image_fill

            def image_fill(states: Any) -> int:
                self.filled += sum(not isinstance(s, int) for s in states)
                return fill(states)

            model._conversation.context.image_fill = image_fill  # type: ignore[method-assign]
            yield model

    def _progress(self, phase: str, done: int, total: int) -> None:
        self.encoded += phase == "encode" and done == total


@pytest.fixture
def watched() -> Watched:
    return Watched()


# ---- the same answers --------------------------------------------------------------------------------------

CASES = ("text_before_image", "three_images", "adjacent_then_one", "image_first", "over_400_tokens")


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("arch", list(tiny.ARCHS))
def test_answers_are_the_same_to_the_bit(
    folder: Path, tmp_path: Path, tiny_files: Files, watched: Watched, arch: str, type: str
) -> None:
    number = list(tiny.ARCHS).index(arch) + ("f32", "f16", "q8_0").index(type)
    prompt = case(tiny.ARCHS[arch], CASES[number % len(CASES)])
    paths = (tiny_files(arch).one,)
    if type != "f32":
        checkpoint = tiny.make_checkpoint(tiny.ARCHS[arch], tmp_path / "hf")
        paths = convert(checkpoint, tmp_path / "model.gguf", type=type)  # type: ignore[assignment]
    settings: dict[str, Any] = {
        "flash_attn": number % 2 == 0,
        "type_k": ("f16", "f32")[number // 2 % 2],
        "type_v": ("f16", "f32", "f16")[number % 3],
        "isolate": number % 4 == 3,
    }
    images = [tiled(tiny.ARCHS[arch], p) for p in prompt.images]
    answers = []
    for image_cache in (False, True, True):
        with watched.open(*paths, n_threads=1, image_cache=image_cache, **settings) as model:
            logits = model.logits(prompt.tokens, images)
            steps = [model._conversation.session.step(token) for token in (3, 5, 7)]
            answers.append(np.concatenate([logits, np.array(steps)]))
        assert (watched.encoded == 0) == (watched.filled == 0) == (len(answers) == 3)
    assert np.array_equal(answers[1], answers[0])
    assert np.array_equal(answers[2], answers[0])
    kept = image_kv_files(folder)
    assert len(kept) == len({p.key for p in prompt.images})
    for name in kept:
        (folder / name).unlink()
    with watched.open(*paths, n_threads=2, **settings) as model:
        model.logits(prompt.tokens, images)
    assert watched.filled
    assert image_kv_files(folder) == kept


def test_an_image_is_the_same_beside_others(folder: Path, tiny_files: Files, watched: Watched) -> None:
    prompt = case(tiny.ARCHS["wide"], "adjacent_then_one")
    images = [tiled(tiny.ARCHS["wide"], p) for p in prompt.images]
    token = tiny.ARCHS["wide"].vocab_size  # the image token is the first that has no logit
    with watched.open(tiny_files("wide").one, image_cache=False) as model:
        assert token == model.image_token_id
        expected = model.logits([1, token, token, 2], images[1::-1])
    for alone in images[:2]:
        with watched.open(tiny_files("wide").one) as model:
            model.logits([token, 1], [alone])
    with watched.open(tiny_files("wide").one) as model:
        assert np.array_equal(model.logits([1, token, token, 2], images[1::-1]), expected)
    assert (watched.encoded, watched.filled) == (0, 0)


# ---- when --------------------------------------------------------------------------------------------------


def test_the_first_piece_does_not_wait(folder: Path, tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one) as model:
        pieces = model.caption(noisy_image(1), stream=True, max_tokens=50)
        next(pieces)
        assert not image_kv_files(folder)
        next(pieces)
        assert len(image_kv_files(folder)) == 1


def test_a_reply_of_one_token(folder: Path, tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one) as model:
        model.caption(noisy_image(1), max_tokens=1)
        assert not image_kv_files(folder)
        model.caption(noisy_image(2), max_tokens=1)
        assert len(image_kv_files(folder)) == 1
        model.reset()
        assert len(image_kv_files(folder)) == 2
        model.caption(noisy_image(3), max_tokens=1)
    assert len(image_kv_files(folder)) == 3


def test_states_are_not_even_read(folder: Path, tiny_files: Files, watched: Watched) -> None:
    with watched.open(tiny_files("gqa").one) as model:
        expected = model.caption(noisy_image(1), max_tokens=9)
        states = model.encode_image(noisy_image(1)).states
    (path,) = folder.glob("*.states")
    whole = path.read_bytes()
    path.unlink()
    for _ in range(2):
        with watched.open(tiny_files("gqa").one) as model:
            assert model.caption(noisy_image(1), max_tokens=9) == expected
        assert (watched.encoded, watched.filled) == (0, 0)
        assert not path.exists()
    with watched.open(tiny_files("gqa").one) as model:  # they can still be had
        assert np.array_equal(model.encode_image(noisy_image(1)).states, states)
    assert watched.encoded == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize("at", [0, 20, 40, 47, 48, -1000, -5, -1, None])
def test_a_damaged_image_kv(
    folder: Path,
    tiny_files: Files,
    watched: Watched,
    caplog: pytest.LogCaptureFixture,
    at: int | None,
    with_states: bool,
) -> None:
    with watched.open(tiny_files("gqa").one) as model:
        expected = model.caption(noisy_image(1), max_tokens=9)
    ((name, whole),) = image_kv_files(folder).items()
    data = bytearray(whole)
    if at is None:
        del data[-1]
    else:
        data[at] ^= 1
    (folder / name).write_bytes(data)
    if not with_states:
        next(folder.glob("*.states")).unlink()
    with watched.open(tiny_files("gqa").one) as model:
        assert model.caption(noisy_image(1), max_tokens=9) == expected
        assert len(model._conversation.session.slots) == 1
    assert (watched.encoded, watched.filled) == (not with_states, 1)
    assert image_kv_files(folder) == {name: whole}
    (record,) = [r for r in caplog.records if r.name == "mllama_gguf.cache.disk"]
    assert "the entry is dropped" in record.getMessage()


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("call", ["image_get", "image_set", "image_map"])
def test_copying_can_be_stopped(folder: Path, tiny_files: Files, call: str, isolate: bool) -> None:
    stop = False
    if call != "image_get":
        with Mllama(tiny_files("gqa").one) as model:
            model.caption(noisy_image(1), max_tokens=9)
    with Mllama(tiny_files("gqa").one, abort=lambda: stop, isolate=isolate) as model:
        if call == "image_set":
            model._conversation.context.image_mapped_size = lambda n_tiles: 0  # type: ignore[method-assign]
        asked = "image_mapped_size" if call == "image_map" else "image_size"
        size = getattr(model._conversation.context, asked)

        def image_size(*args: int) -> int:  # asked before
            nonlocal stop
            stop = True
            return size(*args)

        setattr(model._conversation.context, asked, image_size)
        with pytest.raises(Aborted):
            model.caption(noisy_image(1), max_tokens=9)
        stop = False
        setattr(model._conversation.context, asked, size)
        before = len(image_kv_files(folder))
        answer = model.caption(noisy_image(1), max_tokens=9)
        assert len(model._conversation.session.slots) == 1
    assert before == (call != "image_get")
    assert not list(folder.glob(".*"))
    with Mllama(tiny_files("gqa").one, image_cache=False) as model:
        assert model.caption(noisy_image(1), max_tokens=9) == answer


@pytest.mark.parametrize("isolate", [False, True])
def test_an_image_alone_stays_in_its_file(
    folder: Path, tiny_files: Files, watched: Watched, isolate: bool
) -> None:
    """As long as it is seen, even if the file is removed."""
    with watched.open(tiny_files("gqa").one) as model:
        expected = model.caption(noisy_image(1), max_tokens=9)
    with watched.open(tiny_files("gqa").one, isolate=isolate) as model:
        pieces = model.caption(noisy_image(1), max_tokens=9, stream=True)
        text = next(pieces)
        assert model._conversation.session._slot is not None
        slot = model._conversation.session._slot.number
        n_bytes = model._conversation.context.image_size(slot, 0)
        assert n_bytes == model._conversation.context.image_mapped_size(4)
        with pytest.raises(RequestError, match="only read"):
            model._conversation.context.image_set(slot, 0, 0, np.zeros(1, np.uint8))
        ((_, whole),) = image_kv_files(folder).items()
        assert model._conversation.context.image_get(slot, 0, 0, n_bytes).tobytes() == whole[64:-4]
        for path in folder.glob("*.image_kv"):
            path.unlink()
        assert text + "".join(pieces) == expected
        assert model.caption(noisy_image(1), max_tokens=9) == expected
        model.reset()
        assert model.caption(noisy_image(1), max_tokens=9) == expected
    assert (watched.encoded, watched.filled) == (0, 1)


def test_files_that_cannot_be_mapped(tmp_path: Path, context: LocalContext) -> None:
    size = context.image_mapped_size(1)
    assert size > 0 and context.image_mapped_size(0) == context.image_mapped_size(99) == 0
    path = tmp_path / "picture"
    with pytest.raises(ModelError, match="No such file"):
        context.image_map(1, path, 0)
    path.write_bytes(bytes(64 + size - 1))
    for offset in (64, 63, 2**63, 2**64 - 64):
        with pytest.raises(RequestError, match="that could be mapped"):
            context.image_map(1, path, offset)
    with pytest.raises(ModelError, match="cannot be mapped"):
        context.image_map(1, tmp_path, 0)
    path.write_bytes(bytes(64 + size))
    slot = context.image_map(1, path, 64)
    assert context.image_size(slot, 0) == size
    assert np.isfinite(context.decode([1, 2], slot, 1)).all()
    context.image_free(slot)
    context.clear()


def test_a_tap_sees_all(folder: Path, tiny_files: Files, watched: Watched) -> None:
    with watched.open(tiny_files("gqa").one) as model:
        model.caption(noisy_image(1), max_tokens=2)
    names: set[str] = set()

    def tap(name: str, values: object) -> bool:
        names.add(name)
        return False

    with watched.open(tiny_files("gqa").one) as model, model.tap(tap):
        model.caption(noisy_image(1), max_tokens=2)
    assert {"blk.0.cross_k", "blk.3.cross_v"} <= names


def test_embeddings(folder: Path, tiny_files: Files, watched: Watched) -> None:
    """Those that we made are kept. Of others the key may mean something else tomorrow."""
    with watched.open(tiny_files("gqa").one) as model:
        ours = model.encode_image(noisy_image(1))
        model.caption(ours, max_tokens=2)
        model.caption(ImageEmbedding(ours.states.copy(), 1, "mine"), max_tokens=2)
        model.caption(ImageEmbedding(ours.states.copy(), 1), max_tokens=2)
    assert len(image_kv_files(folder)) == 1
    assert watched.filled == 3
    with watched.open(tiny_files("gqa").one) as model:
        model.caption(model.encode_image(noisy_image(1)), max_tokens=2)
    assert (watched.encoded, watched.filled) == (0, 0)


# ---- keys --------------------------------------------------------------------------------------------------


def test_what_makes_a_key(folder: Path, tmp_path: Path, tiny_files: Files, watched: Watched) -> None:
    files = tiny_files("gqa")
    text = tmp_path / "text.gguf"
    shutil.copy(files.text, text)
    places = {t.name: t for t in read_gguf(text).tensors}

    def n_image_kv(**options: Any) -> int:
        with watched.open(text, files.mmproj, **options) as model:
            model.caption(noisy_image(1), max_tokens=2)
        return len(image_kv_files(folder))

    assert n_image_kv() == 1
    for same in (
        {"n_threads": 2},
        {"flash_attn": True, "n_batch": 1},
        {"use_mmap": False},
        {"isolate": True},
    ):
        assert n_image_kv(**same) == 1
        assert watched.filled == 0
    assert n_image_kv(type_k="f32") == 2
    assert n_image_kv(type_k="f32", type_v="f32") == 3
    whole = text.read_bytes()
    for n, name in enumerate(("k_proj.weight", "v_proj.weight", "k_norm.weight"), 4):
        data = bytearray(whole)
        tensor = places[f"blk.3.cross_attn_{name}"]
        data[read_gguf(text).data_offsets[0] + tensor.offset + 2] ^= 1
        text.write_bytes(data)
        assert n_image_kv() == n
        assert watched.filled == 1
    data = bytearray(whole)  # what does not take part does not count
    data[read_gguf(text).data_offsets[0] + places["blk.1.ffn_up.weight"].offset + 2] ^= 1
    text.write_bytes(data)
    assert n_image_kv() == 6
    assert watched.filled == 0


def test_every_part_of_a_split_model_is_looked_at(folder: Path, tmp_path: Path) -> None:
    import layouts

    text, _ = layouts.write(tiny.ARCHS["gqa"], tmp_path, "canonical", split=1)
    tensor = next(t for t in read_gguf(text).tensors if t.name == "blk.3.cross_attn_k_proj.weight")
    assert tensor.part > 0
    parts = read_gguf(text).paths
    names = [tensor.name]
    for part in parts:
        os.utime(part, (1e9, 1e9))
    first, stamps = weights_sha256(read_gguf(text), names), file_stamps(text)
    assert len(stamps) == len(parts)
    assert weights_sha256(read_gguf(text), names) == first
    assert file_stamps(text) == stamps
    data = bytearray(parts[tensor.part].read_bytes())
    data[read_gguf(text).data_offsets[tensor.part] + tensor.offset] ^= 1
    parts[tensor.part].write_bytes(data)
    assert weights_sha256(read_gguf(text), names) != first
    assert file_stamps(text) != stamps


# ---- room --------------------------------------------------------------------------------------------------


def test_image_kv_has_half_of_the_room(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, 100_000)
    rng = np.random.default_rng(0)

    def add(number: int, n_bytes: int = 9_000) -> None:
        cache.add_kv(f"{number:064x}", n_bytes, iter([rng.integers(0, 256, n_bytes, np.uint8)]))

    def add_states() -> None:
        cache.add_states(rng.bytes(32).hex(), rng.random((1, 10, 200), np.float32), 1)

    for _ in range(5):
        add_states()
    assert cache.info().n_states == 5
    for number in range(20):
        add(number)
        assert cache.info().n_bytes <= cache.max_bytes
    assert (cache.info().n_states, cache.info().n_image_kv) == (5, 5)
    add(99, 60_000)
    assert not cache.has_kv(f"{99:064x}")
    for _ in range(20):
        add_states()
    info = cache.info()
    assert info.n_bytes <= cache.max_bytes
    assert info.n_states > 10


def test_a_full_disk_is_one_warning(
    folder: Path, tiny_files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", str(folder))

    with Mllama(tiny_files("gqa").one, image_cache=False) as model:
        expected = [model.caption(noisy_image(seed), max_tokens=9) for seed in (1, 2)]
    monkeypatch.setattr("mllama_gguf.files.os.replace", fails)
    with Mllama(tiny_files("gqa").one) as model:
        assert [model.caption(noisy_image(seed), max_tokens=9) for seed in (1, 2)] == expected
    records = [r.getMessage() for r in caplog.records if r.name == "mllama_gguf.cache.disk"]
    assert records == [f"{folder}: the image cache cannot be used: No space left on device"]
    assert not list(folder.iterdir())


# ---- the C functions ---------------------------------------------------------------------------------------


@pytest.fixture
def context(tiny_files: Files) -> Iterator[LocalContext]:
    callbacks = Callbacks(load())
    model = LocalModel(tiny_files("gqa").one, None, callbacks)
    context = model.open_context(callbacks, n_ctx=64)
    yield context
    context.close()
    model.close()


def test_bytes_of_a_slot(context: LocalContext) -> None:
    h = context.hparams
    rng = np.random.default_rng(1)
    states = [rng.random((n, h.n_positions, h.n_embd), np.float32) for n in (2, 1, 3)]
    slot = context.image_fill(states)
    sizes = [context.image_size(slot, i) for i in range(3)]
    row = h.head_dim * h.n_head_kv * (2 + 2)  # F16
    assert sizes == [n * h.n_positions * row * h.n_cross_layers for n in (2, 1, 3)]
    images = [context.image_get(slot, i, 0, size) for i, size in enumerate(sizes)]
    for start, n in ((0, 1), (5, 1000), (sizes[0] - 7, 7), (sizes[0], 0), (1234, sizes[0] - 1234)):
        assert np.array_equal(context.image_get(slot, 0, start, n), images[0][start : start + n])

    copy = context.image_fill([3, states[0], 1])
    for start in range(0, sizes[2], 999):
        context.image_set(copy, 0, start, images[2][start : start + 999])
    context.image_set(copy, 2, 0, images[1])
    for image, original in enumerate((2, 0, 1)):
        assert np.array_equal(context.image_get(copy, image, 0, sizes[original]), images[original])
    logits = []
    for filled in (copy, context.image_fill([states[i] for i in (2, 0, 1)])):
        context.truncate(0)
        logits.append(context.decode([1, 2], filled, 3, "all"))
    assert np.array_equal(*logits)


@pytest.mark.parametrize(
    ("slot", "image", "offset", "n_bytes"),
    [
        *((-1, 0, 0, 1), (1, 0, 0, 1), (0, -1, 0, 1), (0, 1, 0, 1)),
        *((0, 0, 1, "size"), (0, 0, "size", 1), (0, 0, 2**63, 1), (0, 0, 1, 2**64 - 1)),
    ],
)
def test_bytes_that_are_none(
    context: LocalContext, slot: int, image: int, offset: int | str, n_bytes: int | str
) -> None:
    h = context.hparams
    assert context.image_fill([np.zeros((1, h.n_positions, h.n_embd), np.float32)]) == 0
    size = context.image_size(0, 0)
    lib, ffi = context.native.lib, context.native.ffi
    buffer = ffi.new("char[]", size)
    at, n = (size if value == "size" else value for value in (offset, n_bytes))
    for copy in (lib.mllama_image_get, lib.mllama_image_set):
        with pytest.raises(RequestError), context.handle as pointer:
            context.native.check(copy(pointer, slot, image, at, n, buffer))
        with pytest.raises(RequestError), context.handle as pointer:
            context.native.check(copy(pointer, 0, 0, 0, 1, ffi.NULL))
    context.image_free(0)
    with pytest.raises(RequestError, match="no image 0 in slot 0"):
        context.image_size(0, 0)
