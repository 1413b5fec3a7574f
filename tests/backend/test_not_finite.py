"""Models whose results are NaN or infinite: one ModelError, nothing is sampled or kept, and the object goes
on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
from damage import INF, NAN, damaged
from golden_cases import case, tiled
from helpers import TinyFiles, noisy_image
from PIL import Image

from mllama_gguf import ImageEmbedding, Mllama, ModelError, RequestError
from mllama_gguf.backend.base import Item
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.context import LocalContext
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import open_model
from mllama_gguf.cli.main import run
from mllama_gguf.convert.quantize import quantize
from mllama_gguf.vision.preprocess import preprocess_image

Files = Callable[[str], TinyFiles]
ARCH = tiny.ARCHS["gqa"]  # cross-attention layers are 0 and 3
ENCODING, FILLING = "encoding the image", "filling the cross-attention cache"

# A tensor, a number (None: noise), its row (None: all), the phase that finds it, the first tensor of a trace
CASES: dict[str, tuple[str, float | None, int | None, str, str]] = {
    "norm": ("blk.1.attn_norm.weight", NAN, 0, "the prompt", "blk.1.attn_norm"),
    "norm of an image layer": ("blk.3.attn_norm.weight", INF, 0, "the prompt", "blk.3.attn_norm"),
    "attention": ("blk.1.attn_v.weight", -INF, 0, "the prompt", "blk.1.v"),
    "feed-forward": ("blk.4.ffn_down.weight", NAN, 7, "the prompt", "blk.4.ffn_out"),
    "norm of the output": ("output_norm.weight", NAN, 0, "the prompt", "text.output_norm"),
    "one logit": ("output.weight", NAN, 5, "the prompt", "text.logits"),
    "one infinite logit": ("output.weight", INF, 5, "the prompt", "text.logits"),
    "all logits": ("output.weight", -INF, None, "the prompt", "text.logits"),
    "noise": ("blk.2.ffn_up.weight", None, 0, "the prompt", "blk.2.ffn_out"),
    "encoder": ("v.blk.2.attn_q.weight", NAN, 0, ENCODING, "v.blk.2.attn_out"),
    "encoder, global": ("v.global.blk.0.ffn_down.bias", INF, 0, ENCODING, "v.global.blk.0.ffn_out"),
    "projector": ("mm.0.weight", INF, 3, ENCODING, "v.cross_attention_states"),
    "projector, noise": ("mm.0.weight", None, 0, ENCODING, "v.cross_attention_states"),
    "keys": ("blk.3.cross_attn_k_norm.weight", NAN, 0, FILLING, "blk.3.cross_k"),
    "values": ("blk.0.cross_attn_v_proj.weight", INF, 3, FILLING, "blk.0.cross_v"),
    "values beyond F16": (
        "blk.0.cross_attn_v_proj.weight",
        1e30,
        3,
        FILLING,
        "cross_cache_v.0 (view) (copy of",
    ),
}


Make = Callable[[str], tuple[Path, str, str]]


@pytest.fixture
def broken(tiny_files: Files, tmp_path: Path) -> Make:
    """Makes a damaged model; the phase that finds it, and the first tensor of a trace."""

    def make(name: str) -> tuple[Path, str, str]:
        tensor, value, row, phase, first = CASES[name]
        path = damaged(tiny_files("gqa").one, tmp_path / "broken.gguf", tensor, value, row=row)
        return path, phase, first

    return make


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.fromarray(noisy_image(1)).save(path)
    return str(path)


def results(folder: Path) -> set[str]:
    """The kinds of results in the image cache."""
    return {path.suffix for path in folder.glob("*")} - {".TAG", ".weights"}


ISOLATED = ("norm", "projector", "keys")


@pytest.mark.parametrize(
    ("name", "isolate"), [*((name, False) for name in CASES), *((name, True) for name in ISOLATED)]
)
def test_one_error(broken: Make, name: str, folder: Path, isolate: bool) -> None:
    path, phase, _ = broken(name)
    with Mllama(path, n_ctx=256, isolate=isolate) as model:
        for _ in range(2):
            with pytest.raises(ModelError) as caught:
                model.caption(noisy_image(1), max_tokens=3)
            assert str(caught.value).startswith(f"{path}: the results of {phase} are not finite")
            assert "mllama verify" in str(caught.value) and "\n" not in str(caught.value)
            session = model._conversation.session
            assert (len(session.slots), session.n_past, session._context.n_past) == (0, 0, 0)
        if phase != "the prompt":  # of text alone nothing is wrong
            assert len(model._conversation.session.feed([1, 2, 3])[0]) == 1
    # What the encoder found is right, unless it is the one.
    assert results(folder) == (set() if phase == ENCODING else {".states"})


@pytest.mark.parametrize("name", ["noise", "encoder", "values"])
def test_a_batch_writes_no_caption(
    broken: Make, name: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, phase, _ = broken(name)
    out = tmp_path / "captions.jsonl"
    assert run(["caption", photo, "--out", str(out), "-m", str(path), "-c", "256"]) == 3
    assert not out.exists() or not out.read_text()
    assert phase in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "pattern"), [*((name, "no*thing") for name in CASES), ("norm", "*"), ("encoder", "text.*")]
)
def test_trace(broken: Make, name: str, pattern: str, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, first = broken(name)
    assert run(["trace", photo, "-m", str(path), "-c", "256", "--tensors", pattern]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"the first tensor that is not finite: {first}" in error


def test_trace_in_json(broken: Make, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is shown before the error is JSON, though JSON does not know such numbers."""
    path, *_ = broken("norm")
    assert run(["trace", photo, "-m", str(path), "-c", "256", "--json", "--tensors", "blk.1.*"]) == 1

    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("tensor", ["blk.3.cross_attn_attn_gate", "v.global.blk.0.ffn_gate"])
