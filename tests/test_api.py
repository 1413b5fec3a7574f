"""`Mllama` as its users see it, on random models."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from helpers import TinyFiles, elsewhere, noisy_image
from PIL import Image

from mllama_gguf import (
    Aborted,
    BackendError,
    BusyError,
    ContextFullError,
    ImageEmbedding,
    ImageError,
    Mllama,
    MllamaError,
    ModelError,
    RequestError,
    preprocess_image,
)
from mllama_gguf.cpus import default_threads

Files = Callable[[str], TinyFiles]

# A reply that goes on and on: random models end theirs when they please.
ENDLESS = "root ::= [ a-z] root"


@pytest.fixture
def model(tiny_files: Files) -> Iterator[Mllama]:
    files = tiny_files("gqa")
    with Mllama(files.text, files.mmproj, n_ctx=512) as opened:
        yield opened


def ask(*content: Any) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content
    ]
    return [{"role": "user", "content": parts}]


def png(array: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


# ---- opening -----------------------------------------------------------------------------------------------


def test_facts(model: Mllama, tiny_files: Files) -> None:
    arch = tiny_files("gqa").arch
    assert model.n_ctx == 512
    assert model.vocab_size == arch.vocab_size
    assert model.image_token_id == arch.image_token
    assert model.metadata["mllama.block_count"] == arch.layers
    h = model.hparams
    assert (h.n_layer, h.n_embd, h.n_head, h.n_head_kv) == (
        arch.layers,
        arch.width,
        arch.heads,
        arch.kv_heads,
    )
    assert h.cross_layers == arch.cross_layers
    assert h.has_vision
    assert (h.image_size, h.patch_size, h.n_positions) == (arch.image_size, arch.patch_size, arch.n_positions)
    assert model.stop_ids == {arch.special(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}
    assert model.memory().self_kv > 0


def test_one_file_and_two_files_are_the_same(model: Mllama, tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one, n_ctx=512) as one:
        assert one.caption(noisy_image(1), max_tokens=20) == model.caption(noisy_image(1), max_tokens=20)


def test_a_small_model_gets_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllama_gguf.cpus.usable_cpus", lambda: 16)
    assert [default_threads(n) for n in (10**6, 10**8, 8 * 10**9)] == [1, 3, 16]


def test_threads_do_not_change_the_caption(model: Mllama, tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one, n_ctx=512, n_threads=2) as two:
        assert two.caption(noisy_image(1), max_tokens=5) == model.caption(noisy_image(1), max_tokens=5)


def test_n_ctx_is_at_most_what_the_model_was_trained_with(tiny_files: Files) -> None:
    for n_ctx in (None, 0, 4096):
        with Mllama(tiny_files("twotiles").one, n_ctx=n_ctx) as model:
            assert model.n_ctx == tiny_files("twotiles").arch.max_positions == 2048


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": -1},
        {"n_ctx": 1.5},
        {"n_batch": 0},
        {"n_threads": -2},
        {"n_gpu_layers": -2},
        {"type_k": "q4_0"},
        {"vision_device": "nowhere"},
        {"devices": ["nowhere"]},
        {"chat_template": "{% for %}"},
    ],
)
def test_options_out_of_range(tiny_files: Files, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as raised:
        Mllama(tiny_files("gqa").one, **options)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_opened(tiny_files: Files, tmp_path: Path) -> None:
    files = tiny_files("gqa")
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"not a model")
    short = tmp_path / "short.gguf"
    short.write_bytes(files.one.read_bytes()[:-1000])
    for paths in ((tmp_path / "none.gguf",), (garbage,), (short,), (files.mmproj,), (files.text, garbage)):
        with pytest.raises(ModelError) as raised:
            Mllama(*paths)
        assert "\n" not in str(raised.value)


def test_from_pretrained_knows_its_names() -> None:
    with pytest.raises(ModelError, match="demo"):
        Mllama.from_pretrained("gpt-4")


def test_closing(tiny_files: Files) -> None:
    model = Mllama(tiny_files("gqa").one)
    stream = model.caption(noisy_image(1), stream=True)
    next(iter(stream), None)
    model.close()
    model.close()
    assert "closed" in repr(model)
    for use in (
        lambda: model.caption(noisy_image(1)),
        lambda: model.tokenize("x"),
        lambda: model.logits([1]),
        lambda: list(stream),
        model.reset,
    ):
        with pytest.raises(MllamaError, match="closed"):
            use()


# ---- replies -----------------------------------------------------------------------------------------------


def test_a_caption_is_the_same_however_the_image_comes(model: Mllama, tmp_path: Path) -> None:
    array = noisy_image(1, 50, 30)
    data = png(array)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    h = model.hparams
    tiled = preprocess_image(array, tile_size=h.image_size, max_tiles=h.max_tiles)
    expected = model.caption(array, max_tokens=15)
    assert expected
    for same in (
        data,
        path,
        str(path),
        io.BytesIO(data),
        Image.fromarray(array),
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        tiled,
        model.encode_image(array),
    ):
        model.reset()
        assert model.caption(same, max_tokens=15) == expected
    assert model.caption(noisy_image(2, 50, 30), max_tokens=15) != expected


def test_a_stream_is_the_caption_in_pieces(model: Mllama) -> None:
    pieces = list(model.caption(noisy_image(1), max_tokens=30, grammar=ENDLESS, stream=True))
    assert len(pieces) > 3
    assert "".join(pieces) == model.caption(noisy_image(1), max_tokens=30, grammar=ENDLESS)


def test_chat_completion(model: Mllama) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "grammar": ENDLESS}
    reply = model.create_chat_completion(ask(noisy_image(1), "What is it?"), **options)
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == "gqa"
    assert abs(reply["created"] - time.time()) < 100
    (choice,) = reply["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = reply["usage"]
    assert usage["completion_tokens"] == 10
    assert usage["total_tokens"] == usage["prompt_tokens"] + 10
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert set(reply["timings"]["seconds"]) == {"encode", "prompt", "decode"}
    json.dumps(reply)

    chunks = list(model.create_chat_completion(ask(noisy_image(1), "What is it?"), stream=True, **options))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(d["content"] for d in deltas[1:-1]) == choice["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["usage"]["completion_tokens"] == 10


def test_the_ends_of_a_reply(model: Mllama) -> None:
    def end(**options: Any) -> tuple[str, str]:
        (choice,) = model.create_chat_completion(ask(noisy_image(1), "?"), **options)["choices"]
        return choice["finish_reason"], choice["message"]["content"]

    assert end(grammar='root ::= "red"') == ("stop", "red")
    assert end(max_tokens=2, grammar='root ::= "red" "blue"')[0] == "length"
    assert end(stop="d", grammar='root ::= "read"') == ("stop", "rea")
    assert end(stop=["x", "ea"], grammar='root ::= "read"') == ("stop", "r")
    assert end(stop="xyz", grammar='root ::= "readxy"') == ("stop", "readxy")
    # Without a limit until the context is full; the last token needs no place in it.
    reply = model.create_chat_completion(ask("?"), grammar=ENDLESS, max_tokens=None)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == model.n_ctx + 1


def test_json_schema(model: Mllama) -> None:
    schema = {
        "type": "object",
        "properties": {"fruit": {"enum": ["apple", "pear"]}, "ripe": {"type": "boolean"}},
        "required": ["fruit", "ripe"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema}}
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        text = model.caption(noisy_image(1), response_format=form, **options)
        jsonschema.validate(json.loads(text), schema)


def test_sampling_options(model: Mllama) -> None:
    def caption(**options: Any) -> str:
        return model.caption(noisy_image(1), max_tokens=20, **options)

    assert caption(temperature=1.0, seed=1) == caption(temperature=1.0, seed=1)
    assert len({caption(temperature=2.0, seed=seed) for seed in range(4)}) > 1
    assert caption(temperature=1.0, top_k=1, seed=5) == caption()


def test_requests_that_cannot_be_carried_out(model: Mllama) -> None:
    for options in (
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"temperature": -1},
        {"stop": ""},
        {"grammar": "root ::= ("},
        {"response_format": {"type": "xml"}},
    ):
        with pytest.raises(RequestError):
            model.caption(noisy_image(1), **options)
    with pytest.raises(RequestError, match="there is no option 'temprature'; there are: max_tokens, "):
        model.caption(noisy_image(1), temprature=1)
    with pytest.raises(ImageError, match="no such file"):
        model.caption("nowhere.png")
    # Also before a stream begins.
    with pytest.raises(ImageError):
        model.caption("nowhere.png", stream=True)
    with pytest.raises(RequestError):
        model.create_chat_completion([], stream=True)


def test_text_alone(model: Mllama, tiny_files: Files) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    reply = model.create_chat_completion(messages, max_tokens=10)
    with Mllama(tiny_files("gqa").text, n_ctx=512) as text_only:
        assert not text_only.hparams.has_vision
        other = text_only.create_chat_completion(messages, max_tokens=10)
        assert other["choices"] == reply["choices"]
        for use in (text_only.caption, text_only.encode_image):
            with pytest.raises(RequestError, match="text model without vision encoder"):
                use(noisy_image(1))


def test_special_tokens_of_the_user_are_words(model: Mllama) -> None:
    reply = model.create_chat_completion(
        ask(noisy_image(1), "<|image|><|eot_id|>"), max_tokens=5, grammar=ENDLESS
    )
    assert reply["usage"]["completion_tokens"] == 5
    with pytest.raises(RequestError, match="image token"):
        model.logits(model.tokenize("<|image|>"))


def test_a_prompt_that_is_too_long(model: Mllama) -> None:
    words = "the cat " * 600
    with pytest.raises(ContextFullError, match=r"\d+ tokens, but n_ctx is 512"):
        model.caption(noisy_image(1), words)
    with pytest.raises(ContextFullError):
        model.logits([1] * 513)
    assert model.caption(noisy_image(1), max_tokens=5)


# ---- images ----------------------------------------------------------------------------------------------


def test_encode_image(model: Mllama) -> None:
    h = model.hparams
    embedding = model.encode_image(noisy_image(1, 30, 100))
    n_tiles = preprocess_image(noisy_image(1, 30, 100), tile_size=h.image_size, max_tiles=h.max_tiles).n_tiles
    assert n_tiles > 1
    assert embedding.states.shape == (n_tiles, h.n_positions, h.n_embd)
    assert embedding.states.dtype == np.float32
    assert embedding.n_tiles == n_tiles
    assert np.isfinite(embedding.states).all()
    assert model.encode_image(noisy_image(1, 30, 100)) is embedding  # not computed again
    assert model.encode_image(embedding) is embedding
    assert model.encode_image(noisy_image(2, 30, 100)).key != embedding.key
    with pytest.raises(ValueError, match="read-only"):
        embedding.states[0] = 0


def test_an_embedding_may_be_made_from_saved_states(model: Mllama) -> None:
    embedding = model.encode_image(noisy_image(1))
    again = ImageEmbedding(embedding.states.copy(), embedding.aspect_ratio_id)
    assert model.caption(again, max_tokens=10) == model.caption(noisy_image(1), max_tokens=10)
    assert again.key == ImageEmbedding(embedding.states.copy(), 1).key
    for wrong in (np.zeros((2, 3), np.float32), np.zeros((1, 2, 3)), np.zeros((0, 2, 3), np.float32)):
        with pytest.raises(ImageError, match="expected float32"):
            ImageEmbedding(wrong, 1)


def test_what_belongs_to_another_model_is_refused(model: Mllama, tiny_files: Files) -> None:
    with Mllama(tiny_files("square").one) as other:
        embedding = other.encode_image(noisy_image(1))
    with pytest.raises(ImageError, match="another model"):
        model.caption(embedding)
    with pytest.raises(ImageError, match="this model takes"):
        model.caption(preprocess_image(noisy_image(1)))


# ---- logits ------------------------------------------------------------------------------------------------


def test_logits(model: Mllama) -> None:
    tokens = [*model.tokenize("<|image|>the cat <|image|>and the dog")]
    images = [noisy_image(1), noisy_image(2)]
    rows = model.logits(tokens, images)
    assert rows.shape == (len(tokens), model.vocab_size)
    assert rows.dtype == np.float32
    assert np.isfinite(rows).all()
    # From a fresh state: what was before does not count.
    model.caption(noisy_image(3), max_tokens=5)
    assert np.array_equal(model.logits(tokens, images), rows)
    assert not np.allclose(model.logits(tokens, images[::-1])[3:], rows[3:], atol=1e-3)


def test_logits_of_a_wrong_prompt(model: Mllama) -> None:
    for tokens, images in (
        ([], []),
        ([-1], []),
        ([model.hparams.n_token_embd], []),
        ([model.image_token_id], []),
        ([1], [noisy_image(1)]),
    ):
        with pytest.raises(RequestError):
            model.logits(tokens, images)


# ---- reuse -------------------------------------------------------------------------------------------------


def test_a_conversation_is_not_computed_again(model: Mllama, tiny_files: Files) -> None:
    """And its replies are those of a model that has no caches yet."""
    messages = ask(noisy_image(1), noisy_image(2), "the cat and the dog")
    cached, prompt_tokens = [], []
    for question in ("what is it?", "what is on the left?"):
        reply = model.create_chat_completion(messages, max_tokens=12, grammar=ENDLESS)
        with Mllama(tiny_files("gqa").one, n_ctx=512) as fresh:
            expected = fresh.create_chat_completion(messages, max_tokens=12, grammar=ENDLESS)
        assert reply["choices"] == expected["choices"]
        assert reply["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
        prompt_tokens.append(expected["usage"]["prompt_tokens"])
        messages = [*messages, reply["choices"][0]["message"], {"role": "user", "content": question}]
    assert cached[0] == 0
    assert (
        cached[1] >= prompt_tokens[0] - 1
    )  # whether the reply too depends on how its text is cut into tokens


def test_a_second_question_about_an_image_encodes_nothing(tiny_files: Files) -> None:
    seen: list[str] = []
    with Mllama(tiny_files("gqa").one, progress=lambda phase, done, total: seen.append(phase)) as model:
        first = model.create_chat_completion(ask(noisy_image(1), "what is it?"), max_tokens=3)
        assert {"load", "encode", "prompt"} <= set(seen)
        seen.clear()
        second = model.create_chat_completion(ask(noisy_image(1), "and what else?"), max_tokens=3)
        assert "encode" not in seen
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 5
        model.reset()
        third = model.create_chat_completion(ask(noisy_image(1), "and what else?"), max_tokens=3)
        assert third["choices"] == second["choices"]
        assert third["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_progress_of_a_prompt_counts_all_its_tokens(tiny_files: Files) -> None:
    seen: list[tuple[str, int, int]] = []
    with Mllama(tiny_files("gqa").one, progress=lambda *a: seen.append(a), n_batch=4) as model:
        reply = model.create_chat_completion(ask("the cat", noisy_image(1), "the dog"), max_tokens=3)
    n = reply["usage"]["prompt_tokens"]
    prompt = [(done, total) for phase, done, total in seen if phase == "prompt"]
    assert {total for _, total in prompt} == {n}
    assert [done for done, _ in prompt] == sorted(done for done, _ in prompt)
    assert prompt[-1] == (n, n)
    assert all(0 <= done <= total for _, done, total in seen)


# ---- stopping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["encode", "prompt"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_in_a_callback_comes_out_and_the_model_lives(
    tiny_files: Files, phase: str, error: type[BaseException]
) -> None:
    armed = False

    def progress(now: str, done: int, total: int) -> None:
        if armed and now == phase:
            raise error("stop")

    with Mllama(tiny_files("gqa").one, progress=progress, n_batch=4) as model:
        expected = model.caption(noisy_image(1), max_tokens=10)
        model.caption(noisy_image(2), max_tokens=10)
        model._shared.images.clear()
        armed = True
        with pytest.raises(error):
            model.caption(noisy_image(1), max_tokens=10)
        armed = False
        assert model.caption(noisy_image(1), max_tokens=10) == expected


def test_an_exception_while_loading(tiny_files: Files) -> None:
    def progress(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Mllama(tiny_files("gqa").one, progress=progress)
    with pytest.raises(Aborted):
        Mllama(tiny_files("gqa").one, abort=lambda: True, use_mmap=False)


def test_abort(tiny_files: Files) -> None:
    stop = False
    long_prompt = "\x01\x02" * 3000  # a token a byte
    with Mllama(tiny_files("gqa").one, n_ctx=8192, abort=lambda: stop) as model:
        expected = model.caption(noisy_image(1), max_tokens=10)
        stop = True
        with pytest.raises(Aborted):
            model.caption(noisy_image(1), long_prompt)
        stop = False
        assert model.caption(noisy_image(1), max_tokens=10) == expected


# ---- threads -----------------------------------------------------------------------------------------------


def test_two_objects_in_two_threads(tiny_files: Files) -> None:
    expected = {}
    for name in ("gqa", "square"):
        with Mllama(tiny_files(name).one, n_ctx=512) as model:
            expected[name] = [model.caption(noisy_image(i), max_tokens=25) for i in range(4)]
    found: dict[str, list[str]] = {}

    def work(name: str) -> None:
        with Mllama(tiny_files(name).one, n_ctx=512) as model:
            found[name] = [model.caption(noisy_image(i), max_tokens=25) for i in range(4)]

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_one_object_in_two_threads_is_an_error(tiny_files: Files) -> None:
    inside, leave = threading.Event(), threading.Event()

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "encode":
            inside.set()
            leave.wait(20)

    with Mllama(tiny_files("gqa").one, progress=progress) as model:
        result: list[str] = []
        thread = threading.Thread(target=lambda: result.append(model.caption(noisy_image(1), max_tokens=5)))
        thread.start()
        try:
            assert inside.wait(20)
            for use in (
                lambda: model.caption(noisy_image(1)),
                lambda: model.encode_image(noisy_image(2)),
                lambda: model.logits([1]),
                model.reset,
                model.close,
            ):
                with pytest.raises(BusyError):
                    use()
            assert model.tokenize("the cat")  # needs no caches
        finally:
            leave.set()
            thread.join()
        assert result == [model.caption(noisy_image(1), max_tokens=5)]


def test_a_stream_whose_caches_went_to_another_request(model: Mllama) -> None:
    expected = model.caption(noisy_image(1), max_tokens=20, grammar=ENDLESS)
    stream = iter(model.caption(noisy_image(1), max_tokens=20, grammar=ENDLESS, stream=True))
    next(stream)
    model.tokenize("the cat")
    model.encode_image(noisy_image(2))  # leaves the conversation alone
    next(stream)
    model.caption(noisy_image(2), max_tokens=3)
    with pytest.raises(MllamaError, match="used for something else"):
        list(stream)
    assert model.caption(noisy_image(1), max_tokens=20, grammar=ENDLESS) == expected


def test_a_stream_may_be_left(model: Mllama) -> None:
    expected = model.caption(noisy_image(1), max_tokens=20)
    for _ in model.caption(noisy_image(1), max_tokens=20, stream=True):
        break
    assert model.caption(noisy_image(1), max_tokens=20) == expected


# ---- the package -------------------------------------------------------------------------------------------


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], **elsewhere(**env), capture_output=True, text=True, timeout=60
    )


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, time; start = time.process_time(); import mllama_gguf; "
        "print(time.process_time() - start, [m for m in ('numpy', 'PIL', 'llama_cpp') if m in sys.modules])"
    )
    seconds, modules = min(python(code).stdout.split(maxsplit=1) for _ in range(3))
    assert float(seconds) < 0.3
    assert modules.strip() == "[]"


def test_one_copy_of_ggml(tiny_files: Files) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    with Mllama(tiny_files("gqa").one):
        paths = {line.split()[-1] for line in maps.read_text().splitlines() if "libggml-base" in line}
    assert len(paths) == 1
    assert Path(paths.pop()).parent.parts[-2:] == ("llama_cpp", "lib")


def test_a_missing_library_is_one_line() -> None:
    code = (
        "from mllama_gguf import Mllama, BackendError\ntry: Mllama('x')\nexcept BackendError as e: print(e)"
    )
    done = python(code, MLLAMA_LIBRARY="/nowhere/libmllama.so")
    assert done.stdout == "MLLAMA_LIBRARY: /nowhere/libmllama.so: no such file\n"
    assert done.stderr == ""


def test_nothing_is_printed(tiny_files: Files) -> None:
    """Neither by llama.cpp nor by ggml."""
    path = str(tiny_files("gqa").one)
    done = python(
        f"from mllama_gguf import Mllama\nMllama({path!r}).create_chat_completion("
        "[{'role': 'user', 'content': 'x'}], max_tokens=2)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_errors_have_one_base() -> None:
    for error in (Aborted, BackendError, BusyError, ContextFullError, ImageError, ModelError, RequestError):
        assert issubclass(error, MllamaError)
