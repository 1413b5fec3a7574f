"""Ollama stores for tests."""

from __future__ import annotations

from pathlib import Path

from model_server import ModelServer

from mllama_gguf.store.references import OllamaRef


def in_store(store: Path, ref: str, *parts: tuple[str, bytes]) -> list[Path]:
    """Lay a model out as Ollama does; its blobs."""
    fake = ModelServer()
    digests = fake.add_model("x", *parts)
    manifest = store / "manifests" / OllamaRef.parse(ref).path
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(fake.manifests["x"])
    (store / "blobs").mkdir(exist_ok=True)
    paths = [store / "blobs" / f"sha256-{digest}" for digest in digests]
    for path, (_, data) in zip(paths, parts, strict=True):
        path.write_bytes(data)
    return paths
