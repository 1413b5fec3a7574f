"""What the manifest of an Ollama model says about its use: read, checked, obeyed, never dropped silently."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import elsewhere
from model_server import ModelServer, serve

from mllama_gguf import Mllama, ModelError
from mllama_gguf.cli.main import run
from mllama_gguf.inspect.inventory import inventory
from mllama_gguf.store.defaults import Defaults
from mllama_gguf.store.manifest import MEDIA_TYPE, parse_manifest
from mllama_gguf.store.ollama import OllamaModel, find, list_models
from mllama_gguf.store.parameters import is_llama_template, read_messages, read_params
from mllama_gguf.store.pull import pull
from mllama_gguf.store.references import OllamaRef
from mllama_gguf.store.resolve import BUNDLED, resolve
from mllama_gguf.text.chat import LLAMA_3_2_TEMPLATE

Captured = pytest.CaptureFixture[str]
DEMO = BUNDLED["demo"].read_bytes()
EXAMPLE = Path(__file__).parents[2] / "examples" / "apple.png"
CONFIG = {
    "model_format": "gguf",
    "model_family": "mllama",
    "model_families": ["mllama"],
    "model_type": "10.7B",
    "file_type": "Q4_K_M",
}
LIBRARY_TEMPLATE = """{{- range $index, $_ := .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}
{{- if gt (len (slice $.Messages $index)) 1 }}<|eot_id|>
{{- else if ne .Role "assistant" }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{{ end }}
{{- end }}"""
MODELFILE_TEMPLATE = """{{ if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}{{ if .Prompt }}<|start_header_id|>user<|end_header_id|>

{{ .Prompt }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

{{ .Response }}<|eot_id|>"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for each test."""
    for name in ("MLLAMA_MODEL", "MLLAMA_MMPROJ", "MLLAMA_LOCK", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("MLLAMA_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(
    name: str = "ollama:m", *, folder: str = "manifests", host: str | None = None, **layers: Any
) -> OllamaRef:
    """Lay the demo model out as Ollama does, with more layers by kind: bytes, str or JSON; a list of them for
    several layers."""
    store = Path(os.environ["OLLAMA_MODELS"])
    ref = OllamaRef.parse(name)
    server = ModelServer()
    parts = [("model", DEMO)]
    for kind, value in layers.items():
        many = value if kind == "license" else [value]
        for one in many:
            data = (
                one if isinstance(one, bytes) else (one if isinstance(one, str) else json.dumps(one)).encode()
            )
            parts.append((kind, data))
    server.add_model("x", *parts)
    manifest = json.loads(server.manifests["x"])
    config = json.dumps(CONFIG).encode()
    manifest["config"] = {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": f"sha256:{server.add_blob(config)}",
        "size": len(config),
    }
    path = store / folder / (host or ref.host) / ref.namespace / ref.name / ref.tag
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest))
    (store / "blobs").mkdir(exist_ok=True)
    for digest, data in server.blobs.items():
        (store / "blobs" / f"sha256-{digest}").write_bytes(data)
    return ref


def blob(data: bytes | str) -> Path:
    data = data.encode() if isinstance(data, str) else data
    return Path(os.environ["OLLAMA_MODELS"]) / "blobs" / f"sha256-{hashlib.sha256(data).hexdigest()}"


# ---- what a manifest says ----------------------------------------------------------------------------------


def test_everything_is_read() -> None:
    ref = put(
        params={"temperature": 0.6, "top_p": 0.9, "num_ctx": 512.0},
        template=LIBRARY_TEMPLATE,
        system="Be short.",
        messages=[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}],
        license=["one", "two"],
    )
    model = find(ref)
    assert model is not None
    assert model.params == {"temperature": 0.6, "top_p": 0.9, "num_ctx": 512}
    assert (model.system, model.licenses, model.has_known_template) == ("Be short.", ("one", "two"), True)
    assert [m["content"] for m in model.messages] == ["hello", "yes"]
    assert (model.family, model.families, model.format) == ("mllama", ("mllama",), "gguf")
    assert (model.parameter_size, model.quantization_level) == ("10.7B", "Q4_K_M")
    assert model.capabilities == ("completion", "vision")
    assert model.digest == hashlib.sha256(model.path.read_bytes()).hexdigest()
    assert model.modified == pytest.approx(model.path.stat().st_mtime)
    layers = json.loads(model.path.read_text())
    assert model.size == sum(x["size"] for x in (*layers["layers"], layers["config"])) > len(DEMO)
    assert [m.ref for m in list_models()] == [ref]
    files = resolve("ollama:m")
    assert files.parameters == {"n_ctx": 512}
    assert files.defaults.options == {"temperature": 0.6, "top_p": 0.9}
    assert files.ollama == model


def test_the_template_of_the_library() -> None:
    assert len(LIBRARY_TEMPLATE) == 269
    assert hashlib.sha256(LIBRARY_TEMPLATE.encode()).hexdigest().startswith("715415638c9c")
    spaced = MODELFILE_TEMPLATE.replace("{{ .Prompt }}", "{{.Prompt}}").replace("{{ end }}", "{{- end }}")
    for known in (LIBRARY_TEMPLATE, MODELFILE_TEMPLATE, spaced, LIBRARY_TEMPLATE + "\n"):
        assert is_llama_template(known)
    for other in (
        "{{ .Prompt }}",
        LIBRARY_TEMPLATE.replace("<|eot_id|>", "<|im_end|>"),
        MODELFILE_TEMPLATE.replace("{{ .System }}", "Be rude. {{ .System }}"),
        "",
    ):
        assert not is_llama_template(other)


def test_a_known_template_replaces_the_files() -> None:
    put("ollama:known", template=LIBRARY_TEMPLATE)
    put("ollama:none")
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with Mllama("ollama:known") as known, Mllama("ollama:none") as none:
        shown = known._shared.template.render(messages).text
        assert "<|start_header_id|>system<|end_header_id|>\n\nx<|eot_id|>" in shown
        assert shown != none._shared.template.render(messages).text or shown  # the demo's may say the same
    assert find(OllamaRef.parse("known")).defaults.llama_template  # type: ignore[union-attr]
    with Mllama("ollama:known", chat_template="{{ messages[0].content }}!") as other:
        assert other._shared.template.render(messages).text == "x!"
    assert "add_generation_prompt" in LLAMA_3_2_TEMPLATE


def test_a_template_of_its_own_is_said(capsys: Captured) -> None:
    put(template="{{ .Prompt }} by me")
    assert run(["caption", str(EXAMPLE), "-m", "ollama:m"]) == 0
    said = capsys.readouterr()
    assert said.out == "a red apple\n"
    assert said.err.count("has a Go template of its own, which is not read") == 1
    put("ollama:known", template=MODELFILE_TEMPLATE)
    assert run(["caption", str(EXAMPLE), "-m", "ollama:known"]) == 0
    assert capsys.readouterr().err == ""


def test_manifest_over_default_and_request_over_manifest(capsys: Captured) -> None:
    put(params={"num_predict": 2, "stop": ["apple"], "num_ctx": 300})
    with Mllama("ollama:m") as model:
        assert model.n_ctx == 300
        assert model.caption(EXAMPLE) == "a red"
        done = model.create_chat_completion([{"role": "user", "content": "Hello"}])
        assert done["usage"]["completion_tokens"] <= 2
        assert model.caption(EXAMPLE, max_tokens=50, stop=None) == "a red apple"
    with Mllama("ollama:m", n_ctx=4096) as model:  # the default, but asked for
        assert model.n_ctx == 4096
    with Mllama.from_pretrained("ollama:m", n_ctx=1000) as model:
        assert (model.n_ctx, model.caption(EXAMPLE)) == (1000, "a red")
    assert run(["caption", str(EXAMPLE), "-m", "ollama:m"]) == 0
    said = capsys.readouterr()
    assert said.out == "a red\n"
    assert said.err == (
        "ollama:m:latest brings: stop ('apple',), max_tokens 2 (options of the command line replace them)\n"
    )
    assert run(["caption", str(EXAMPLE), "-m", "ollama:m", "-n", "1"]) == 0
    assert capsys.readouterr().out == "a\n"
    assert run(["caption", str(EXAMPLE), "-m", "ollama:m", "--out", "x.jsonl"]) == 0
    assert json.loads(Path("x.jsonl").read_text())["caption"] == "a red"


def test_temperature_and_seed_of_the_manifest() -> None:
    put(params={"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "num_predict": 12})
    with Mllama("ollama:m") as model:
        wild = model.caption(EXAMPLE)
        assert wild != "a red apple"
        assert model.caption(EXAMPLE) == wild
        assert model.caption(EXAMPLE, seed=4) != wild
        assert model.caption(EXAMPLE, temperature=0) == "a red apple"


def test_system_and_messages() -> None:
    image = base64.b64encode(EXAMPLE.read_bytes()).decode()
    put(
        system="Be short.",
        messages=[
            {"role": "USER", "content": "What?", "images": [image]},
            {"role": "assistant", "content": "a red apple"},
        ],
    )
    seen: list[str] = []
    with Mllama("ollama:m") as model:
        render = model._shared.template.render

        def spy(messages: Any, **more: Any) -> Any:
            done = render(messages, **more)
            seen.append(done.text)
            return done

        model._shared.template.render = spy  # type: ignore[method-assign]
        assert model.caption(EXAMPLE, max_tokens=3)
        model.create_chat_completion(
            [{"role": "system", "content": "Mine."}, {"role": "user", "content": "?"}]
        )
        model.create_chat_completion([{"role": "system", "content": ""}, {"role": "user", "content": "?"}])
    assert seen[0].index("Be short.") < seen[0].index("What?") < seen[0].index("Describe this image.")
    assert seen[0].count("<|image|>") == 2
    assert "Be short." not in seen[1] and seen[1].index("Mine.") < seen[1].index("What?")
    assert "system" not in seen[2] and "What?" in seen[2]


def test_precede() -> None:
    own = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    asked = [{"role": "user", "content": "?"}]
    assert Defaults().precede(asked) is asked
    assert Defaults(messages=own).precede(asked) == [*own, *asked]
    system = {"role": "system", "content": "s"}
    assert Defaults(system="s", messages=own).precede(asked) == [system, *own, *asked]
    theirs = {"role": "developer", "content": "t"}
    assert Defaults(system="s", messages=own).precede([theirs, *asked]) == [theirs, *own, *asked]
    for broken in ("text", 5, None, [], ["x"]):
        assert Defaults(system="s").precede(broken) is broken


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        "drews54/Llama3.2-Vision-abliterated",
        "Drews54/llama3.2-vision-ABLITERATED:LATEST",
        "registry.ollama.ai/drews54/llama3.2-vision-abliterated",
        "ollama.com/drews54/Llama3.2-vision-abliterated:latest",
        "https://ollama.com/drews54/Llama3.2-Vision-abliterated",
    ],
)
def test_names_ignore_case(asked: str) -> None:
    put("ollama:drews54/llama3.2-Vision-abliterated")
    assert resolve(f"ollama:{asked}").text == blob(DEMO)


def test_tags_hosts_and_exact_names_first() -> None:
    for tag in ("11b", "90b", "latest"):
        put(f"ollama:llama3.2-vision:{tag}", system=tag)
        assert resolve(f"ollama:llama3.2-vision:{tag.upper()}").defaults.system == tag
    assert resolve("ollama:Llama3.2-Vision").defaults.system == "latest"
    put("ollama:hf.co/me/Model-GGUF:Q4_K_M", system="hub")
    assert resolve("ollama:hf.co/me/model-gguf:q4_k_m").defaults.system == "hub"
    put("ollama:a/same", system="lower")
    put("ollama:a/SAME", system="upper")
    assert resolve("ollama:a/SAME").defaults.system == "upper"
    assert resolve("ollama:a/same").defaults.system == "lower"
    assert resolve("ollama:a/Same").defaults.system in ("lower", "upper")
    with pytest.raises(ModelError, match="is not on this machine"):
        resolve("ollama:llama3.2-vision:1b")


def test_the_store_of_newer_versions() -> None:
    put("ollama:new", folder="manifests-v2", host="ollama.com", system="new")
    path = Path("ollama/manifests-v2/ollama.com/library/new/latest")
    moved = blob(path.read_bytes())
    path.rename(moved)
    path.symlink_to(os.path.relpath(moved, path.parent))
    assert resolve("ollama:NEW").defaults.system == "new"
    assert str(find(OllamaRef.parse("new")).ref) == "ollama:new:latest"  # type: ignore[union-attr]
    put("ollama:new", system="old")  # left from before
    assert resolve("ollama:new").defaults.system == "new"
    assert [found.name for found in inventory()] == ["demo", "ollama:new:latest"]


def test_lists_of_manifests() -> None:
    put("ollama:m", system="gguf")
    path = Path("ollama/manifests/registry.ollama.ai/library/m/latest")
    inner = path.read_bytes()
    blob(inner).write_bytes(inner)
    others = [
        {"runner": "mlx", "format": "safetensors", "digest": "sha256:" + "a" * 64},
        {"runner": "llamacpp", "format": "gguf", "digest": f"sha256:{hashlib.sha256(inner).hexdigest()}"},
    ]
    path.write_text(
        json.dumps({"mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": others})
    )
    assert resolve("ollama:m").defaults.system == "gguf"
    others.pop()
    path.write_text(json.dumps({"manifests": others}))
    with pytest.raises(ModelError, match="none of which is a GGUF model"):
        resolve("ollama:m")
    for broken in ({"manifests": 5}, {"manifests": [5]}, {"manifests": [{"runner": "ollama"}]}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ModelError, match="latest"):
            resolve("ollama:m")


def test_every_name_is_listed(capsys: Captured) -> None:
    """As `ollama list` does, also two names of one model."""
    put("ollama:a")
    put("ollama:b", system="other")
    put("ollama:a:11b")
    assert [found.name for found in inventory()] == [
        "demo", "ollama:a:11b", "ollama:a:latest", "ollama:b:latest",
    ]  # fmt: skip


# ---- what is refused ---------------------------------------------------------------------------------------


def test_an_adapter_is_refused(capsys: Captured) -> None:
    put(adapter=b"x" * 1000)
    assert run(["caption", str(EXAMPLE), "-m", "ollama:m"]) == 1
    said = capsys.readouterr()
    assert "has an adapter layer (LoRA) of 1.0 kB, which this package does not apply" in said.err
    assert said.err.count("\n") == 1 and said.out == ""
    assert run(["models"]) == 0
    assert "ollama:m:latest" in (out := capsys.readouterr().out) and "cannot be used" in out
    with serve() as server:
        server.add_model("library/m/1", ("model", b"weights"), ("adapter", b"x"))
        with pytest.raises(ModelError, match="adapter layer"):
            pull(f"ollama:{server.address}/library/m:1")
        assert server.gets("blobs") == []


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "is list, not an object"),
        (b'{"temperature": NaN}', "NaN is not a number"),
        (b'{"top_p": 1e999}', "its parameter top_p = inf is not a number"),
        (b'{"temperature": "0.6"}', "its parameter temperature = '0.6' is not a number"),
        (b'{"temperature": true}', "temperature = True is not a number"),
        (b'{"top_k": 1.5}', "top_k = 1.5 is not a whole number"),
        (b'{"num_ctx": [1]}', "num_ctx = .* is not a whole number"),
        (b'{"seed": 1e300}', "seed = .* is not a whole number"),
        (b'{"stop": [1]}', "stop = .* is not a list of strings"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff", "is not JSON"),
    ],
)
def test_hostile_parameters(params: bytes, words: str, capsys: Captured) -> None:
    put(params=params)
    with pytest.raises(ModelError, match=words):
        resolve("ollama:m")
    assert run(["caption", str(EXAMPLE), "-m", "ollama:m"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and said.count("\n") == 1 and blob(params).name in said


def test_parameters_in_their_plain_form() -> None:
    words = b'{"temperature": null, "top_k": 40.0, "stop": "x", "seed": 5, "num_gpu": 1, "min_p": -1}'
    assert read_params(words, "m") == {"top_k": 40, "stop": ["x"], "seed": 5, "num_gpu": 1, "min_p": -1.0}
    put(params={"temperature": -1, "top_k": -5, "top_p": 7, "num_predict": -2, "num_ctx": 0, "seed": -1})
    files = resolve("ollama:m")
    assert files.defaults.options == {"temperature": 0, "top_k": 0, "top_p": 1, "max_tokens": None}
    assert files.parameters == {}


def test_what_has_no_effect_is_said(capsys: Captured) -> None:
    put(params={"repeat_penalty": 1.3, "mirostat": 0, "num_thread": 4, "colour\x1b[31m": 1})
    assert run(["caption", str(EXAMPLE), "-m", "ollama:m"]) == 0
    said = capsys.readouterr()
    assert said.out == "a red apple\n"
    assert "parameters without effect here: repeat_penalty, colour\\x1b[31m\n" in said.err


@pytest.mark.parametrize(
    "messages",
    [
        b"{}",
        b"[5]",
        b'[{"content": "x"}]',
        b'[{"role": "<|eot_id|>", "content": "x"}]',
        b'[{"role": "user", "content": 5}]',
        b'[{"role": "user", "images": "x"}]',
        b'[{"role": "user", "images": ["/etc/passwd"]}]',
        b'[{"role": "user", "images": [5]}]',
        b"[" + b'{"role":"user"},' * 1000 + b'{"role":"user"}]',
    ],
)
def test_hostile_messages(messages: bytes) -> None:
    with pytest.raises(ModelError, match=r"^m: "):
        read_messages(messages, "m")


def test_layers_that_are_too_large() -> None:
    def manifest(kind: str, size: int) -> bytes:
        layers = [
            {"mediaType": MEDIA_TYPE + name, "digest": "sha256:" + "a" * 64, "size": n}
            for name, n in (("model", 5), (kind, size))
        ]
        return json.dumps({"layers": layers}).encode()

    assert parse_manifest(manifest("params", 32), "m").layers[0].kind == "params"
    for kind in ("params", "system", "template", "license", "messages"):
        with pytest.raises(ModelError, match=f"^m: its {kind} layer has {1 << 40} bytes"):
            parse_manifest(manifest(kind, 1 << 40), "m")
    put(license=["words"] * 20)
    assert resolve("ollama:m").ollama.licenses == ("words",)  # read once
    put(license=["words"] * 21)
    with pytest.raises(ModelError, match=r"m/latest: 21 layers beside the weights; 20 are the most"):
        resolve("ollama:m")
    put(system="short")
    blob("short").write_bytes(b"x" * 5000)  # another size than the manifest says: not that blob
    assert resolve("ollama:m").defaults.system == ""


def test_a_system_message_that_is_not_utf8() -> None:
    put(system=b"\xff\xfe\xfd")
    with pytest.raises(ModelError, match="its system layer is not UTF-8"):
        resolve("ollama:m")


def test_layers_that_are_not_here(capsys: Captured) -> None:
    put(system="Be short.", license=["x"])
    blob("Be short.").unlink()
    blob("x").unlink()
    assert run(["caption", str(EXAMPLE), "-m", "ollama:m"]) == 0
    assert (
        "its system is not on this machine; fetch it: mllama pull ollama:m:latest" in capsys.readouterr().err
    )
    put("ollama:n", tensor=b"x")
    assert run(["caption", str(EXAMPLE), "-m", "ollama:n"]) == 0
    assert f"layers of unknown kinds, which are not read: '{MEDIA_TYPE}tensor'" in capsys.readouterr().err


# ---- pull, and elsewhere -----------------------------------------------------------------------------------


def test_pull_fetches_the_small_layers() -> None:
    with serve() as server:
        layers = [("model", DEMO), ("params", b'{"num_predict": 2}'), ("system", b"Be short.")]
        server.add_model("library/m/1", *layers)
        files = pull(f"ollama:{server.address}/library/m:1")
        assert (files.defaults.system, files.defaults.options) == ("Be short.", {"max_tokens": 2})
        assert len(server.gets("blobs")) == 3
        pull(f"ollama:{server.address}/library/m:1")
        assert len(server.gets("blobs")) == 3


def test_a_blobs_path_is_the_weights_alone() -> None:
    put(params={"num_predict": 1})
    with Mllama(blob(DEMO)) as model:
        assert model.caption(EXAMPLE) == "a red apple"
    assert resolve(str(blob(DEMO))).defaults == Defaults()


def test_the_python_interface_says_what_has_no_effect() -> None:
    put(template="{{ .Prompt }}")
    code = "import mllama_gguf; mllama_gguf.Mllama('ollama:m').close()"
    done = subprocess.run(
        [sys.executable, "-c", code], **elsewhere(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stderr.count("Go template of its own") == 1
    with pytest.warns(UserWarning, match=r"^ollama:m:latest: has a Go template of its own") as seen:
        Mllama("ollama:m").close()
    assert seen[0].filename == __file__


def test_a_model_of_another_kind_is_listed_only_by_the_store() -> None:
    put("ollama:m")
    assert all(isinstance(model, OllamaModel) for model in list_models())


def test_system_and_template_on_the_command_line(home: Path, capsys: Captured) -> None:
    put(system="Be short.")
    Path("t.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('S: ' + m.content) }}{% endif %}{% endfor %}{{ raise_exception('no system') }}"
    )
    command = ["caption", str(EXAMPLE), "-m", "ollama:m", "--chat-template", "t.jinja"]
    for more, words in (
        ([], "S: Be short"),
        (["--system", "Mine."], "S: Mine"),
        (["--system", ""], "no system"),
    ):
        assert run([*command, *more]) == 1
        assert f"refuses the messages: {words}" in capsys.readouterr().err
    assert run(["caption", str(EXAMPLE), "--chat-template", "none"]) == 1
    assert (
        capsys.readouterr().err
        == "Error: none: the chat template cannot be read: No such file or directory\n"
    )
    assert run(["caption", str(EXAMPLE), "--system", ""]) == 0
    assert capsys.readouterr().out == "a red apple\n"
