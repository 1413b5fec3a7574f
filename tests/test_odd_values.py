"""Values of odd types, and a model file that goes away: an error in words, or the right result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TinyFiles, noisy_image

from mllama_gguf import BackendError, ImageError, Mllama, MllamaError, RequestError, preprocess_image
from mllama_gguf.backend import library
from mllama_gguf.cli.main import run

Files = Callable[[str], TinyFiles]
APPLE = Path(__file__).parents[1] / "examples" / "apple.png"


@pytest.fixture(scope="module")
def model(tiny_files: Files) -> Iterator[Mllama]:
    with Mllama(tiny_files("gqa").one, n_ctx=256, n_threads=1, image_cache=False) as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flash_attn", "off"),
        ("flash_attn", 1),
        ("vision_device", 5),
        ("vision_device", ""),
        ("devices", "CPU"),
        ("devices", [5]),
        ("image_cache", ""),
        ("image_cache", b"x"),
        ("n_ctx", 1.5),
        ("n_threads", "4"),
        ("chat_template", 5),
        ("mmproj_path", 5),
        ("mmproj_path", ""),
        ("mmproj_path", "a\0b"),
        ("progress", 5),
        ("abort", True),
    ],
)
def test_settings(tiny_files: Files, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} must be") as raised:
        Mllama(tiny_files("gqa").one, **{name: value})
    assert "\n" not in str(raised.value)


VARIABLES = {
    "MLLAMA_CPU_KERNEL": ["caption", "APPLE"],
    "MLLAMA_MODEL": ["info"],
    "MLLAMA_LOCK": ["verify", "none"],
    "MLLAMA_DOWNLOADS": ["verify", "ollama:none"],
    "OLLAMA_MODELS": ["info", "ollama:none"],
    "MLLAMA_IMAGE_CACHE_SIZE": ["cache", "info"],
    "MLLAMA_MAX_PIXELS": ["preprocess", "APPLE"],
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_variables_with_line_ends(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The native library's words too are one line, and no terminal obeys them."""
    monkeypatch.setenv(variable, "one\ntwo\r\x1b[31m\u2028\x9b")
    args = [str(APPLE) if arg == "APPLE" else arg for arg in VARIABLES[variable]]
    assert run(args) in (1, 2)
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("Error: ") and not out
    assert err[:-1].isprintable()


@pytest.mark.parametrize("path", [5, None, "", b"x", ["a"], np.zeros(2), "a\0b"])
def test_paths(path: Any) -> None:
    with pytest.raises(RequestError, match="model_path must be the path of a file"):
        Mllama(path)
    if path is not None:  # the default model
        with pytest.raises(RequestError, match="name must be the path of a file"):
            Mllama.from_pretrained(path)


HUGE = 10**5000  # Python writes no more than 4,300 digits


@pytest.mark.parametrize("value", [HUGE, -HUGE], ids=["huge", "below"])
def test_numbers_that_python_does_not_write(tiny_files: Files, model: Mllama, value: int) -> None:
    for name in ("n_ctx", "n_batch", "n_threads", "n_gpu_layers", "main_gpu", "rpc_timeout"):
        with pytest.raises(RequestError, match=name):
            Mllama(tiny_files("gqa").one, **{name: value})
    for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "n"):
        with pytest.raises(RequestError, match=name):
            model.create_chat_completion([{"role": "user", "content": "x"}], **{name: value})
    with pytest.raises(RequestError, match="logit_bias"):
        model.create_chat_completion([{"role": "user", "content": "x"}], logit_bias={value: 1})
    for do in (model.detokenize, model.logits):
        with pytest.raises(RequestError, match="not in the vocabulary"):
            do([value])


