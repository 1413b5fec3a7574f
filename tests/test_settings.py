"""The settings: one list of names, defaults, checks and options."""

from __future__ import annotations

import inspect
import math
import pickle
import subprocess
import sys
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import elsewhere

from mllama_gguf import Mllama, RequestError
from mllama_gguf.cpus import MAX_THREADS
from mllama_gguf.settings import DEFAULTS, DESCRIPTIONS, Settings, in_options, markdown_table

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("n_ctx", np.int64(4), 4),
        ("n_ctx", np.array(4), 4),
        ("n_ctx", 0, None),
        ("n_ctx", None, None),
        ("n_batch", np.uint8(7), 7),
        ("n_threads", 0, None),
        ("n_threads", MAX_THREADS, MAX_THREADS),
        ("n_gpu_layers", -1, -1),
        ("n_gpu_layers", "AUTO", "auto"),
        ("main_gpu", np.int32(0), 0),
        ("flash_attn", np.bool_(False), False),
        ("rpc_timeout", np.float32(0.5), 0.5),
        ("rpc_timeout", 3, 3.0),
        ("rpc_timeout", Fraction(1, 4), 0.25),
        ("tensor_split", np.array([3, 1]), (3.0, 1.0)),
        ("tensor_split", (), ()),
        ("devices", ["CPU", " RPC0 "], ("CPU", "RPC0")),
        ("devices", np.array(["CPU"]), ("CPU",)),
        ("devices", [], ()),
        ("rpc_servers", "a:1, b:2", ("a:1", "b:2")),
        ("rpc_servers", ["a:1"], ("a:1",)),
        ("rpc_servers", "", ()),
        ("image_cache", "images", Path("images")),
        ("image_cache", Path("images"), Path("images")),
        ("image_cache", False, False),
        ("type_k", np.str_("q8_0"), "q8_0"),
    ],
)
def test_values_in_their_plain_form(name: str, value: Any, plain: Any) -> None:
    settings = Settings.checked({name: value})
    found = getattr(settings, name)
    assert found == plain and type(found) in (type(plain), type(Path()))
    assert all(type(item) in (str, float) for item in (found if isinstance(found, tuple) else ()))
    assert settings.as_dict() == {**DEFAULTS, name: plain}
    assert Settings.checked(settings.as_dict()) == settings


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("flash_attn", "off", "flash_attn must be True or False, not 'off'"),
        ("flash_attn", None, "flash_attn must be True or False, not None"),
        ("use_mmap", 1, "use_mmap must be True or False, not 1"),
        ("isolate", "yes", "isolate must be True or False, not 'yes'"),
        ("vision_device", 5, "vision_device must be auto, cpu or the name of a device, not 5"),
        ("vision_device", "", "vision_device must be auto, cpu or the name of a device, not ''"),
        ("vision_device", None, "vision_device must be .*, not None"),
        ("devices", "CPU", "devices must be a list of names, .*, or None, not 'CPU'"),
        ("devices", [5], r"devices must be a list of names, .*, or None, not \[5\]"),
        ("devices", ["CPU", ""], "devices must be a list of names"),
        ("devices", OrderedDict(CPU=1), "devices must be a list of names"),
        ("devices", np.array("CPU"), "devices must be a list of names"),
        ("devices", 5, "devices must be a list of names"),
        ("tensor_split", "31", "tensor_split must be a list of numbers of at least 0, .*, or None, not '31'"),
        ("tensor_split", ["3"], "tensor_split must be a list of numbers"),
        ("tensor_split", [3, -1], "tensor_split must be a list of numbers"),
        ("tensor_split", [math.inf], "tensor_split must be a list of numbers"),
        ("tensor_split", [True], "tensor_split must be a list of numbers"),
        ("tensor_split", 3, "tensor_split must be a list of numbers"),
        ("image_cache", "", "image_cache must be True, False or a folder, not ''"),
        ("image_cache", 5, "image_cache must be True, False or a folder, not 5"),
        ("image_cache", None, "image_cache must be True, False or a folder, not None"),
        ("n_ctx", 1.5, "n_ctx must be a whole number of at least 0, or None, not 1.5"),
        ("n_ctx", True, "n_ctx must be a whole number of at least 0, or None, not True"),
        ("n_ctx", np.float64(4), "n_ctx must be a whole number"),
        ("n_ctx", np.array([4, 5]), "n_ctx must be a whole number"),
        ("n_ctx", "4096", "n_ctx must be a whole number"),
        ("n_ctx", -1, "n_ctx must be a whole number"),
        ("n_batch", 2**31, "n_batch must be a whole number from 1 to 8192, not 2147483648"),
        ("n_batch", 0, "n_batch must be a whole number from 1 to 8192, not 0"),
        ("n_batch", None, "n_batch must be a whole number from 1 to 8192, not None"),
        (
            "n_threads",
            999999,
            f"n_threads must be a whole number from 1 to {MAX_THREADS}, or None",
        ),
        ("n_threads", MAX_THREADS + 1, "n_threads must be"),
        ("n_threads", -1, "n_threads must be"),
        ("n_threads", False, "n_threads must be"),
        ("n_threads", 0.0, "n_threads must be"),
        ("n_threads", np.array([0, 0]), "n_threads must be"),
        ("n_gpu_layers", "all", "n_gpu_layers must be a whole number of at least -1, or 'auto', not 'all'"),
        ("n_gpu_layers", -2, "n_gpu_layers must be"),
        ("main_gpu", -1, "main_gpu must be a whole number of at least 0, or None, not -1"),
        ("type_k", "q4_0", "type_k must be one of f32, f16, q8_0, not 'q4_0'"),
        ("type_v", 1, "type_v must be one of f32, f16, q8_0, not 1"),
        ("rpc_timeout", 0, "rpc_timeout must be seconds above 0, not 0"),
        ("rpc_timeout", math.nan, "rpc_timeout must be seconds above 0, not nan"),
        ("rpc_timeout", 10**400, "rpc_timeout must be seconds above 0, not 1000"),
        ("rpc_timeout", "30", "rpc_timeout must be seconds above 0, not '30'"),
        ("rpc_servers", 5, 'rpc_servers must be a list of "host:port", not 5'),
        ("rpc_servers", [5], 'rpc_servers must be a list of "host:port"'),
        ("rpc_servers", ["a:1", "a:1"], "rpc_servers: a worker is named twice"),
        ("rpc_servers", "localhost", "rpc_servers: 'localhost' is not host:port, as in 127.0.0.1:50052"),
        ("rpc_servers", "a:99999", "rpc_servers: 'a:99999' is not host:port"),
        ("rpc_servers", [f"a:{i}" for i in range(1, 18)], "rpc_servers: 17 workers; at most 16 are possible"),
        ("chat_template", "", "chat_template must be the source of a Jinja template, or None, not ''"),
        ("chat_template", b"x", "chat_template must be the source of a Jinja template"),
        ("n_contex", 5, "there is no setting 'n_contex'; there are: n_gpu_layers, "),
    ],
)
def test_wrong_values_are_named(name: str, value: Any, words: str) -> None:
    with pytest.raises(RequestError, match=f"^{words}") as caught:
        Settings.checked({name: value})
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    if name in DESCRIPTIONS:
        with pytest.raises(RequestError, match=f"^{words}"):
            Settings().replace(**{name: value})


