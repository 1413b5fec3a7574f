"""Ray Data on a local Ray with two actors. Needs the extra `ray`: pytest tests/ray"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
from helpers import elsewhere, noisy_image
from PIL import Image

from mllama_gguf import Mllama
from mllama_gguf.ray import MllamaCaptioner

SCRIPT = Path(__file__).parents[2] / "scripts" / "caption_ray.py"
OPTIONS = {"max_tokens": 6}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    package = elsewhere()["env"]["PYTHONPATH"]
    paths = os.pathsep.join((package, str(Path(__file__).parents[1])))  # the workers import this file
    # Two actors of one CPU each, and what the reading takes; Ray counts CPUs, it does not bind them.
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        Image.fromarray(noisy_image(i)).save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(photos: Path) -> dict[str, str]:
    """The captions that one process gives; "" for the broken image."""
    with Mllama.from_pretrained("demo", n_threads=1) as model:
        return {
            path.name: model.caption(path, **OPTIONS) if path.name != "05.png" else ""
            for path in sorted(photos.glob("*.png"))
        }


def captioned(dataset: Any, captioner: Callable[..., Any], **kwargs: Any) -> Any:
    return dataset.map_batches(
        captioner,
        fn_constructor_kwargs={"options": OPTIONS, **kwargs},
        batch_size=2,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=2),
    )


def check(rows: list[dict[str, Any]], expected: dict[str, str]) -> None:
    assert {Path(row["path"]).name: row["caption"] for row in rows} == expected
    assert len(rows) == len(expected)
    failed = [row for row in rows if row["error"]]
    assert [Path(row["path"]).name for row in failed] == ["05.png"]
    assert failed[0]["error"].startswith("ImageError: ")


class Witness(MllamaCaptioner):
    """Leaves its process's id in a folder for every batch, and takes its time."""

    def __init__(self, folder: str, **kwargs: Any) -> None:
        self._folder = Path(folder)
        (self._folder / f"{os.getpid()}.opened").touch()
        super().__init__(**kwargs)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (self._folder / f"{os.getpid()}.used").touch()
        time.sleep(0.2)
        return super().__call__(batch)


def test_two_actors_give_the_captions_of_one_process(
    cluster: None, photos: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = ray.data.read_binary_files(str(photos), include_paths=True, override_num_blocks=12)
    rows = captioned(dataset, Witness, folder=str(tmp_path), image_column="bytes").take_all()
    check(rows, expected)
    assert len(list(tmp_path.glob("*.used"))) == 2
    assert len(list(tmp_path.glob("*.opened"))) == 2  # once in each


def test_images_that_ray_decodes(
    cluster: None, photos: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    good = [str(path) for path in photos.glob("*.png") if path.name != "05.png"]
    dataset = ray.data.read_images(good, include_paths=True, mode="RGB")
    rows = captioned(dataset, MllamaCaptioner).take_all()
    found = {Path(row["path"]).name: row["caption"] for row in rows}
    assert found == {name: text for name, text in expected.items() if name != "05.png"}
    assert {row["error"] for row in rows} == {""}


def test_an_actor_that_is_killed_is_replaced(
    cluster: None, photos: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = ray.data.read_binary_files(str(photos), include_paths=True, override_num_blocks=12)
    stream = iter(captioned(dataset, Witness, folder=str(tmp_path), image_column="bytes").iter_rows())
    rows = [next(stream)]
    victim = int(next(tmp_path.glob("*.used")).stem)
    os.kill(victim, signal.SIGKILL)
    rows += stream
    check(rows, expected)
    opened = {int(path.stem) for path in tmp_path.glob("*.opened")}
    assert victim in opened
    assert len(opened) >= 3


def test_the_script(photos: Path, expected: dict[str, str], tmp_path: Path) -> None:
    args = [str(photos), "--out", str(tmp_path / "out"), "--actors", "1", "--max-tokens", "6"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args], **elsewhere(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3, done.stderr
    assert "24 images, 1 failed" in done.stderr
    rows = [json.loads(line) for path in (tmp_path / "out").iterdir() for line in path.open()]
    check(rows, expected)


def test_arrays_of_other_shapes(tmp_path: Path) -> None:
    rgb = noisy_image(3)
    grey = rgb[:, :, :1]
    alpha = np.concatenate([rgb, np.full_like(grey, 255)], axis=2)
    batch: dict[str, Any] = {"image": [rgb, grey, grey[:, :, 0], alpha, None]}
    out = MllamaCaptioner(options=OPTIONS)(batch)
    with Mllama.from_pretrained("demo") as model:
        wanted = [model.caption(rgb, **OPTIONS), model.caption(Image.fromarray(grey[:, :, 0]), **OPTIONS)]
    assert list(out["caption"]) == [wanted[0], wanted[1], wanted[1], wanted[0], ""]
    assert list(out["error"]) == ["", "", "", "", "ImageError: no image: the row is empty"]
