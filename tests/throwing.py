"""Two devices that throw where they are told: `python throwing.py LIBRARY FUNCTION ARGUMENTS`.

The functions print JSON, one object a line, for test_throwing.py. LIBRARY is the compiled
native/tests/throwing_backend.cpp.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mllama_gguf.backend import process
from mllama_gguf.backend.base import Context, Model
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.child import Child
from mllama_gguf.backend.isolated import IsolatedModel
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import devices, open_model
from mllama_gguf.backend.supervisor import Supervisor
from mllama_gguf.backend.types import Floats
from mllama_gguf.cli.main import run
from mllama_gguf.errors import MllamaError

# Where a device can throw while a model is loaded and used
PLACES = (
    "alloc_buffer",
    "get_alignment",
    "get_max_size",
    "get_alloc_size",
    "is_host",
    "get_base",
    "init_tensor",
    "set_tensor",
    "get_tensor",
    "cpy_tensor",
    "clear",
    "reset",
    "supports_op",
    "supports_buft",
    "graph_optimize",
    "graph_compute",
    "synchronize",
    "get_proc_address",
    "free_buffer",
    "free",
)


class Standin:
    """The devices "Standin0" and "Standin1"."""

    def __init__(self, library: str) -> None:
        load()  # ggml first: the stand-in is for the copy that is loaded already
        self._lib = ctypes.CDLL(library)
        self._lib.standin_register.restype = ctypes.c_char_p
        self._lib.standin_thrown.restype = ctypes.c_long
        problem = self._lib.standin_register(2)
        assert problem is None, problem

    def throw(self, place: str, device: int = 1, kind: str = "error", after: int = 0) -> None:
        """From now on; place "": nowhere."""
        self._lib.standin_throw(place.encode(), device, kind.encode(), after)

    @property
    def thrown(self) -> int:
        """How often since `throw`."""
        return int(self._lib.standin_thrown())


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def error_of(function: Callable[[], Any]) -> dict[str, str] | None:
    """What it raises; anything but an error of ours goes through."""
    try:
        function()
    except MllamaError as error:
        return {"type": type(error).__name__, "words": str(error)}
    return None


class Use:
    """A model on both devices and a context, as opened; closed at the end of a with block."""

    def __init__(self, path: str, **settings: Any) -> None:
        callbacks = Callbacks(load())
        self.model = self.open_model(path, callbacks, **{"n_gpu_layers": -1, **settings})
        try:
            self.context: Context = self.model.open_context(callbacks, n_ctx=256, type_k="f32", type_v="f32")
        except BaseException:
            self.model.close()
            raise

    def open_model(self, path: str, callbacks: Callbacks, **settings: Any) -> Model:
        return open_model(path, None, callbacks=callbacks, **settings)

    def __enter__(self) -> Use:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
        self.model.close()

    def compute(self) -> Floats:
        """Everything that touches a device: states of an image, logits that depend on both caches."""
        h, context = self.model.hparams, self.context
        pixels = np.linspace(-1, 1, 3 * h.image_size**2, dtype=np.float32).reshape(1, 3, h.image_size, -1)
        context.clear()
        context.reserve([1])
        states = context.encode(pixels, 1)
        first = context.image_fill([states])
        slot = context.image_fill([1])  # and the same again, copied
        context.image_set(slot, 0, 0, context.image_get(first, 0, 0, context.image_size(first, 0)))
        context.image_free(first)
        context.decode(range(1, 20), -1, 0, "none")
        context.prefix_kv_set(19, context.prefix_kv_get(19))
        logits = context.decode([h.image_token_id, 20, 21, 22], slot, 1)
        context.image_free(slot)
        return np.concatenate([states.ravel()[:64], logits.ravel()])


class IsolatedUse(Use):
    """The same in a child process, with devices of its own."""

    def open_model(self, path: str, callbacks: Callbacks, **settings: Any) -> Model:
        self._callbacks = callbacks
        self.supervisor = Supervisor((), 60.0)
        return IsolatedModel(self.supervisor, path, None, callbacks, **settings)

    def throw(self, place: str, kind: str = "error") -> None:
        """As `Standin.throw`, there."""
        self.supervisor.call(self._callbacks, "", "throw", (place, 1, kind))


def register_in_child(library: str) -> None:
    """In a child, before it serves: the devices, and a call that lets them throw."""
    Child.throw = Standin(library).throw  # type: ignore[attr-defined]


def compare(numbers: Floats, expected: Floats) -> bool:
    """Whether they are the same but for rounding: the encoder's attention on a GPU has factors in F16."""
    return bool(np.linalg.norm(numbers - expected) <= 2e-3 * np.linalg.norm(expected))


