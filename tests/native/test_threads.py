"""Any number of threads, given to C: refused or taken, never a crash."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import TinyFiles

from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import LocalModel
from mllama_gguf.errors import RequestError

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def test_any_number_of_threads(tiny_files: Callable[[str], TinyFiles]) -> None:
    callbacks = Callbacks(load())
    model = LocalModel(tiny_files("gqa").one, None, callbacks)
    for n in (513, 1024, 999_999, INT_MAX):
        with pytest.raises(RequestError, match=f"n_threads is {n}; at most 512 are possible"):
            model.open_context(callbacks, n_ctx=64, n_threads=n)
    expected = None
    for n in (INT_MIN, -1, 0, 1, 40):
        context = model.open_context(callbacks, n_ctx=64, n_threads=n)
        for again in (n, INT_MIN, INT_MAX, 0, 3):
            with context.handle as pointer:
                context.native.lib.mllama_set_n_threads(pointer, again)
        logits = context.decode([1, 2, 3], -1, 0)
        expected = logits if expected is None else expected
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        context.close()
    model.close()