@pytest.mark.parametrize(
    "name", ["\ud800", "a\udc80" + "\ud800", "y" * 30_000, "/" + "x" * 5000, "~nosuchuser/x"], ids=range(5)
)
def test_names_that_no_file_can_have(name: str, tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_files("gqa").one

    def check(do: Callable[[], object]) -> None:
        with pytest.raises(MllamaError) as raised:
            do()
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 1100

    check(lambda: Mllama(name))
    check(lambda: Mllama(file, name))
    check(lambda: Mllama.from_pretrained(name))
    check(lambda: Mllama(file, devices=[name]))
    if not name.startswith("~"):  # that is a folder's name too
        check(lambda: Mllama(file, image_cache=name))
    if "\ud800" not in name:  # which no variable can have
        monkeypatch.setenv("MLLAMA_MODEL", name)
        check(lambda: Mllama.from_pretrained())


@pytest.mark.parametrize("name", ["MLLAMA_IMAGE_CACHE", "MLLAMA_DOWNLOADS", "OLLAMA_MODELS", "MLLAMA_LOCK"])
def test_the_home_of_nobody(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "~nosuchuser/x")
    try:
        Mllama.from_pretrained("demo").close()
    except MllamaError as e:
        assert "nosuchuser" in str(e)


@pytest.mark.parametrize("variable", ["MLLAMA_MMPROJ", "MLLAMA_MODEL"])
def test_variables_that_name_no_file(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loop of links, and a name longer than names can be."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    apple = str(Path(__file__).parents[1] / "examples" / "apple.png")
    for name in (str(tmp_path / "loop"), "x" * 300, str(tmp_path / "loop" / "x")):
        monkeypatch.setenv(variable, name)
        for args in (["caption", apple, "-n", "1"], ["tune", name, "-o", str(tmp_path / "out")]):
            assert run(args) in (1, 2)
            said = capsys.readouterr().err
            assert said.startswith("Error: ") and said.count("\n") == 1 and "unexpected" not in said
        monkeypatch.setenv("MLLAMA_LIBRARY", name)
        with pytest.raises(BackendError, match="no such file"):
            library._library()
        monkeypatch.delenv("MLLAMA_LIBRARY")


def test_numbers_of_numpy(tiny_files: Files) -> None:
    settings = {"n_ctx": np.int32(99), "n_threads": np.uint8(1), "n_gpu_layers": np.int64(0)}
    with Mllama(tiny_files("gqa").one, flash_attn=np.bool_(True), image_cache=False, **settings) as model:  # type: ignore[arg-type]
        assert model.n_ctx == 99
        options: dict[str, Any] = {"temperature": 1.0, "top_k": 5, "seed": 3, "max_tokens": 4}
        plain = model.caption(noisy_image(1), **options)
        kinds = {"temperature": np.float32, "top_k": np.int64, "seed": np.uint64, "max_tokens": np.int8}
        assert plain == model.caption(noisy_image(1), **{n: kinds[n](value) for n, value in options.items()})
        tokens = model.tokenize("the dog")
        assert model.detokenize(np.array(tokens)) == model.detokenize(tokens)
        assert (model.logits(np.array(tokens)) == model.logits(tokens)).all()


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda m: m.tokenize(None), "text must be a str, not None"),
        (lambda m: m.tokenize(b"x"), "text must be a str"),
        (lambda m: m.tokenize(["a"]), "text must be a str"),
        (lambda m: m.detokenize(None), "tokens must be a list of whole numbers"),
        (lambda m: m.detokenize("ab"), "tokens must be"),
        (lambda m: m.detokenize([1.5]), "tokens must be"),
        (lambda m: m.detokenize([True]), "tokens must be"),
        (lambda m: m.detokenize(5), "tokens must be"),
        (lambda m: m.logits(None), "token_ids must be"),
        (lambda m: m.logits([1.5]), "token_ids must be"),
        (lambda m: m.logits(["a"]), "token_ids must be"),
        (lambda m: m.logits([5], images=5), "images must be a list"),
        (lambda m: m.logits([5], images=None), "images must be a list"),
        (lambda m: m.caption(noisy_image(1), None), "prompt must be a text"),
        (lambda m: m.caption(noisy_image(1), ["x"]), "prompt must be a text"),
        (lambda m: m.caption(noisy_image(1), stream="no"), "stream must be"),
        (lambda m: m.caption(noisy_image(1), json_schema="x"), "there is no option 'json_schema'"),
        (lambda m: m.caption(noisy_image(1), top_k=1.5), "top_k must be"),
        (lambda m: m.caption(noisy_image(1), stop=5), "stop must be"),
        (lambda m: m.caption(noisy_image(1), grammar=5), "grammar must be"),
        (lambda m: m.reply(image=noisy_image(1), options={"seed": 1}), "options must be ReplyOptions"),
        (lambda m: m.replies([], n=1, options=None), "options must be ReplyOptions"),
        (lambda m: m.tap(None), "callback must be a function"),
        (lambda m: m.conversation(n_ctx="x"), "n_ctx must be"),
        (lambda m: m.conversation(progress=5), "progress must be"),
        (lambda m: m.image_encoder(1.5), "n_threads must be"),
    ],
)
def test_calls(model: Mllama, do: Callable[[Mllama], object], words: str) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        do(model)
    assert "\n" not in str(raised.value)


def test_images(model: Mllama) -> None:
    for image in (None, 5, [], {}):
        for use in (model.caption, model.encode_image, preprocess_image):
            with pytest.raises(ImageError):
                use(image)  # type: ignore[operator]
    for name in ("tile_size", "max_tiles"):
        for value in (0, 1.5, "4", None, True):
            with pytest.raises(RequestError, match=f"{name} must be"):
                preprocess_image(noisy_image(1), **{name: value})


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("change", ["directory", "unlinked", "both"])
def test_a_relative_path_and_a_file_that_goes_away(
    tiny_files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    isolate: bool,
    cached: bool,
    change: str,
) -> None:
    files = tiny_files("gqa")
    shutil.copy(files.text, tmp_path / "rel.gguf")
    shutil.copy(files.mmproj, tmp_path / "projector.gguf")
    cache = tmp_path / "cache" if cached else False
    monkeypatch.chdir(tmp_path)
    with Mllama("rel.gguf", Path("projector.gguf"), n_ctx=256, isolate=isolate, image_cache=cache) as model:
        if change != "unlinked":
            monkeypatch.chdir("/")
        if change != "directory":
            os.unlink(tmp_path / "rel.gguf")
            os.unlink(tmp_path / "projector.gguf")
        first = model.caption(noisy_image(1), max_tokens=5)
        with model.conversation() as other:
            assert other.caption(noisy_image(1), max_tokens=5) == first
        model.reset()
        assert model.caption(noisy_image(1), max_tokens=5) == first


def test_all_are_errors_of_the_package() -> None:
    assert issubclass(RequestError, MllamaError)