# ---- what test_throwing.py calls ---------------------------------------------------------------------------


def start(standin: Standin, place: str, model: str) -> None:
    """Standin1 throws at its start: what is listed, and what is left to compute with."""
    standin.throw(place)
    for device in devices(start=True):
        tell(name=device.name, type=device.type, error=device.error)
    with Use(model, n_gpu_layers=0) as cpu:
        expected = cpu.compute()
    warnings: list[str] = []
    log = logging.Handler()
    log.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mllama_gguf.native").addHandler(log)
    with Use(model) as rest:
        tell(
            same=compare(rest.compute(), expected), devices=[d.device for d in rest.context.memory().devices]
        )
    tell(warnings=[words for words in warnings if "offload" in words])
    tell(split=error_of(lambda: Use(model, tensor_split=[1, 3]).__exit__()))
    names = [device.name for device in devices()]
    for settings in ({"devices": [names[-1]]}, {"main_gpu": 1}, {"vision_device": names[-1]}):
        tell(settings=settings, error=error_of(lambda s=settings: Use(model, **s)))  # type: ignore[misc]
    standin.throw("")
    with Use(model, devices=[names[-1]]) as again:
        tell(again=compare(again.compute(), expected))


def compute(standin: Standin, model: str) -> None:
    """Standin1 throws anywhere: one error, and afterwards all is well, in the same context and in another."""
    with Use(model, n_gpu_layers=0) as cpu:
        expected = cpu.compute()
    for place in PLACES:
        for kind in ("error", "memory", "odd", "abort"):
            standin.throw(place, kind=kind)
            opening: Any = error_of(lambda: Use(model).__exit__())
            tell(place=place, kind=kind, when="opening", thrown=standin.thrown, error=opening)
            standin.throw("")
            with Use(model) as used:
                used.compute()
                standin.throw(place, kind=kind)
                error = error_of(used.compute)
                tell(place=place, kind=kind, when="computing", thrown=standin.thrown, error=error)
                standin.throw("")
                tell(place=place, kind=kind, same=compare(used.compute(), expected))
        # The first calls go well: it is in the middle of something.
        for after in (1, 2, 5, 11, 23):
            with Use(model) as used:
                standin.throw(place, after=after)
                error = error_of(used.compute)
                tell(place=place, kind="error", when=f"after {after}", thrown=standin.thrown, error=error)
                standin.throw("")
                tell(place=place, kind="error", same=compare(used.compute(), expected))


def isolated(library: str, model: str) -> None:
    """The device of a child process throws: the child lives on, and so does what it holds."""
    start = process.subprocess.Popen

    def start_with_devices(command: list[str], **settings: Any) -> Any:
        *python, code = command
        work = "from mllama_gguf.backend.child"
        assert work in code
        prepared = f"import throwing; throwing.register_in_child({library!r}); {work}"
        return start([*python, code.replace(work, prepared)], **settings)

    process.subprocess.Popen = start_with_devices  # type: ignore[misc,assignment]
    with Use(model, n_gpu_layers=0) as cpu:
        expected = cpu.compute()
    used = IsolatedUse(model)
    with used:
        tell(devices=[device.device for device in used.context.memory().devices])
        for place in ("set_tensor", "get_tensor", "graph_compute", "alloc_buffer", "synchronize", "clear"):
            for kind in ("error", "memory", "odd", "abort"):
                used.compute()
                used.throw(place, kind)
                error = error_of(used.compute)
                used.throw("")
                tell(place=place, kind=kind, error=error, same=compare(used.compute(), expected))
        tell(processes=used.supervisor.epoch)


def closing(standin: Standin, model: str) -> None:
    """What a device throws when it is given back is logged."""
    for place in ("free", "free_buffer", "synchronize"):
        used = Use(model)
        used.compute()
        standin.throw(place)
        used.__exit__()
        tell(place=place, thrown=standin.thrown)
        standin.throw("")


def command(standin: Standin, place: str, *words: str) -> None:
    """A command line, with Standin1 throwing; place may be "PLACE:KIND"."""
    place, _, kind = place.partition(":")
    standin.throw(place, kind=kind or "error")
    tell(exit_code=run(list(words)))


def main(library: str, function: str, *arguments: str) -> None:
    if function == "isolated":
        isolated(library, *arguments)
        return
    standin = Standin(library)
    {"start": start, "compute": compute, "closing": closing, "command": command}[function](
        standin, *arguments
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
