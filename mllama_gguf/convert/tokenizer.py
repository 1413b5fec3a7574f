"""Read tokenizer.json and the small JSON files beside it, without the tokenizers package."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..reading import read_text
from ..words import brief
from .checkpoint import Checkpoint, is_text, read_json
from .shape import Shape

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<|image|>"

# Split pattern of Llama 3's tokenizer (tokenizer.json, pre_tokenizer), which llama.cpp knows as "llama-bpe".
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer as GGUF stores it."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    add_bos: bool
    special: dict[str, int]  # bos, eos, eot, eom, padding: token ids
    eos_ids: list[int]
    chat_template: str | None


_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type


def read_tokenizer(checkpoint: Checkpoint, shape: Shape) -> Tokenizer:
    """Read tokenizer.json and the small JSON files beside it."""
    file = checkpoint.directory / "tokenizer.json"
    data = read_json(file)
    model = data.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
    ):
        raise ModelError(f"{file}: model.type: only a BPE vocabulary is supported")
    tokens, types = _vocabulary(file, data, _n_tokens(file, data, checkpoint, shape), shape.image_token_id)
    settings = checkpoint.json("tokenizer_config.json")
    special, eos_ids = _special_tokens(file, checkpoint, settings, tokens)
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = _template_adds(data.get("post_processor"), tokens[special["bos"]])
    if not model.get("ignore_merges", False):
        logger.info(
            "%s: model.ignore_merges is off, llama.cpp always treats llama-bpe as if it were on", file
        )
    return Tokenizer(
        pre=_pre_tokenizer(file, data.get("pre_tokenizer")),
        tokens=tokens,
        types=types,
        merges=_merges(file, model),
        add_bos=add_bos,
        special=special,
        eos_ids=eos_ids,
        chat_template=_chat_template(checkpoint, settings),
    )


def _vocabulary(
    file: Path, data: Mapping[str, Any], n_tokens: int, image_token_id: int
) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types. Ids without a token get one of their own."""
    tokens: list[str | None] = [None] * n_tokens
    types = [_UNUSED] * n_tokens

    def put(token: object, i: object, kind: int) -> None:
        if not is_text(token) or isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n_tokens:
            raise ModelError(
                f"{file}: token {brief(token)} has id {brief(i)}: an id up to {n_tokens - 1} is expected"
            )
        if tokens[i] not in (None, token):
            raise ModelError(f"{file}: tokens {brief(tokens[i])} and {brief(token)} have the same id {i}")
        tokens[i], types[i] = token, kind

    for token, i in data["model"]["vocab"].items():
        put(token, i, _NORMAL)
    for entry in _list(file, "added_tokens", data.get("added_tokens")):
        if not isinstance(entry, dict):
            raise ModelError(f"{file}: added_tokens: an object is expected, not {brief(entry)}")
        put(entry.get("content"), entry.get("id"), _CONTROL if entry.get("special", True) else _USER_DEFINED)
    other = tokens[image_token_id]
    if other not in (None, IMAGE_TOKEN):
        raise ModelError(
            f"{file}: token {image_token_id} is {brief(other)}: the configuration says {IMAGE_TOKEN!r}"
        )
    tokens[image_token_id], types[image_token_id] = IMAGE_TOKEN, _CONTROL
    names = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(names)}
    if len(ids) != n_tokens:
        double = next(token for i, token in enumerate(names) if ids[token] != i)
        raise ModelError(f"{file}: token {brief(double)} occurs twice")
    return names, types


