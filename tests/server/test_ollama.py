"""Ollama's API as its clients use it, with the demo model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from serving import Running, image64

QUESTION = "Describe this image."
GREEDY = {"temperature": 0}


def ask(**more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": QUESTION, "images": [image64()]}
    return {"model": "demo", "messages": [message], "options": GREEDY, **more}


def test_root_and_version(served: Running) -> None:
    assert served.get("/").text == "Ollama is running"
    assert served.get("/api/version").json() == {"version": "0.24.0"}
    with served.client() as client:
        for path in ("/", "/api/version", "/api/tags"):
            answer = client.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
        page = client.get("/", headers={"Accept": "text/html,*/*"})
        assert page.headers["content-type"].startswith("text/html") and page.headers["vary"] == "Accept"
    assert served.get("/health").json() == {"status": "ok"}


def test_tags(served: Running) -> None:
    models = served.get("/api/tags").json()["models"]
    assert [one["name"] for one in models] == ["demo:latest", "other:latest"]
    assert len({one["digest"] for one in models}) == 2
    for one in models:
        assert one["model"] == one["name"] and isinstance(one["size"], int)
        assert len(one["digest"]) == 64
        assert datetime.fromisoformat(one["modified_at"].replace("Z", "+00:00")).tzinfo
        assert one["details"]["family"] == "mllama" and one["details"]["parameter_size"] == "5.5M"


def test_a_chat_is_streamed(served: Running, expected: Callable[..., str]) -> None:
    lines = served.lines("/api/chat", ask())
    *pieces, last = lines
    text = "".join(one["message"]["content"] for one in pieces)
    assert text == expected("apple.png", QUESTION)
    assert len(pieces) > 1 and all(not one["done"] and one["model"] == "demo" for one in pieces)
    assert last["done"] and last["done_reason"] == "stop"
    assert last["message"] == {"role": "assistant", "content": ""}
    for name in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(last[name], int)
    assert last["total_duration"] >= last["eval_duration"] > 0
    assert last["prompt_eval_count"] > 5 and last["eval_count"] > len(pieces) / 2


def test_a_whole_chat_is_the_stream_together(served: Running, expected: Callable[..., str]) -> None:
    answer = served.post("/api/chat", ask(stream=False))
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    found = answer.json()
    assert found["message"]["content"] == expected("apple.png", QUESTION)
    assert found["done"] and found["eval_count"] > 0
    assert datetime.fromisoformat(found["created_at"].replace("Z", "+00:00")).year >= 2024


def test_a_body_is_json_whatever_its_type_says(served: Running) -> None:
    """curl -d writes application/x-www-form-urlencoded."""
    body = b'{"model": "demo", "prompt": "the", "stream": false, "unknown": {"x": [1]}}'
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        answer = served.post("/api/generate", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text


def test_generate_and_its_context(served: Running, expected: Callable[..., str]) -> None:
    body = {"model": "demo", "prompt": QUESTION, "images": [image64()], "options": GREEDY, "stream": False}
    first = served.post("/api/generate", body).json()
    assert first["response"] == expected("apple.png", QUESTION)
    assert all(isinstance(n, int) for n in first["context"])
    again = {**body, "images": [], "prompt": "What colour is it?", "context": first["context"]}
    second = served.post("/api/generate", again).json()
    assert second["prompt_eval_count"] > first["prompt_eval_count"] + first["eval_count"]
    assert len(second["context"]) > len(first["context"])
    # The same as a chat with these turns.
    messages = [
        {"role": "user", "content": QUESTION, "images": [image64()]},
        {"role": "assistant", "content": first["response"]},
        {"role": "user", "content": "What colour is it?"},
    ]
    chat = served.post("/api/chat", {**ask(stream=False), "messages": messages}).json()
    assert chat["message"]["content"] == second["response"]
    assert chat["prompt_eval_count"] == second["prompt_eval_count"]


def test_a_context_without_its_image_goes_on(served: Running) -> None:
    body = {"model": "demo", "prompt": QUESTION, "images": [image64()], "options": GREEDY, "stream": False}
    context = served.post("/api/generate", body).json()["context"]
    token = next(i for i, n in enumerate(context) if n == 1024)
    gone = [*context[: token + 1], *[7] * 8, *context[token + 9 :]]
    answer = served.post("/api/generate", {**body, "images": [], "prompt": "And?", "context": gone})
    assert answer.status_code == 200 and answer.json()["done"]
    for wrong in (gone[: token + 3], [5000], [-1], [1 << 40], [True], ["x"], [None]):
        answer = served.post("/api/generate", {**body, "images": [], "context": wrong})
        assert answer.status_code == 400, wrong


def test_raw(served: Running) -> None:
    body = {"model": "demo", "prompt": "a red", "raw": True, "options": GREEDY, "stream": False}
    found = served.post("/api/generate", body).json()
    assert "context" not in found and found["prompt_eval_count"] < 6
    with_image = {**body, "prompt": "[img-0] a", "images": [image64()]}
    assert served.post("/api/generate", with_image).status_code == 200
    for more in ({"system": "x"}, {"context": [1]}, {"template": "x"}):
        answer = served.post("/api/generate", {**body, **more})
        assert answer.status_code == 400
        assert answer.json() == {"error": "raw mode does not support template, system, or context"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [{"type": "function"}]}, "registry.ollama.ai/library/demo:latest does not support tools"),
        ({"think": True}, '"demo" does not support thinking'),
        ({"format": "xml"}, "invalid format"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role must be one of"),
        ({"messages": "x"}, "messages must be a list, not 'x'"),
        ({"options": {"top_k": 1.5}}, "options.top_k must be a whole number, not 1.5"),
        ({"options": {"temperature": "hot"}}, "options.temperature must be a number"),
        ({"options": []}, "options must be an object"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs must be between 0 and 20"),
        ({"keep_alive": "soon"}, "keep_alive: 'soon' is not a duration"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"model": ""}, "model is required"),
        ({"format": {"type": "nonsense"}}, "nonsense"),
    ],
)
def test_what_is_wrong_is_said(served: Running, more: dict[str, Any], words: str) -> None:
    answer = served.post("/api/chat", ask(**more))
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("application/json")
    assert words in answer.json()["error"]


def test_an_unknown_model(served: Running) -> None:
    answer = served.post("/api/chat", ask(model="llama9"))
    assert (answer.status_code, answer.json()) == (404, {"error": "model 'llama9' not found"})
    assert served.post("/api/show", {"name": "llama9"}).status_code == 404


def test_names_are_spelled_in_many_ways(served: Running) -> None:
    for name in ("demo:latest", "DEMO", "registry.ollama.ai/library/demo:latest", "library/demo"):
        found = served.post("/api/chat", ask(model=name, stream=False)).json()
        assert found["model"] == name and found["done"]


def test_values_that_clients_send(served: Running, expected: Callable[..., str]) -> None:
    """Floats for whole numbers, null, an empty format, images [] and others."""
    options = {"temperature": 0.0, "num_ctx": 8192.0, "top_k": 40.0, "top_p": None, "num_gpu": 1, "what": "x"}
    body = ask(options=options, format="", tools=[], think=False, stream=False, keep_alive="5m")
    body["messages"].insert(0, {"role": "System", "content": "", "images": []})
    answer = served.post("/api/chat", body)
    assert answer.status_code == 200, answer.text
    body = ask(options=GREEDY | {"stop": " apple"}, stream=False)
    assert " apple" not in served.post("/api/chat", body).json()["message"]["content"]
    found = served.post("/api/chat", ask(options=GREEDY | {"num_predict": 2}, stream=False)).json()
    assert (found["done_reason"], found["eval_count"]) == ("length", 2)


def test_format(served: Running) -> None:
    import json

    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    found = served.post("/api/chat", ask(format=schema, stream=False)).json()
    assert json.loads(found["message"]["content"])["colour"] in ("red", "blue")
    text = "".join(one["message"]["content"] for one in served.lines("/api/chat", ask(format=schema)))
    assert text == found["message"]["content"]


def test_seeds(served: Running) -> None:
    def texts(seed: int) -> str:
        options = {"seed": seed, "temperature": 3.0, "top_k": 0, "top_p": 1.0, "num_predict": 12}
        body = {"model": "demo", "prompt": "tell me", "options": options, "stream": False}
        return str(served.post("/api/generate", body).json()["response"])

    assert texts(0) == texts(0)
    assert len({texts(seed) for seed in range(4)}) > 1


def test_logprobs(served: Running) -> None:
    found = served.post("/api/chat", ask(logprobs=True, top_logprobs=3, stream=False)).json()
    assert len(found["logprobs"]) == found["eval_count"]
    for one in found["logprobs"]:
        assert one["logprob"] <= 0 and len(one["top_logprobs"]) == 3
        assert one["top_logprobs"][0]["token"] == one["token"]  # greedy
    *pieces, last = served.lines("/api/chat", ask(logprobs=True))
    told = [one for piece in pieces for one in piece.get("logprobs", ())]
    assert len(told) == last["eval_count"]


def test_placeholders_and_several_images(served: Running) -> None:
    two = [image64(), image64("apple-and-cat.png")]
    for content in ("[img-1] and [img-0]", "[img] and [img]", "Compare."):
        message = {"role": "user", "content": content, "images": two}
        found = served.post("/api/chat", ask(messages=[message], stream=False))
        assert found.status_code == 200, found.text
    before = {"role": "user", "content": "first", "images": two[:1]}
    after = {"role": "user", "content": QUESTION, "images": two[1:]}
    talk = [before, {"role": "assistant", "content": "yes"}, after]
    found = served.post("/api/chat", ask(messages=talk, stream=False)).json()
    assert "cat" in found["message"]["content"]


def test_the_end_of_a_reply_is_written(served: Running, expected: Callable[..., str]) -> None:
    whole = expected("apple.png", QUESTION)
    begun = {"role": "assistant", "content": whole.split(" ")[0]}
    found = served.post("/api/chat", ask(messages=[*ask()["messages"], begun], stream=False)).json()
    assert begun["content"] + found["message"]["content"] == whole


def test_load_and_unload(served: Running) -> None:
    load = {"model": "other", "messages": []}
    answer = served.post("/api/chat", load)
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["done_reason"] == "load" and answer.json()["message"]["content"] == ""
    names = [one["name"] for one in served.get("/api/ps").json()["models"]]
    assert "other:latest" in names
    assert served.post("/api/generate", {"model": "other", "keep_alive": -1}).json()["response"] == ""
    (line,) = [one for one in served.get("/api/ps").json()["models"] if one["name"] == "other:latest"]
    assert datetime.fromisoformat(line["expires_at"]).year > 2100
    assert line["context_length"] == 4096 and line["size"] > 0 and line["size_vram"] == 0
    done = served.post("/api/generate", {"model": "other", "prompt": "", "keep_alive": 0}).json()
    assert done["done_reason"] == "unload"
    for _ in range(1000):
        if "other:latest" not in [one["name"] for one in served.get("/api/ps").json()["models"]]:
            break
        time.sleep(0.02)
    else:
        raise AssertionError("still loaded")


def test_keep_alive_of_nothing_frees_after_the_reply(served: Running) -> None:
    assert served.post("/api/chat", ask(model="other", keep_alive="0s", stream=False)).status_code == 200
    # The answer is out before the model is freed.
    for _ in range(1000):
        if "other:latest" not in [one["name"] for one in served.get("/api/ps").json()["models"]]:
            return
        time.sleep(0.02)
    raise AssertionError("still loaded")


def test_show(served: Running) -> None:
    found = served.post("/api/show", {"model": "demo"}).json()
    info = found["model_info"]
    assert info["general.architecture"] == "mllama" and info["general.basename"] == "demo"
    assert info["mllama.context_length"] == 131072 and info["mllama.vision.block_count"] == 4
    assert info["general.parameter_count"] > 5e6
    assert info["tokenizer.ggml.merges"] is None
    assert found["capabilities"] == ["completion", "vision"]
    assert found["details"]["quantization_level"] == "F16"
    assert "<|start_header_id|>" in found["template"]
    assert {"name", "type", "shape"} == set(found["tensors"][0])
    more = served.post("/api/show", {"name": "demo", "verbose": True}).json()
    assert more["tensors"] == found["tensors"]


def test_slashes_too_many_change_nothing(served: Running) -> None:
    """Programs join an address that ends with a slash with a path that begins with one."""
    for path in (
        "//api/tags",
        "/api/tags/",
        "//v1/models",
        "/v1/models/",
        "/v1//models",
        "//",
        "/ui/",
        "//health",
    ):
        answer = served.get(served.url + path)
        assert answer.status_code == 200 and not answer.history, path
    body = {"model": "demo", "prompt": "x", "stream": False}
    assert served.post(served.url + "//api/generate", body).json()["done"]
    assert served.get(served.url + "//nothing").json() == {"error": "there is nothing at /nothing"}
    assert served.metric('mllama_requests_total{api="ollama",route="/api/tags",status="200"}') >= 2


def test_pull(served: Running) -> None:
    assert served.post("/api/pull", {"name": "demo", "stream": False}).json() == {"status": "success"}
    lines = served.lines("/api/pull", {"model": "demo"})
    assert lines[0] == {"status": "pulling manifest"} and lines[-1] == {"status": "success"}
    answer = served.post("/api/pull", {"model": "llama3.2-vision"})
    assert answer.status_code == 403 and "--allow-pull" in answer.json()["error"]


def test_what_is_not_served(served: Running) -> None:
    assert served.post("/api/embed", {"model": "demo", "input": "x"}).status_code == 501
    assert served.post("/api/embeddings", {}).json() == {"error": "this model does not support embeddings"}
    with served.client() as client:
        for method, path in (
            ("POST", "/api/create"),
            ("POST", "/api/copy"),
            ("POST", "/api/push"),
            ("DELETE", "/api/delete"),
            ("POST", "/api/blobs/sha256:../../etc/passwd"),
            ("HEAD", "/api/blobs/sha256:0"),
        ):
            assert client.request(method, path, content=b"{}").status_code in (404, 501), path
        assert client.get("/api/chat").status_code == 405
        assert client.get("/nothing").json() == {"error": "there is nothing at /nothing"}
    assert served.post("/api/generate", {"model": "demo", "prompt": "x", "suffix": "y"}).status_code == 400


def test_an_old_message_is_left_out(served: Running) -> None:
    talk = [{"role": "system", "content": "be short"}]
    for i in range(30):
        talk += [
            {"role": "user", "content": f"the cat the dog the tree {i}"},
            {"role": "assistant", "content": "a red apple to the left of a tree"},
        ]
    talk.append({"role": "user", "content": "and now?"})
    body = {"model": "demo", "messages": talk, "options": {**GREEDY, "num_ctx": 200, "num_predict": 3}}
    found = served.post("/api/chat", {**body, "stream": False}).json()
    assert 100 < found["prompt_eval_count"] < 200
    refused = served.post("/api/chat", {**body, "stream": False, "truncate": False})
    assert refused.status_code == 400
    assert "the input length exceeds the context length" in refused.json()["error"]
    # Also one that is too long to be counted, or to be rendered.
    for old in ([{"role": "user", "content": "a" * 300_000}], [{"role": "user", "content": "x"}] * 5001):
        talk = [*old, {"role": "assistant", "content": "x"}, {"role": "user", "content": "and now?"}]
        answer = served.post("/api/chat", {**body, "messages": talk, "stream": False})
        assert answer.is_success, answer.text


def test_never_is_a_long_time() -> None:
    from mllama_gguf.server.times import expiry, parse_duration

    assert parse_duration("-1m") == math.inf
    assert expiry(0, math.inf).startswith("2069")