def test_a_gate_is_read_when_the_model_is_opened(tensor: str, tiny_files: Files, tmp_path: Path) -> None:
    path = damaged(tiny_files("gqa").one, tmp_path / "broken.gguf", tensor, NAN)
    with pytest.raises(ModelError, match=f"gate '{tensor}' is not a finite number"):
        Mllama(path)


# ---- one token ---------------------------------------------------------------------------------------------

BAD = 17  # the token whose row of the embedding is damaged
GOOD = tuple(token for token in case(ARCH, "text_only").tokens if token != BAD)


@contextmanager
def opened(path: Path, *, isolate: bool = False, n_batch: int = 512) -> Iterator[Mllama]:
    with Mllama(path, n_ctx=256, isolate=isolate, n_batch=n_batch) as model:
        yield model


@pytest.fixture
def bad_token(tiny_files: Files, tmp_path: Path) -> Path:
    return damaged(tiny_files("gqa").one, tmp_path / "token.gguf", "token_embd.weight", NAN, row=BAD)


@pytest.mark.parametrize(
    ("at", "n_batch", "isolate"),
    [(0, 512, False), (5, 512, False), (22, 512, False), (0, 7, False), (5, 7, False), (5, 7, True)],
)
def test_only_prompts_with_that_token_fail(
    tiny_files: Files, bad_token: Path, at: int, n_batch: int, isolate: bool
) -> None:
    """What a failure leaves in the caches, masked or not, must not reach a prompt that is right."""
    with opened(tiny_files("gqa").one, n_batch=n_batch) as model:
        expected = model.logits(GOOD)
        model.reset()
        last, _ = model._conversation.session.feed(GOOD)
    with opened(bad_token, isolate=isolate, n_batch=n_batch) as model:
        session = model._conversation.session
        wrong = [*GOOD[:at], BAD, *GOOD[at + 1 :]]
        for prompt in (wrong, wrong[: at + 1]):
            with pytest.raises(ModelError, match=r"results of (the prompt|a token) are not finite"):
                session.feed(prompt)
            assert np.array_equal(session.feed(GOOD)[0], last)
        with pytest.raises(ModelError):
            model.logits(wrong)
        assert np.array_equal(model.logits(GOOD), expected)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_token_of_the_reply(tiny_files: Files, folder: Path, tmp_path: Path, isolate: bool) -> None:
    """The prompt is right, the reply's first token is not: its piece is shown, and then comes the error."""
    prompt = case(ARCH, "text_before_image")
    with opened(tiny_files("gqa").one) as model:
        images = [model._conversation.encode(tiled(ARCH, image)) for image in prompt.images]
        logits, _ = model._conversation.session.feed(prompt.tokens, images)
        model.reset()
    token = next(int(t) for t in np.argsort(-logits[0]) if t not in prompt.tokens)
    path = damaged(tiny_files("gqa").one, tmp_path / "m.gguf", "token_embd.weight", INF, row=token)
    for entry in folder.glob("*.*"):
        entry.unlink()
    with opened(path, isolate=isolate) as model:
        session = model._conversation.session
        images = [model._conversation.encode(tiled(ARCH, image)) for image in prompt.images]
        session.feed(prompt.tokens, images)
        with pytest.raises(ModelError, match="results of a token are not finite"):
            session.step(token)
        assert (session.n_past, len(session.slots)) == (0, 0)
        assert np.array_equal(session.feed(prompt.tokens, images)[0], logits)


