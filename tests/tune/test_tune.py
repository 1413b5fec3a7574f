"""Tuning with real processes, some of which crash; what is kept of it; comparing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyFiles, elsewhere, noisy_image, without_rights
from PIL import Image

from mllama_gguf import MllamaError, RequestError
from mllama_gguf.cli.main import run
from mllama_gguf.store.resolve import BUNDLED
from mllama_gguf.tune.compare import compare
from mllama_gguf.tune.process import PointFailed, run_point
from mllama_gguf.tune.saved import config_path, key_of, read_tuned, write_tuned
from mllama_gguf.tune.search import Point, Range, Results, Task, draw_plot, tune

Captured = pytest.CaptureFixture[str]
Files = Callable[[str], TinyFiles]
BASE = {"n_gpu_layers": 0, "vision_device": "auto", "n_threads": 1, "n_batch": 64, "flash_attn": True}
DEMO = BUNDLED["demo"]
APPLE = Path(__file__).parents[2] / "examples" / "apple.png"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(noisy_image(1)).save(path)
    return path


@pytest.fixture
def task(image: Path) -> Task:
    fixed = {"n_ctx": 256}
    return Task(DEMO, None, image, "What is it?", 3, 1, fixed, timeout=60, function="crashing:measure")


def calls(task: Task) -> list[str]:
    return (task.image.parent / "calls.txt").read_text().split()


CHOICE = Range(BASE, n_layer=4, others={"flash_attn": [True, False], "n_batch": [64, 128]})


def test_a_sweep_survives_crashes_and_goes_on_where_it_was(task: Task, tmp_path: Path) -> None:
    heard: list[tuple[Point, int, int]] = []
    task = replace(task, timeout=5)
    results = Results(tmp_path / "out", task)
    best = tune(task, CHOICE, results, lambda *args: heard.append(args))
    assert not best.error
    assert best.total == sum(best.seconds[name] for name in ("encode", "prompt", "decode"))
    assert set(best.tokens_per_second) == {"prompt", "decode"}
    assert best.memory["CPU"] > 10_000_000 and best.rss > 30_000_000
    assert best.caption
    errors = {p.settings["n_gpu_layers"]: p.error for p in results.points if p.error}
    assert errors[2].startswith("killed by SIGABRT")
    assert errors[4] == "not done after 5 s"
    assert {p.settings["n_gpu_layers"] for p in results.points} >= {0, 1, 2, 4, 5}
    assert {p.settings["flash_attn"] for p in results.points} == {True, False}
    assert [done for _, done, _ in heard] == list(range(1, len(heard) + 1))
    assert all(done <= total for _, done, total in heard)
    assert heard[-1][1] == heard[-1][2]

    n_calls = len(calls(task))
    assert n_calls == len(results.points)
    again = Results(tmp_path / "out", task)
    assert again.recommended == best.settings
    assert tune(task, CHOICE, again) == best
    assert len(calls(task)) == n_calls  # nothing was measured twice

    rows = list(csv.DictReader((tmp_path / "out" / "tune.csv").open()))
    assert len(rows) == n_calls
    assert {row["n_gpu_layers"] for row in rows if row["error"]} == {str(n) for n in errors}
    assert all(
        float(row["decode_seconds"]) > 0 and int(row["memory_CPU"]) > 0 for row in rows if not row["error"]
    )


def test_an_interrupted_sweep_keeps_what_it_has(task: Task, tmp_path: Path) -> None:
    def interrupt(point: Point, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(task, replace(CHOICE, n_layer=0), Results(tmp_path, task), interrupt)
    kept = Results(tmp_path, task)
    assert len(kept.points) == 2
    tune(task, replace(CHOICE, n_layer=0), kept)
    assert len(calls(task)) == len(kept.points) == 3


def test_what_is_given_is_measured_once(task: Task, tmp_path: Path) -> None:
    heard: list[tuple[Point, int, int]] = []
    choice = Range(BASE, 0, {"flash_attn": [True], "n_batch": [64]})
    assert choice.is_empty and not CHOICE.is_empty and not replace(choice, n_layer=4).is_empty
    assert not Range(BASE, 0, {"n_batch": [128]}).is_empty
    best = tune(task, choice, Results(tmp_path, task), lambda *args: heard.append(args))
    assert [(done, total) for _, done, total in heard] == [(1, 1)]
    assert best.settings == BASE and len(calls(task)) == 1


def test_results_of_another_task_are_not_mixed(task: Task, tmp_path: Path) -> None:
    Results(tmp_path, task).add(Point(dict(BASE), error="x"))
    with pytest.raises(RequestError, match="another model, image"):
        Results(tmp_path, replace(task, prompt="What?"))
    assert Results(tmp_path, replace(task, prompt="What?"), fresh=True).points == []
    (tmp_path / "tune.json").write_text('{"version": 1, "key": "", "points": [3]}')
    with pytest.raises(RequestError, match=r"cannot be read.*--fresh"):
        Results(tmp_path, task)


@pytest.mark.parametrize(
    "values", [{"settings": {}}, {"settings": []}, {"seconds": {}}, {"seconds": []}, {"memory": 3}]
)
def test_a_damaged_file_of_results(task: Task, tmp_path: Path, values: dict[str, Any]) -> None:
    seconds = dict.fromkeys(("load", "encode", "prompt", "decode"), 1.0)
    Results(tmp_path, task).add(Point(dict(BASE), seconds))
    assert Results(tmp_path, task).points == [Point(dict(BASE), seconds)]
    file = tmp_path / "tune.json"
    content = json.loads(file.read_text())
    content["points"][0].update(values)
    file.write_text(json.dumps(content))
    with pytest.raises(RequestError, match=r"results that cannot be read: .*, or --fresh"):
        Results(tmp_path, task)


def test_nothing_works(task: Task, tmp_path: Path) -> None:
    choice = Range({**BASE, "n_gpu_layers": 2}, 0, {})
    with pytest.raises(MllamaError, match=r"no setting works.*SIGABRT"):
        tune(task, choice, Results(tmp_path, task))


def test_the_errors_of_a_point_are_words(task: Task) -> None:
    point = replace(task, function="mllama_gguf.tune.search:measure_caption").measure_point(
        {**BASE, "n_batch": 0}
    )
    assert point.error == "n_batch must be a whole number from 1 to 8192, not 0"
    with pytest.raises(PointFailed, match=r"exit code 1: .*no_such"):
        run_point("no_such:thing", {}, 20)


@pytest.mark.parametrize("title", ["a title", "p$^_$.png", os.fsdecode(b"\xff.png"), "a\nb"])
def test_plot(tmp_path: Path, title: str) -> None:
    seconds = dict.fromkeys(("load", "encode", "prompt", "decode"), 1.0)
    points = [
        Point({**BASE, "n_gpu_layers": n}, seconds, {}, {"CPU": 2**20, "RPC0": n * 2**20}) for n in (4, 0)
    ]
    points.append(Point({**BASE, "n_gpu_layers": 2}, error="crashed"))
    draw_plot(points, tmp_path / "plot.png", title)
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG" and plot.width > 500
        assert len(set(plot.convert("RGB").resize((100, 100)).tobytes())) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


# ---- what is kept ------------------------------------------------------------------------------------------


def test_the_command_writes_what_caption_uses(tmp_path: Path, capsys: Captured) -> None:
    image = APPLE  # a clear case: its caption is the same with and without flash attention
    out = tmp_path / "out"
    args = ["tune", str(image), "-n", "2", "--repeats", "1", "-c", "256", "-t", "1", "-o", str(out)]
    assert run([*args, "-b", "64"]) == 0
    shown, progress = capsys.readouterr()
    assert "Best: -ngl 0 --vision-device auto -t 1 -b 64 -fa o" in shown
    assert "1/" in progress
    assert {path.name for path in out.iterdir()} == {"tune.json", "tune.csv", "tune.png"}
    recommended = json.loads((out / "tune.json").read_text())["recommended"]
    assert recommended["n_batch"] == 64
    assert read_tuned(lambda: key_of([DEMO], {})) == recommended

    assert run(["caption", str(image), "-n", "2"]) == 0
    text, err = capsys.readouterr()
    assert err.startswith("Tuned settings: -ngl 0 --vision-device auto -t 1 -b 64 -fa o")
    assert err.count("\n") == 1
    assert run(["caption", str(image), "-n", "2", "--no-tuned"]) == 0
    assert capsys.readouterr() == (text, "")
    assert run(["caption", str(image), "-n", "2", "-b", "32", "-fa", "on"]) == 0
    assert capsys.readouterr().err.startswith("Tuned settings: -ngl 0 --vision-device auto -t 1 (")


def test_everything_given_is_one_point_that_is_not_kept(tmp_path: Path, capsys: Captured) -> None:
    args = ["tune", str(APPLE), "-n", "2", "--repeats", "1", "-o", str(tmp_path / "out")]
    assert run([*args, "-ngl", "0", "--vision-device", "cpu", "-t", "1", "-b", "64", "-fa", "on"]) == 0
    shown, progress = capsys.readouterr()
    assert progress.splitlines()[-1].startswith("1/1  -ngl 0 --vision-device cpu -t 1 -b 64 -fa on: ")
    assert "Nothing was varied: every setting is given." in shown
    assert not config_path().exists()


def test_every_caption_encodes_its_image(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image cache of the user, on or off, is not asked."""
    kept = tmp_path / "images"
    monkeypatch.setenv("MLLAMA_IMAGE_CACHE", str(kept))
    monkeypatch.setenv("MLLAMA_IMAGE_CACHE_SIZE", "100 MB")
    task = Task(DEMO, None, image, "What is it?", 2, 2, {"n_ctx": 256})
    assert task.measure_point(BASE).error == ""
    request = {"model": str(DEMO), "mmproj": None, "image": str(image), "prompt": "", "max_tokens": 2}
    (answer,) = compare([0], {**request, "settings": {"n_ctx": 256}})
    assert answer.error == ""
    assert not kept.exists()


