"""One model, several conversations: the same texts as of separate objects, the weights once in memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from helpers import TinyFiles, elsewhere, noisy_image
from test_handles import in_fork, refused

from mllama_gguf import (
    BusyError,
    ContextFullError,
    Conversation,
    LoadedModel,
    Mllama,
    MllamaError,
    ModelError,
    RequestError,
)
from mllama_gguf.backend.context import LocalContext
from mllama_gguf.convert.huggingface import convert

Files = Callable[[str], TinyFiles]
SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1}


@pytest.fixture(params=[False, True], ids=["here", "isolated"])
def model(request: pytest.FixtureRequest, tiny_files: Files) -> Iterator[LoadedModel]:
    with LoadedModel(tiny_files("gqa").one, isolate=request.param, **SETTINGS) as opened:
        yield opened


def chat(conversation: Any, seed: int) -> list[str]:
    """A talk about two images in several turns, greedy and at random."""
    texts: list[str] = []
    messages: list[dict[str, Any]] = []
    for turn in range(4):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"see the dog {seed} {turn}"}]
        if turn in (0, 2):
            content.insert(0, {"type": "image", "image": noisy_image(10 * seed + turn)})
        messages.append({"role": "user", "content": content})
        options = {"max_tokens": 12, "temperature": float(turn % 2), "seed": seed}
        texts.append(conversation.reply(messages, **options).read())
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_threads_say_what_separate_objects_say(model: LoadedModel, tiny_files: Files) -> None:
    expected = []
    for seed in range(3):
        with Mllama(tiny_files("gqa").one, **SETTINGS) as alone:
            expected.append(chat(alone, seed))
    assert len({tuple(texts) for texts in expected}) == 3
    conversations = [model.conversation() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(chat, conversations, range(3)))
    assert found == expected


def test_turns_of_one_thread_do_not_disturb_each_other(model: LoadedModel) -> None:
    one, two = model.conversation(), model.conversation()
    expected = [one.caption(noisy_image(1), max_tokens=20), two.caption(noisy_image(2), max_tokens=20)]
    replies = [one.reply(image=noisy_image(1), max_tokens=20), two.reply(image=noisy_image(2), max_tokens=20)]
    texts = ["", ""]
    while any(reply.finish_reason is None for reply in replies):
        for i, reply in enumerate(replies):
            texts[i] += next(reply, "")
    assert texts == expected


def test_an_image_is_encoded_once_for_all(tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = LocalContext.encode

    def encode(context: LocalContext, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(context, *args)

    monkeypatch.setattr(LocalContext, "encode", encode)
    with LoadedModel(tiny_files("gqa").one, **SETTINGS) as model:
        conversations = [model.conversation() for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(lambda one: one.caption(noisy_image(1), max_tokens=9), conversations))
        assert len(set(texts)) == 1
        assert calls == 1
        with model.image_encoder() as encoder:
            assert encoder.encode(noisy_image(1)) is conversations[0].encode_image(noisy_image(1))
        assert calls == 1


def test_each_conversation_has_its_own_length_and_callbacks(model: LoadedModel) -> None:
    stop, phases = False, []
    short = model.conversation(n_ctx=64, progress=lambda phase, *_: phases.append(phase), abort=lambda: stop)
    other = model.conversation(n_ctx=10**6)
    assert (short.n_ctx, other.n_ctx) == (64, model.hparams.n_ctx_train)
    assert model.conversation().n_ctx == 512
    with pytest.raises(ContextFullError):
        short.reply([{"role": "user", "content": "the dog " * 100}])
    short.caption(noisy_image(1), max_tokens=2)
    assert {"encode", "prompt"} <= set(phases)
    del phases[:]
    other.caption(noisy_image(2), max_tokens=2)
    assert not phases
    for wrong in ({"n_ctx": -1}, {"n_ctx": "long"}, {"n_threads": 0}, {"n_threads": 10**6}):
        with pytest.raises(RequestError):
            model.conversation(**wrong)  # type: ignore[arg-type]


def test_a_conversation_closes_alone(model: LoadedModel) -> None:
    with model.conversation() as one:
        text = one.caption(noisy_image(1), max_tokens=5)
    one.close()
    for use in (
        lambda: one.caption(noisy_image(1)),
        lambda: one.reply([{"role": "user", "content": "x"}]),
        lambda: one.encode_image(noisy_image(1)),
        lambda: one.logits([1]),
        one.memory,
        one.reset,
        lambda: one.tap(lambda name, values: False),
    ):
        with pytest.raises(MllamaError, match="this conversation is closed"):
            use()
    assert repr(one).endswith("closed)")
    assert model.conversation().caption(noisy_image(1), max_tokens=5) == text


def test_the_model_closes_what_uses_it(tiny_files: Files) -> None:
    model = LoadedModel(tiny_files("gqa").one, **SETTINGS)
    one, two, encoder = model.conversation(), model.conversation(), model.image_encoder()
    stream = one.caption(noisy_image(1), max_tokens=50, stream=True)
    next(stream)
    model.close()
    model.close()
    for use in (
        lambda: next(stream),
        lambda: two.caption(noisy_image(1)),
        lambda: encoder.encode(noisy_image(2)),
        model.conversation,
        model.image_encoder,
        lambda: model.tokenize("x"),
        lambda: model.layout,
    ):
        with pytest.raises(MllamaError):
            use()
    for thing in (one, two, encoder, model):
        thing.close()


def test_a_model_is_not_closed_while_a_conversation_computes(tiny_files: Files) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "prompt":
            begun.set()
            go_on.wait(20)

    model = LoadedModel(tiny_files("gqa").one, **SETTINGS)
    idle, busy = model.conversation(), model.conversation(progress=progress)
    thread = threading.Thread(target=busy.caption, args=(noisy_image(1),), kwargs={"max_tokens": 2})
    thread.start()
    assert begun.wait(20)
    for close in (model.close, busy.close):
        with pytest.raises(BusyError, match="this conversation is in use"):
            close()
    assert idle.caption(noisy_image(2), max_tokens=2) is not None  # nothing was closed
    go_on.set()
    thread.join()
    model.close()


def talk_until_error(model: LoadedModel, texts: list[str], errors: list[MllamaError]) -> None:
    try:
        while True:
            with model.conversation() as conversation:
                texts.append(conversation.caption(noisy_image(1), max_tokens=2))
    except MllamaError as e:
        errors.append(e)


def test_threads_open_and_close_conversations_while_the_model_closes(tiny_files: Files) -> None:
    """A text or an error, never freed memory."""
    for _ in range(5):
        model = LoadedModel(tiny_files("gqa").one, **SETTINGS)
        texts: list[str] = []
        errors: list[MllamaError] = []
        threads = [threading.Thread(target=talk_until_error, args=(model, texts, errors)) for _ in range(3)]
        for thread in threads:
            thread.start()
        while True:
            try:
                model.close()
                break
            except BusyError:
                continue
        for thread in threads:
            thread.join(30)
        assert len(errors) == 3
        assert all("closed" in str(e) or "in use" in str(e) for e in errors)
        assert len(set(texts)) <= 1


def test_what_is_dropped_is_freed(tiny_files: Files) -> None:
    """A conversation keeps the weights; without both, nothing is left."""
    model = LoadedModel(tiny_files("gqa").one, **SETTINGS)
    conversation = model.conversation()
    handle = model._backend.model.handle  # type: ignore[attr-defined]
    freed = weakref.ref(handle)
    dropped = weakref.ref(model)
    del model, handle
    gc.collect()
    assert dropped() is None
    assert conversation.caption(noisy_image(1), max_tokens=3) is not None
    del conversation
    gc.collect()
    assert freed() is None


def test_a_forked_process_is_told(tiny_files: Files) -> None:
    with LoadedModel(tiny_files("gqa").one, **SETTINGS) as model, model.conversation() as conversation:

        def child() -> None:
            for use in (
                model.conversation,
                lambda: model.tokenize("x"),
                lambda: conversation.caption(noisy_image(1)),
                conversation.reset,
            ):
                with refused():
                    use()
            conversation.close()
            model.close()

        assert in_fork(child) == 0
        assert conversation.caption(noisy_image(1), max_tokens=2) is not None


def test_mllama_is_a_model_with_a_conversation_of_its_own(tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one, **SETTINGS) as model:
        text = model.caption(noisy_image(1), max_tokens=9)
        with model.conversation() as other:
            assert isinstance(other, Conversation)
            assert other.caption(noisy_image(1), max_tokens=9) == text
            other.reply([{"role": "user", "content": "the dog"}], max_tokens=3).read()
        assert model.reply(image=noisy_image(1), max_tokens=9).read() == text
        assert model.conversation().memory().self_kv == model.memory().self_kv > 0


def test_a_model_that_cannot_be_opened_leaves_nothing(tiny_files: Files, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        LoadedModel(tmp_path / "nothing.gguf")
    with pytest.raises(RequestError, match="there is no setting 'n_cxt'"):
        LoadedModel(tiny_files("gqa").one, n_cxt=5)
    with pytest.raises(RequestError):
        LoadedModel(tiny_files("gqa").one, chat_template="{% for %}")


def test_after_a_loss_of_the_child_all_conversations_go_on(tiny_files: Files) -> None:
    import os
    import signal

    from mllama_gguf import BackendError

    with LoadedModel(tiny_files("gqa").one, isolate=True, **SETTINGS) as model:
        one, two = model.conversation(), model.conversation()
        expected = [c.caption(noisy_image(i), max_tokens=9) for i, c in enumerate((one, two))]
        supervisor = model._backend.model._supervisor  # type: ignore[attr-defined]
        os.kill(supervisor._process._child.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="the next call starts a new process"):
            two.caption(noisy_image(1), max_tokens=9)
        assert [c.caption(noisy_image(i), max_tokens=9) for i, c in enumerate((one, two))] == expected


# ---- memory ------------------------------------------------------------------------------------------------

# Resident memory, in bytes: with one conversation, and what more of them, or another object, take.
MEASURE = """
import json, os, resource, sys
from mllama_gguf import LoadedModel, Mllama

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