def test_a_prompt_in_pieces(bad_token: Path, folder: Path) -> None:
    """The damage is in text before an image, whose logits nobody asks for; that text is not kept on disk."""
    prompt = case(ARCH, "text_before_image")
    with opened(bad_token) as model:
        images = [model._conversation.encode(tiled(ARCH, image)) for image in prompt.images]
        tokens = [prompt.tokens[0], BAD, *prompt.tokens[2:]]
        with pytest.raises(ModelError, match="results of the prompt"):
            model._conversation.session.feed(tokens, images)
    assert results(folder) == {".states"}


# ---- quantized weights -------------------------------------------------------------------------------------


# A product with quantized weights rounds its factors to 8 bits, which turns NaN into a number: results may
# be finite, and wrong.
HIDDEN = {
    "norm": ("blk.0.attn_norm.weight", NAN),
    "norm of the feed-forward part": ("blk.2.ffn_norm.weight", INF),
    "one product": ("blk.0.ffn_up.weight", None),
    "gate": ("blk.2.ffn_gate.weight", None),
    "values": ("blk.0.attn_v.weight", None),
    "queries": ("blk.2.attn_q.weight", None),
    "down": ("blk.0.ffn_down.weight", None),
    "embedding": ("token_embd.weight", None),
    "logits": ("output.weight", None),
}