def test_halves_and_copies() -> None:
    settings = Settings.checked({"main_gpu": 1, "type_k": "f32"}).replace(n_ctx=100, use_mmap=False)
    assert settings == Settings(main_gpu=1, type_k="f32", n_ctx=100, use_mmap=False)
    model, context = settings.for_model(), settings.for_context()
    assert (model["main_gpu"], model["use_mmap"]) == (1, False) and Settings().for_model()["main_gpu"] == -1
    assert context == {
        "n_batch": 512,
        "type_k": "f32",
        "type_v": "f16",
        "flash_attn": True,
        "offload_kqv": True,
    }
    assert not set(model) & set(context)
    assert [settings.context_length(n) for n in (50, 200)] == [50, 100]
    assert Settings(n_ctx=None).context_length(2048) == 2048
    assert pickle.loads(pickle.dumps(settings)) == settings and len({settings, settings.replace()}) == 1


def test_in_options() -> None:
    assert in_options(DEFAULTS) == (
        "-ngl auto --vision-device auto --rpc-timeout 300 -c 4096 -b 512 -ctk f16 -ctv f16 -fa on "
        "--precision fast --vision-precision exact"
    )
    given = {"use_mmap": False, "repack": True, "tensor_split": (3.0, 0.5), "devices": ("A", "B")}
    assert in_options(given) == "--device A,B -ts 3,0.5 --no-mmap --repack"


def test_the_class_takes_the_settings_with_their_defaults() -> None:
    parameters = inspect.signature(Mllama).parameters
    assert set(DESCRIPTIONS) <= set(parameters)
    assert {name: parameters[name].default for name in DESCRIPTIONS} == DEFAULTS
    others = set(parameters) - set(DESCRIPTIONS)
    assert others == {"model_path", "mmproj_path", "defaults", "verbose", "progress", "abort"}


def test_every_setting_is_described() -> None:
    assert Settings() == Settings(**DEFAULTS), "the defaults are in their plain form"
    names = [name for about in DESCRIPTIONS.values() if about.option for name in about.option.names]
    assert len(set(names)) == len(names)
    for about in DESCRIPTIONS.values():
        assert about.help.endswith(".") and about.help[0].isupper()


def test_the_documentation_has_the_table() -> None:
    """If this fails: python -m mllama_gguf.settings prints the new one."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert any(markdown_table() in page.read_text("utf-8") for page in pages)
    printed = subprocess.run(
        [sys.executable, "-m", "mllama_gguf.settings"], **elsewhere(), capture_output=True, text=True
    )
    assert printed.stdout == markdown_table() + "\n"