path, settings = sys.argv[1], dict(n_ctx=64, n_batch=8, n_threads=1, use_mmap=False, image_cache=False)
question = [{"role": "user", "content": "the dog"}]
start = rss()
model = LoadedModel(path, **settings)
kept = [model.conversation()]
texts = [kept[0].reply(question, max_tokens=3).read()]
one = rss()
for _ in range(3):
    kept.append(model.conversation())
    texts.append(kept[-1].reply(question, max_tokens=3).read())
four = rss()
kept.append(Mllama(path, **settings))
texts.append(kept[-1].reply(question, max_tokens=3).read())
print(json.dumps({"first": one - start, "three more": four - one, "object": rss() - four, "texts": texts}))
"""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model of about 100 MB."""
    folder = tmp_path_factory.mktemp("heavy")
    arch = replace(tiny.ARCHS["square"], name="heavy", width=512, ff=2048, layers=6)
    checkpoint = tiny.make_checkpoint(arch, folder / "hf")
    return convert(checkpoint, folder / "heavy.gguf", type="f32")[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_weights_are_in_memory_once(heavy: Path) -> None:
    weights = heavy.stat().st_size
    assert weights > 60e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(heavy)], capture_output=True, text=True, **elsewhere()
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sizes = {name: f"{found[name] / 1e6:.1f} MB" for name in ("first", "three more", "object")}
    print(f"weights {weights / 1e6:.1f} MB; resident: {sizes}")  # for docs/python.md
    assert len(set(found["texts"])) == 1
    assert found["first"] > weights
    assert found["object"] > 0.9 * weights
    assert found["three more"] < 0.3 * weights
