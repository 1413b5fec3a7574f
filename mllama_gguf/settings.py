"""The settings of a model: each one's name, default, check, option of the command line and words, once.

`Mllama`, the command line, `plan`, `tune` and the table in the documentation take them from here.
`python -m mllama_gguf.settings` prints that table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from .checks import (
    Check,
    Choice,
    Folder,
    Names,
    Seconds,
    Shares,
    Switch,
    Text,
    Whole,
    Workers,
    checked,
    is_zero,
)
from .cpus import MAX_THREADS
from .errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

KvType = Literal["f32", "f16", "q8_0"]
Precision = Literal["fast", "exact"]
VisionPrecision = Literal["exact", "bf16"]

DEFAULT_PROMPT = "Describe this image."
MAX_BATCH = 8192  # tokens in one step, as context.h says
MAX_PARALLEL = 255  # conversations that compute together: sequences of a context, besides its own


class Option(NamedTuple):
    """How the command line offers a setting.

    names:   as `click.option` takes them, the one to show first; of the form "--x/--no-x" for a switch
    metavar: what stands for the value; "": the option is a flag
    holds:   what the file holds, for an option that names a file whose text is the value
    """

    names: tuple[str, ...]
    metavar: str = ""
    holds: str = ""


class Description(NamedTuple):
    """The facts about a setting besides its name and default.

    none:         what None stands for, if it may stand in place of a value
    zero_is_none: 0 stands for the same
    """

    check: Check
    help: str
    option: Option | None
    none: str
    zero_is_none: bool


def _setting(
    default: Any,
    check: Check,
    help: str,
    option: Option | None = None,
    *,
    none: str = "",
    zero_is_none: bool = False,
) -> Any:
    about = Description(check, help, option, none, zero_is_none)
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Settings:
    """How a model is opened. All values are checked and in their plain form.

    Raises RequestError that names a wrong value.
    """

    n_gpu_layers: int | Literal["auto"] = _setting(
        "auto",
        Whole(-1, word="auto"),
        "Offload the last N layers; -1: all; 0: none; auto: as many as fit on the GPUs, if there are any.",
        Option(("-ngl", "--n-gpu-layers"), "N|auto"),
    )
    vision_device: str = _setting(
        "auto",
        Text("auto, cpu or the name of a device"),
        "Device of the vision encoder: auto (where the layers are), cpu, or a name from `mllama devices`.",
        Option(("--vision-device",), "NAME"),
    )
    devices: tuple[str, ...] | None = _setting(
        None,
        Names(),
        "Offload to these devices, named as in `mllama devices`.",
        Option(("--device",), "NAME,..."),
        none="all GPUs and workers",
    )
    tensor_split: tuple[float, ...] | None = _setting(
        None,
        Shares(),
        "Divide the layers between the devices in these shares, as in 3,1.",
        Option(("-ts", "--tensor-split"), "N,..."),
        none="by free memory",
    )
    main_gpu: int | None = _setting(
        None,
        Whole(0),
        "Offload to this one device only, counted from 0.",
        Option(("--main-gpu",), "N"),
        none="all share",
    )
    offload_kqv: bool = _setting(
        True,
        Switch(),
        "Keep caches and attention of offloaded layers on the CPU.",
        Option(("--no-kv-offload",)),
    )
    rpc_servers: tuple[str, ...] = _setting(
        (),
        Workers(),
        "Use the devices of these `mllama worker`s too.",
        Option(("--rpc",), "HOST:PORT,..."),
    )
    rpc_timeout: float = _setting(
        300.0,
        Seconds(),
        "Give up on a worker after SECONDS without a sign of life.",
        Option(("--rpc-timeout",), "SECONDS"),
    )
    isolate: bool = _setting(
        False,
        Switch(),
        "Compute in a child process, whose crash is only an error. Always on with workers.",
        Option(("--isolate",)),
    )
    n_ctx: int | None = _setting(
        4096,
        Whole(0),
        "Limit a conversation to N tokens; 0: as many as the model was trained with.",
        Option(("-c", "--n-ctx"), "N"),
        none="as trained",
        zero_is_none=True,
    )
    n_threads: int | None = _setting(
        None,
        Whole(1, MAX_THREADS),
        "Use N CPU threads.",
        Option(("-t", "--threads"), "N"),
        none="all usable CPUs, fewer for a small model",
        zero_is_none=True,
    )
    n_batch: int = _setting(
        512,
        Whole(1, MAX_BATCH),
        "Batch size: tokens computed in one step.",
        Option(("-b", "--n-batch"), "N"),
    )
    type_k: KvType = _setting(
        "f16",
        Choice(get_args(KvType)),
        "Type of the keys in the cache: f32, f16 or q8_0.",
        Option(("-ctk", "--cache-type-k"), "TYPE"),
    )
    type_v: KvType = _setting(
        "f16",
        Choice(get_args(KvType)),
        "Type of the values in the cache: f32, f16 or q8_0 (needs flash attention).",
        Option(("-ctv", "--cache-type-v"), "TYPE"),
    )
    flash_attn: bool = _setting(
        True,
        Switch(),
        "Use flash attention (less memory).",
        Option(("-fa", "--flash-attn"), "on|off"),
    )
    precision: Precision = _setting(
        "fast",
        Choice(get_args(Precision)),
        "Precision of GPUs: fast, or exact (as the CPU; slower).",
        Option(("--precision",), "fast|exact"),
    )
    vision_precision: VisionPrecision = _setting(
        "exact",
        Choice(get_args(VisionPrecision)),
        "Precision of an F16 vision encoder on the CPU: exact, or bf16 (rounded as a BF16 file's; faster).",
        Option(("--vision-precision",), "exact|bf16"),
    )
    use_mmap: bool = _setting(
        True,
        Switch(),
        "Copy the weights into memory; do not map the file.",
        Option(("--no-mmap",)),
    )
    repack: bool = _setting(
        False,
        Switch(),
        "Copy text weights into the layouts of ggml's special CPU kernels.",
        Option(("--repack/--no-repack",)),
    )
    max_tiles: int | None = _setting(
        None,
        Whole(1, 64),
        "Cut an image into at most N tiles; 1: the fastest, but small text gets lost.",
        Option(("--max-tiles",), "N"),
        none="as many as the model knows",
    )
    allow_quantized_vision: bool = _setting(
        False,
        Switch(),
        "Accept a vision encoder with quantized matrices, which ruin the captions.",
        Option(("--allow-quantized-vision",)),
    )
    chat_template: str | None = _setting(
        None,
        Text("the source of a Jinja template"),
        "Use this Jinja template for prompts.",
        Option(("--chat-template",), "FILE", holds="chat template"),
        none="the model's",
    )
    image_cache: bool | Path = _setting(
        True,
        Folder(),
        "Keep the results of images on disk: True, False (in memory only) or the folder.",
    )

    def __post_init__(self) -> None:
        for name, about in DESCRIPTIONS.items():
            value = getattr(self, name)
            if about.zero_is_none and is_zero(value):
                value = None
            object.__setattr__(self, name, checked(name, about.check, value, or_none=bool(about.none)))

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Settings:
        """Settings by their names; those that are not named have their defaults. Raises RequestError."""
        for name in values:
            if name not in DESCRIPTIONS:
                raise RequestError(f"there is no setting {name!r}; there are: {', '.join(DESCRIPTIONS)}")
        return cls(**values)

    def replace(self, **changes: Any) -> Settings:
        """The same with other values for some. Raises RequestError."""
        return Settings.checked({**self.as_dict(), **changes})

    def as_dict(self) -> dict[str, Any]:
        """All values by name, as `Mllama` takes them."""
        return {name: getattr(self, name) for name in DESCRIPTIONS}

    def for_model(self) -> dict[str, Any]:
        """What `open_model` takes, but n_gpu_layers, which "auto" leaves open."""
        names = (
            "vision_device",
            "devices",
            "tensor_split",
            "precision",
            "use_mmap",
            "repack",
            "allow_quantized_vision",
        )
        main_gpu = -1 if self.main_gpu is None else self.main_gpu
        return {**{name: getattr(self, name) for name in names}, "main_gpu": main_gpu}

    def for_context(self) -> dict[str, Any]:
        """What a context takes, but n_ctx and n_threads, which depend on the model."""
        names = ("n_batch", "type_k", "type_v", "flash_attn", "offload_kqv")
        return {name: getattr(self, name) for name in names}

    def context_length(self, n_ctx_train: int) -> int:
        """n_ctx for a model that was trained with n_ctx_train tokens."""
        return min(self.n_ctx or n_ctx_train, n_ctx_train)


DESCRIPTIONS: Mapping[str, Description] = {one.name: one.metadata["about"] for one in fields(Settings)}
DEFAULTS: Mapping[str, Any] = {one.name: one.default for one in fields(Settings)}


# The settings under which others are the fastest: what layers may be offloaded to, and what is computed.
_OFFLOAD = (
    "devices",
    "tensor_split",
    "main_gpu",
    "rpc_servers",
    "offload_kqv",
    "type_k",
    "type_v",
    "precision",
    "vision_precision",
    "repack",
    "max_tiles",
)


def offload_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, other than the defaults, that tuned ones depend on, in a fixed order. Not n_ctx: what is
    tuned at one length is used at every length."""
    return {name: settings[name] for name in _OFFLOAD if settings.get(name, DEFAULTS[name]) != DEFAULTS[name]}