def _list(file: Path, where: str, value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise ModelError(f"{file}: {where}: a list is expected, not {brief(value)}")
    return value or []


def _merges(file: Path, model: Mapping[str, Any]) -> list[str]:
    merges = []
    for merge in _list(file, "model.merges", model.get("merges")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(is_text(s) and s and " " not in s for s in pair)
        ):
            raise ModelError(f"{file}: merge {brief(merge)}: a pair of byte-level tokens is expected")
        merges.append(f"{pair[0]} {pair[1]}")
    return merges


def _special_tokens(
    file: Path, checkpoint: Checkpoint, settings: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[dict[str, int], list[int]]:
    """The ids of special tokens by their role, and of all tokens that end a text."""
    ids = {token: i for i, token in enumerate(tokens)}
    named = (settings, checkpoint.json("special_tokens_map.json"))
    generation = checkpoint.json("generation_config.json")
    text_config = checkpoint.config["text_config"]

    def token_id(role: str) -> int | None:
        for section in named:
            value = section.get(f"{role}_token")
            content = value.get("content") if isinstance(value, dict) else value
            if content is not None:
                if not isinstance(content, str) or content not in ids:
                    raise ModelError(
                        f"{checkpoint.directory}: {role}_token {brief(content)} is not in {file.name}"
                    )
                return ids[content]
        for section in (generation, checkpoint.config, text_config):
            value = section.get(f"{role}_token_id")
            value = value[-1] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < len(tokens):
                return value
        return None

    found = {
        "bos": token_id("bos"),
        "eos": token_id("eos"),
        "eot": ids.get("<|eot_id|>"),
        "eom": ids.get("<|eom_id|>"),
        "padding": token_id("pad"),
    }
    special = {role: i for role, i in found.items() if i is not None}
    if "bos" not in special or "eos" not in special:
        raise ModelError(f"{checkpoint.directory}: tokenizer_config.json: bos_token or eos_token is missing")
    ends = generation.get("eos_token_id", text_config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    eos_ids = {i for i in ends if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(tokens)}
    return special, sorted({*eos_ids, special["eos"]})


def _n_tokens(file: Path, data: Mapping[str, Any], checkpoint: Checkpoint, shape: Shape) -> int:
    """How many tokens there are: the vocabulary, the image token, and what a fine-tune has added after them,
    as far as the embedding has rows. Raises ModelError for an id without a row."""
    least = shape.vocab_size + 1
    embed = checkpoint.sources.get("language_model.model.embed_tokens.weight")
    rows = max(least, embed.shape[0] if embed is not None and embed.shape else 0)
    added = data.get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    ids = [(entry.get("content"), entry.get("id")) for entry in entries]
    beyond = [(token, i) for token, i in ids if isinstance(i, int) and i >= rows]
    if beyond:
        token, i = beyond[0]
        raise ModelError(
            f"{file}: token {brief(token)} has id {brief(i)}: an id up to {rows - 1} is expected "
            f"(embed_tokens has {rows} rows)"
        )
    return max([least, *(i + 1 for _, i in ids if isinstance(i, int) and not isinstance(i, bool))])


def _parts(node: object, key: str) -> list[dict[str, Any]]:
    """The members of a tokenizers' Sequence, or the one that is there."""
    if not isinstance(node, dict):
        return []
    members = node.get(key) if node.get("type") == "Sequence" else [node]
    return [m for m in members if isinstance(m, dict)] if isinstance(members, list) else []


def _template_adds(post_processor: object, token: str) -> bool:
    for part in _parts(post_processor, "processors"):
        single = part.get("single") if part.get("type") == "TemplateProcessing" else None
        first = single[0] if isinstance(single, list) and single else None
        if isinstance(first, dict) and isinstance(first.get("SpecialToken"), dict):
            return bool(first["SpecialToken"].get("id") == token)
    return False


def _pre_tokenizer(file: Path, node: object) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    parts = _parts(node, "pretokenizers")
    if any(part.get("type") == "ByteLevel" for part in parts):
        splits = [part.get("pattern") for part in parts if part.get("type") == "Split"]
        if splits == [{"Regex": LLAMA3_SPLIT}]:
            return "llama-bpe"
        if not splits and any(part.get("use_regex", True) for part in parts):
            return "gpt-2"
    raise ModelError(f"{file}: pre_tokenizer: only Llama 3's and GPT-2's are supported")


def _chat_template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str | None:
    """The chat template: the processor's own file first, as transformers does."""
    path = checkpoint.directory / "chat_template.jinja"
    if path.exists():
        try:
            return read_text(path)
        except (OSError, UnicodeDecodeError) as e:
            raise ModelError(f"{path}: cannot be read: {e}") from e
    for file, template in (
        ("chat_template.json", checkpoint.json("chat_template.json").get("chat_template")),
        ("tokenizer_config.json", settings.get("chat_template")),
    ):
        if isinstance(template, list):  # named templates
            named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default", next(iter(named.values()), None))
        if isinstance(template, str) and template:
            if not is_text(template):
                raise ModelError(f"{checkpoint.directory / file}: chat_template has half of a character")
            return template
    return None