def test_tuned_settings_reach_the_model(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    seen: list[dict[str, Any]] = []

    class Spy(MllamaError):
        pass

    def mllama(*args: Any, **settings: Any) -> None:
        seen.append(settings)
        raise Spy("seen")

    write_tuned(key_of([DEMO], {}), {**BASE, "n_batch": 77, "n_threads": 2}, {})
    monkeypatch.setattr("mllama_gguf.model.Mllama", mllama)
    run(["caption", str(image)])
    run(["caption", str(image), "-t", "1"])
    run(["caption", str(image), "-ngl", "3", "--no-tuned"])
    others = ("--no-kv-offload", "-ctk q8_0", "-ctv f32", "--precision exact", "--repack", "--max-tiles 1")
    for options in others:  # tuned for other devices, or other work
        run(["caption", str(image), *options.split()])
    run(["caption", str(image), "-ctk", "f16", "--precision", "fast", "--no-repack", "-c", "128"])
    names = ("n_gpu_layers", "n_threads", "n_batch")
    expected = [(0, 2, 77), (0, 1, 77), (3, None, 512), *[("auto", None, 512)] * len(others), (0, 2, 77)]
    assert [tuple(s[name] for name in names) for s in seen] == expected
    capsys.readouterr()


def test_another_model_is_not_tuned(image: Path, tiny_files: Files, capsys: Captured) -> None:
    write_tuned(key_of([DEMO], {}), BASE, {})
    assert run(["caption", str(image), "-n", "1", "-m", str(tiny_files("gqa").one)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting"),
        ("[]", "not a file of version"),
        ('{"version": 1, "tuned": []}', "'tuned' is not an object"),
        (
            '{"version": 1, "tuned": {"KEY": {"settings": {"n_batch": "many"}}}}',
            "n_batch must be a whole",
        ),
        ('{"version": 1, "tuned": {"KEY": {"settings": {"n_threads": 0}}}}', "n_threads is 0"),
        (
            '{"version": 1, "tuned": {"KEY": {"settings": {"colour": 1}}}}',
            "'colour' is not a setting",
        ),
        ('{"version": 1, "tuned": {"KEY": 5}}', "settings are not an object"),
    ],
)
def test_a_bad_config_file_is_ignored_with_a_warning(
    image: Path, content: str, why: str, capsys: Captured
) -> None:
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(content.replace("KEY", key_of([DEMO], {})))
    assert run(["caption", str(image), "-n", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert err.startswith("Warning: ") and err.count("\n") == 1
    assert why in err and "tuned.json is ignored" in err


def test_a_wrong_model_is_no_fault_of_the_config_file(image: Path, capsys: Captured) -> None:
    write_tuned("a", BASE, {})
    assert run(["caption", str(image), "-m", "nosuch"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: nosuch: no such file") and said.count("\n") == 1


def test_the_config_file_keeps_other_models(tmp_path: Path) -> None:
    write_tuned("a", BASE, {"model": "a.gguf"})
    write_tuned("b", {**BASE, "n_batch": 8}, {})
    assert read_tuned(lambda: "a") == BASE
    assert read_tuned(lambda: "b")["n_batch"] == 8
    assert read_tuned(lambda: "c") == {}
    with pytest.raises(ValueError, match="n_batch must be a whole"):
        write_tuned("a", {"n_batch": 0}, {})
    assert [path.name for path in config_path().parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    ("content", "why"),
    [('{"version": 2, "tuned": {"a": {}}}', "version 1"), ('{"version": 1, "tuned": [3]}', "not an object")],
)
def test_a_config_file_that_cannot_be_read_stays(
    image: Path, content: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """That is said before anything is measured."""
    monkeypatch.setattr("mllama_gguf.tune.search.tune", None)
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(content)
    assert run(["tune", str(image), "-o", str(image.parent / "out")]) == 1
    said = capsys.readouterr().err
    assert why in said and "move it away, or use --no-save" in said and said.count("\n") == 1
    with pytest.raises(RequestError, match=r"tuned\.json: .*the settings there would be lost"):
        write_tuned("a", BASE, {})
    assert config_path().read_text() == content
    config_path().write_text("")
    write_tuned("a", BASE, {})


# ---- comparing ---------------------------------------------------------------------------------------------


def test_compare_marks_differences_and_crashes(image: Path) -> None:
    request = {
        "model": os.fspath(DEMO),
        "mmproj": None,
        "image": os.fspath(image),
        "prompt": "Describe this image.",
        "max_tokens": 3,
        "settings": {"n_ctx": 256},
    }
    same, crashed, other, again = compare([0, 1, 2, 3], request, function="crashing:compute")
    assert len(same.vision) == 10 and len(same.top) == 5 and same.caption
    assert [logit for _, logit in same.top] == sorted((logit for _, logit in same.top), reverse=True)
    assert crashed.error.startswith("killed by SIGABRT")
    assert other.differences(same) == {"vision 0", "caption"}
    assert again.differences(same) == crashed.differences(same) == set()


def test_the_scripts_run(image: Path, tmp_path: Path) -> None:
    scripts = Path(__file__).parents[2] / "scripts"
    options = ["--layers", "0,0", "-n", "2", "-c", "256", "--json", str(tmp_path / "c.json")]
    command = [sys.executable, str(scripts / "compare_offload.py"), str(image), *options]
    done = subprocess.run(command, **elsewhere(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "c.json").read_text())
    assert rows[0] == rows[1] and rows[0]["differs"] == []
    assert f"{rows[0]['vision'][0]:.5f}" in done.stdout and rows[0]["caption"] in done.stdout


@pytest.mark.parametrize("content", [b"", b"my notes\n", b"GGUF", bytes(100)])
def test_what_is_no_image_is_refused_before_anything_is_measured(
    content: bytes, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "notes").write_bytes(content)
    assert run(["tune", str(tmp_path / "notes"), "-m", "demo", "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and said.count("\n") == 1 and "notes" in said
    assert not (tmp_path / "out").exists()


def test_an_image_in_a_closed_folder(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with without_rights():
        assert run(["tune", str(tmp_path / "closed" / "a.png"), "-o", str(tmp_path / "out")]) == 1
    (tmp_path / "closed").chmod(0o755)
    assert capsys.readouterr().err.endswith("closed/a.png: Permission denied\n")


def test_the_settings_are_kept_though_the_plot_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(*_: object) -> None:
        raise MllamaError("cannot write tune.png: the disk is full")

    monkeypatch.setattr("mllama_gguf.tune.search.draw_plot", fail)
    args = ["-n", "2", "--repeats", "1", "-c", "256", "-t", "1", "-b", "64", "-o", str(tmp_path / "out")]
    assert run(["tune", str(APPLE), *args]) == 1
    assert "Error: cannot write tune.png" in capsys.readouterr().err
    assert read_tuned(lambda: key_of([DEMO], {}))["n_batch"] == 64