def in_options(settings: Mapping[str, Any]) -> str:
    """Settings as one types them on the command line; those without an option, and texts of files, are left
    out."""
    words = []
    for name, about in DESCRIPTIONS.items():
        if settings.get(name) in (None, ()) or about.option is None or about.option.holds:
            continue
        option, value = about.option, settings[name]
        if option.metavar:
            words += [option.names[0], about.check.show(value)]
        elif value != DEFAULTS[name]:
            words.append(option.names[0].partition("/")[0])
    return " ".join(words)


def markdown_table() -> str:
    """The table of all settings for the documentation. A flag's row names the value that the flag gives."""
    rows = [("command line", "Python", "default", "what it does"), ("---",) * 4]
    for name, about in DESCRIPTIONS.items():
        option, default = about.option, DEFAULTS[name]
        names = ", ".join(f"`{one}`" for one in option.names) if option else ""
        python = f"`{name}`"
        if option and option.metavar:
            names += f" `{option.metavar}`"
        elif option:
            python = f"`{name}={not default}`"
        if default is None:
            shown = about.none
        else:
            shown = (
                f"`{default if isinstance(default, bool) else about.check.show(default)}`"
                if default != ()
                else "none"
            )
        rows.append((names, python, shown, about.help))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


if __name__ == "__main__":
    print(markdown_table())
