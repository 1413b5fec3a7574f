"""The tokens before the first image, from disk: the same to the bit, and when they are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from golden_cases import GoldenImage, tiled
from helpers import TinyFiles, noisy_image

from mllama_gguf import Mllama, RequestError
from mllama_gguf.cache.disk import ImageCache

Files = Callable[[str], TinyFiles]


def prefixes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.prefix_kv")}


def ask(path: Path, n_before: int = 5, tokens: int = 3, **options: Any) -> tuple[np.ndarray, int]:
    """Logits after a prompt with an image behind its first tokens, and how many tokens were not computed."""
    arch = tiny.ARCHS[path.name.split(".")[0]]
    with Mllama(path, n_ctx=256, **{"n_threads": 1, **options}) as model:
        assert model.image_token_id is not None
        prompt = [1, *range(2, 1 + n_before), model.image_token_id, *range(1, tokens + 1)][
            -(n_before + tokens + 1) :
        ]
        images = [model._conversation.encode(tiled(arch, GoldenImage(1)))]
        logits, reused = model._conversation.session.feed(prompt, images)
        rows = [logits[0], *(model._conversation.session.step(token) for token in (3, 5))]
        model.reset()
    return np.array(rows), reused


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("arch", list(tiny.ARCHS))
def test_the_same_to_the_bit(folder: Path, tiny_files: Files, arch: str, isolate: bool) -> None:
    path = tiny_files(arch).one
    expected, _ = ask(path, image_cache=False)
    for reused in (0, 5, 5):
        logits, found = ask(path, isolate=isolate)
        assert found == reused
        np.testing.assert_array_equal(logits, expected)
    assert len(prefixes(folder)) == 1


def test_what_makes_a_key(folder: Path, tiny_files: Files, tmp_path: Path) -> None:
    path = tiny_files("gqa").one
    ask(path)
    for n, settings in enumerate(
        ({"n_before": 6}, {"type_k": "f32"}, {"type_v": "f32"}, {"n_batch": 3}, {"flash_attn": False},
         {"n_threads": 2}), 2
    ):  # fmt: skip
        assert ask(path, **settings)[1] == 0
        assert len(prefixes(folder)) == n
        assert ask(path, **settings)[1] == settings.get("n_before", 5)
    assert ask(path, tokens=9)[1] == 5  # what comes after it is of no account
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert ask(copy)[1] == 0


def test_nothing_before_the_image(folder: Path, tiny_files: Files) -> None:
    assert ask(tiny_files("gqa").one, n_before=0)[1] == 0
    assert not prefixes(folder)


@pytest.mark.parametrize("at", [0, 20, 50, 64, -5, -1, None])
def test_a_damaged_prefix(
    folder: Path, tiny_files: Files, caplog: pytest.LogCaptureFixture, at: int | None
) -> None:
    path = tiny_files("gqa").one
    expected, _ = ask(path)
    ((name, whole),) = prefixes(folder).items()
    data = bytearray(whole)
    if at is None:
        del data[-1]
    else:
        data[at] ^= 1
    (folder / name).write_bytes(data)
    logits, reused = ask(path)
    assert reused == 0
    np.testing.assert_array_equal(logits, expected)
    assert prefixes(folder) == {name: whole}
    (record,) = [r for r in caplog.records if r.name == "mllama_gguf.cache.disk"]
    assert "the entry is dropped" in record.getMessage()


def test_a_chat(folder: Path, tiny_files: Files) -> None:
    """Kept once the reply has begun; a tap sees all tokens; a later turn has them in memory."""

    def chat(model: Mllama, **options: Any) -> Any:
        content = [{"type": "image", "image": noisy_image(1)}, {"type": "text", "text": "the"}]
        return model.create_chat_completion([{"role": "user", "content": content}], max_tokens=3, **options)

    with Mllama(tiny_files("gqa").one, n_ctx=512) as model:
        chunks = chat(model, stream=True)
        next(chunks)
        next(chunks)
        assert not prefixes(folder)
        next(chunks)
        assert len(prefixes(folder)) == 1
        chunks.close()
        assert ImageCache().info().n_prefix_kv == 1
    with Mllama(tiny_files("gqa").one, n_ctx=512) as model:
        reply = chat(model)
        n = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert n > 0
        again = chat(model)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > n
        assert again["choices"][0]["message"] == reply["choices"][0]["message"]
    seen: list[str] = []

    def tap(name: str, values: object) -> bool:
        seen.append(name)
        return False

    with Mllama(tiny_files("gqa").one, n_ctx=512) as model, model.tap(tap):
        assert chat(model)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert seen
    ImageCache().clear()
    assert not prefixes(folder)


def test_bytes_of_tokens(tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one, n_ctx=32, image_cache=False) as model:
        context = model._conversation.context
        context.decode([1, 2, 3, 4], -1, 0)
        data = context.prefix_kv_get(3)
        assert data.nbytes == context.prefix_kv_size(3) == 3 * context.prefix_kv_size(1) > 0
        expected = context.decode([9], -1, 0), context.truncate(3), context.decode([7], -1, 0)
        context.clear()
        context.prefix_kv_set(3, data)
        assert context.n_past == 3
        np.testing.assert_array_equal(context.decode([7], -1, 0), expected[2])
        for n, given in (
            (3, data[1:]),
            (2, data),
            (33, np.zeros(context.prefix_kv_size(33), np.uint8)),
            (-1, data),
        ):
            with pytest.raises(RequestError, match="bytes for"):
                context.prefix_kv_set(n, given)
        with pytest.raises(RequestError, match="bytes for"):
            context.prefix_kv_get(5)
        assert context.n_past == 4