@pytest.fixture(scope="module", params=["q4_k_m", "q8_0"])
def quantized(
    request: pytest.FixtureRequest, tiny_files: Files, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("quantized") / "whole.gguf"
    return quantize(tiny_files("quant").one, target, request.param).path


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("kernel", ["", "off"])
def test_quantized_weights(
    quantized: Path, tmp_path: Path, name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLLAMA_CPU_KERNEL", kernel)
    tensor, value = HIDDEN[name]
    path = damaged(quantized, tmp_path / "broken.gguf", tensor, value)
    with Mllama(path, n_ctx=256) as model:
        session = model._conversation.session
        with pytest.raises(ModelError, match="the results of the prompt are not finite"):
            session.feed(range(1, 60))
        assert session.n_past == 0


@pytest.mark.parametrize("tensor", ["blk.0.ffn_up.weight", "blk.1.cross_attn_q_norm.weight"])
@pytest.mark.parametrize("use_mmap", [False, True])
def test_the_weight_is_named_where_it_is_known(
    quantized: Path, tmp_path: Path, tensor: str, use_mmap: bool
) -> None:
    """Of copied weights and of vectors. Damage in a cross-attention layer is none to text alone."""
    is_vector = "norm" in tensor
    path = damaged(quantized, tmp_path / "broken.gguf", tensor, NAN if is_vector else None)
    with Mllama(path, n_ctx=256, use_mmap=use_mmap) as model:
        assert is_vector == ("cross" in tensor)
        if is_vector:
            model._conversation.session.feed([1, 2, 3])
        with pytest.raises(ModelError) as caught:
            model.caption(noisy_image(1), max_tokens=1)
        assert (f"as its tensor {tensor}" in str(caught.value)) == (is_vector or not use_mmap)


# ---- what the caller brings --------------------------------------------------------------------------------


def test_pixels_and_states_of_the_caller(tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one, n_ctx=256) as model:
        image = preprocess_image(noisy_image(1), tile_size=ARCH.image_size, max_tiles=4)
        image.pixels.flags.writeable = True
        image.pixels[0, 1, 2, 3] = NAN
        with pytest.raises(RequestError, match="the pixels are not finite"):
            model.encode_image(image)
        whole = model.encode_image(noisy_image(2))
        states = whole.states.copy()
        states[-1, -1, -1] = INF
        with pytest.raises(RequestError, match="the states of image 0 are not finite"):
            model.caption(ImageEmbedding(states, whole.aspect_ratio_id))
        assert len(model._conversation.session.slots) == 0
        model.caption(whole, max_tokens=2)


def test_a_damaged_file_of_the_image_cache_is_not_the_model(tiny_files: Files, folder: Path) -> None:
    """An image_kv in its file is used before its checksum is known: NaN there is the file's fault."""
    with Mllama(tiny_files("gqa").one, n_ctx=256) as model:
        expected = model.caption(noisy_image(1), max_tokens=9)
    (file,) = folder.glob("*.image_kv")
    data = bytearray(file.read_bytes())
    data[-400:] = b"\xff\x7f" * 200
    file.write_bytes(data)
    with Mllama(tiny_files("gqa").one, n_ctx=256) as model:
        assert model.caption(noisy_image(1), max_tokens=9) == expected


# ---- the C API ---------------------------------------------------------------------------------------------


@pytest.fixture
def context(bad_token: Path) -> Iterator[LocalContext]:
    callbacks = Callbacks(load())
    model = open_model(bad_token, None, callbacks=callbacks)
    context = model.open_context(callbacks, n_ctx=256, n_batch=16)
    yield context
    context.close()
    model.close()


@pytest.mark.parametrize("logits", ["none", "last", "all"])
def test_after_the_error_there_are_no_tokens(context: LocalContext, logits: str) -> None:
    context.decode([1, 2, 3], -1, 0, "none")
    with pytest.raises(ModelError):
        context.decode([4, BAD, 5], -1, 0, logits)  # type: ignore[arg-type]
    assert context.n_past == 0


def test_keys_that_are_not_finite_are_not_given_out(tiny_files: Files, tmp_path: Path) -> None:
    """A key of -inf hides its token, so that the logits may be finite; but nobody gets it."""
    path = damaged(tiny_files("gqa").one, tmp_path / "keys.gguf", "blk.4.attn_k.weight", 1e30, row=0)
    callbacks = Callbacks(load())
    model = open_model(path, None, callbacks=callbacks)
    context = model.open_context(callbacks, n_ctx=256)
    try:
        with pytest.raises(ModelError, match="not finite"):
            for token in range(40):  # the first error is that of decoding, if it is not finite itself
                context.decode([token], -1, 0, "none")
                context.prefix_kv_get(context.n_past)
        assert context.n_past == 0
    finally:
        context.close()
        model.close()


@pytest.mark.parametrize("type", ["f32", "q8_0"])
@pytest.mark.parametrize("kernel", ["", "off"])
def test_of_many_sequences_one_fails(tiny_files: Files, tmp_path: Path, type: str, kernel: str) -> None:
    """The others go on, with the numbers that they have alone."""
    whole = tiny_files("quant").one
    if type != "f32":
        whole = quantize(whole, tmp_path / "whole.gguf", type).path
    path = damaged(whole, tmp_path / "token.gguf", "token_embd.weight", NAN, row=BAD)
    callbacks = Callbacks(load())
    model = open_model(path, None, callbacks=callbacks)
    # a cache in F16 would round sums that differ in their last bit to different numbers
    context = model.open_context(callbacks, n_ctx=256, cpu_kernel=kernel, type_k="f32", type_v="f32")
    prompts = [[1, 2, 3, 4], [5, BAD, 7, 8], [9], [10, 11, 12]]
    try:
        alone = {}
        for i in (0, 2, 3):
            context.truncate(0)
            alone[i] = context.decode(prompts[i], -1, 0)
        numbers = [context.sequence_new(64) for _ in prompts]
        items = [Item(number, tokens, -1, 0) for number, tokens in zip(numbers, prompts, strict=True)]
        results = context.decode_many(items)
        assert isinstance(results[1], ModelError) and "the results of the prompt" in str(results[1])
        assert [context.sequence_n_past(number) for number in numbers] == [4, 0, 1, 3]
        for i, expected in alone.items():
            result = results[i]
            assert not isinstance(result, ModelError)
            assert np.linalg.norm(result - expected) < (1e-5 if type == "f32" else 2e-2) * np.linalg.norm(
                expected
            )
        again = context.decode_many([Item(numbers[1], [5, 6, 7, 8], -1, 0)])
        assert not isinstance(again[0], ModelError)
    finally:
        context.close()
        model.close()
