"""Workers that die, hang, refuse, are full or speak another protocol: each is one BackendError."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from golden_cases import case, tiled
from helpers import TinyFiles, answering, elsewhere

from mllama_gguf import Aborted, BackendError, Mllama
from mllama_gguf.backend.types import Floats
from mllama_gguf.cli.main import run

ARCH = tiny.ARCHS["gqa"]
PROMPT = case(ARCH, "text_before_image")

Make = Callable[..., Any]
Files = Callable[[str], TinyFiles]


def complete(model: Mllama) -> Floats:
    """Every phase: encode, fill, prompt, decode. The logits of the steps."""
    images = [model._conversation.encode(tiled(ARCH, image)) for image in PROMPT.images]
    model._conversation.session.feed(PROMPT.tokens, images)
    return np.stack([model._conversation.session.step(token) for token in (1, 2, 3)])


@pytest.fixture(scope="module", autouse=True)
def ggml_operations() -> Iterator[None]:
    """What a worker computes is compared to the bit with what this process computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLLAMA_CPU_KERNEL", "off")
        yield


@pytest.fixture
def expected(tiny_files: Files) -> Floats:
    with Mllama(tiny_files("gqa").one, n_ctx=256, n_threads=1) as model:
        return complete(model)


def open_with(files: TinyFiles, *workers: Any, **settings: Any) -> Mllama:
    names = [worker.name for worker in workers]
    return Mllama(files.one, rpc_servers=names, n_gpu_layers=-1, n_ctx=256, n_threads=1, **settings)


# A tensor of each phase, on its way out of the worker; and how often it comes before the moment to strike.
PHASES = {
    "encode": ("v.blk.2.attn_out", 0),
    "fill": ("blk.3.cross_k", 0),
    "prompt": ("blk.1.q", 1),  # first the run before the image
    "decode": ("blk.4.ffn_out", 3),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_worker_dies(phase: str, make_worker: Make, tiny_files: Files, expected: Floats) -> None:
    safe, victim = make_worker(), make_worker()
    name, count = PHASES[phase]
    seen = 0

    def strike(tensor: str, values: Floats | None) -> bool:
        nonlocal seen
        if tensor == name and values is None:
            seen += 1
            if seen > count:
                victim.kill()
        return False

    with open_with(tiny_files("gqa"), victim, safe, vision_device="RPC0", tensor_split=(9, 1)) as model:
        with pytest.raises(BackendError) as error, model.tap(strike):
            complete(model)
        assert seen > count
        assert victim.name in str(error.value) and safe.name not in str(error.value)
        assert "RPC server crashed" in str(error.value) and "\n" not in str(error.value)
        # Still dead: said again, at once.
        with pytest.raises(BackendError, match=f"{victim.name} .*refuses the connection.*Failed to connect"):
            complete(model)
        victim.start()
        assert np.array_equal(complete(model), expected)


def test_a_worker_dies_while_weights_are_loaded(make_worker: Make, tiny_files: Files) -> None:
    worker = make_worker()

    def strike(phase: str, done: int, total: int) -> None:
        if phase == "load":
            worker.kill()

    with pytest.raises(BackendError, match=f"worker {worker.name} .*refuses the connection"):
        open_with(tiny_files("gqa"), worker, progress=strike)
    worker.start()
    open_with(tiny_files("gqa"), worker).close()


def test_a_worker_dies_at_any_moment(make_worker: Make, tiny_files: Files, expected: Floats) -> None:
    """Without taps, graphs are whole and much is under way at once."""
    worker = make_worker()
    with open_with(tiny_files("gqa"), worker) as model:
        for delay in (0.001, 0.005, 0.011, 0.023, 0.05):
            killer = threading.Timer(delay, worker.process.kill)
            killer.start()
            with pytest.raises(BackendError, match=worker.name):
                while True:
                    model.reset()
                    complete(model)
            killer.join()
            worker.kill()
            worker.start()
        assert np.array_equal(complete(model), expected)


def test_a_worker_dies_between_two_calls(make_worker: Make, tiny_files: Files, expected: Floats) -> None:
    worker = make_worker()
    with open_with(tiny_files("gqa"), worker) as model:
        complete(model)
        worker.kill()
        worker.start()
        # The conversation is in the cache no more, and a lone step cannot bring it back.
        with pytest.raises(BackendError, match=worker.name):
            model._conversation.session.step(1)
        with pytest.raises(BackendError, match="caches were lost"):
            model._conversation.session.step(1)
        assert np.array_equal(complete(model), expected)
        assert model._conversation.session.n_past == len(PROMPT.tokens) + 3


def test_a_worker_hangs(make_worker: Make, tiny_files: Files, expected: Floats) -> None:
    busy, frozen = make_worker(), make_worker()
    with open_with(tiny_files("gqa"), busy, frozen, rpc_timeout=3.0) as model:
        frozen.freeze()
        start = time.monotonic()
        with pytest.raises(BackendError, match=rf"worker {frozen.name} \(does not answer\).*for 3 s"):
            complete(model)
        assert time.monotonic() - start < 15
        frozen.thaw()
        assert np.array_equal(complete(model), expected)


def test_ctrl_c_while_a_worker_hangs(make_worker: Make, tiny_files: Files, expected: Floats) -> None:
    worker = make_worker()
    with open_with(tiny_files("gqa"), worker) as model:
        worker.freeze()
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            complete(model)
        assert time.monotonic() - start < 5
        worker.thaw()
        assert np.array_equal(complete(model), expected)


def test_the_abort_callback_stops_a_worker_that_hangs(make_worker: Make, tiny_files: Files) -> None:
    worker = make_worker()
    stop = False
    with open_with(tiny_files("gqa"), worker, abort=lambda: stop) as model:
        worker.freeze()
        stop = True
        with pytest.raises(Aborted):
            complete(model)
        worker.thaw()


def test_a_port_that_refuses(tiny_files: Files) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        name = f"127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(BackendError, match=f"worker {name} .*refuses the connection.*: Failed to connect"):
        Mllama(tiny_files("gqa").one, rpc_servers=name)


@pytest.fixture
def impostor() -> Iterator[str]:
    """A server that answers every hello with protocol version 99."""
    body = bytes([99, 0, 0, 0]) + bytes(24)
    with answering(len(body).to_bytes(8, "little") + body) as address:
        yield address


def test_another_protocol_version(impostor: str, tiny_files: Files) -> None:
    with pytest.raises(BackendError, match=f"worker {impostor}: .*handshake failed.*mismatch: 99.0.0"):
        Mllama(tiny_files("gqa").one, rpc_servers=impostor)


# A worker that may take 48 MiB more than it has when it begins.
SMALL_WORKER = """
import resource, sys
from mllama_gguf.backend.local import devices
from mllama_gguf.backend.rpc import serve
devices()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (48 << 20), -1))
serve("127.0.0.1", int(sys.argv[1]))
"""


def test_too_little_memory(make_worker: Make, tiny_files: Files) -> None:
    worker = make_worker("-c", SMALL_WORKER)
    with pytest.raises(
        BackendError, match=rf"device RPC0 \(worker {worker.name}\) has no room for a self-att"
    ):
        Mllama(tiny_files("gqa").one, rpc_servers=worker.name, n_gpu_layers=-1, n_ctx=None)
    with open_with(tiny_files("gqa"), worker) as model:
        complete(model)


def test_taps_and_progress_come_through(make_worker: Make, tiny_files: Files) -> None:
    seen: dict[str, Floats] = {}
    phases: list[str] = []

    def keep(name: str, values: Floats | None) -> bool:
        if values is not None:
            seen[name] = values.copy()
        return name == "blk.3.layer_out"

    with Mllama(tiny_files("gqa").one, n_ctx=256, n_threads=1) as model, model.tap(keep):
        complete(model)
    expected = seen.copy()
    seen.clear()
    with (
        open_with(tiny_files("gqa"), make_worker(), progress=lambda phase, *_: phases.append(phase)) as model,
        model.tap(keep),
    ):
        complete(model)
    assert list(seen) == list(expected) == ["blk.3.layer_out"]
    assert np.array_equal(seen["blk.3.layer_out"], expected["blk.3.layer_out"])
    assert set(phases) == {"load", "encode", "prompt"}


def test_devices_and_caption_commands(make_worker: Make, capfd: pytest.CaptureFixture[str]) -> None:
    worker = make_worker()
    assert run(["devices", "--rpc", worker.name]) == 0
    assert worker.name in capfd.readouterr().out
    image = str(Path(__file__).parents[2] / "examples" / "apple.png")
    words = ["--rpc", worker.name, "-ngl", "-1", "--device", "RPC0", "-ts", "1", "--vision-device", "RPC0"]
    assert run(["caption", image, *words, "--no-kv-offload"]) == 0
    assert capfd.readouterr().out == "a red apple\n"


def test_the_worker_command(make_worker: Make) -> None:
    worker = make_worker()
    taken = subprocess.run(
        [sys.executable, "-m", "mllama_gguf", "worker", "--port", str(worker.port)],
        capture_output=True,
        text=True,
        **elsewhere(),
    )
    assert taken.returncode == 1 and f"127.0.0.1:{worker.port}: cannot listen there" in taken.stderr
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait(10) == 130


def test_an_open_port_is_warned_of() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "mllama_gguf", "worker", "--host", "0.0.0.0", "--device", "none"],
        stderr=subprocess.PIPE,
        text=True,
        **elsewhere(),
    ) as process:
        assert process.stderr is not None
        words = process.stderr.read()
    assert "0.0.0.0 is not loopback, and the protocol has no authentication" in words
    assert "no device 'none'; there are: " in words
