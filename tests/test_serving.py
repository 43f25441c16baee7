"""The server as clients see it: OpenAI's own client and plain HTTP, over real sockets."""

import concurrent.futures
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import fastapi
import openai
import pytest
import schemathesis
import serve as bench
import served
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from openai.types.chat import ChatCompletion

from sirius_ext import Engine, SiriusConfig
from sirius_ext.cli.serve import listen
from sirius_ext.engine import prepare
from sirius_ext.serving import run
from sirius_ext.serving.app import Options, create_app
from sirius_ext.serving.guard import is_loopback
from sirius_ext.serving.scheduler import Scheduler

TOKENIZER = served.tokenizer()
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def scheduler():
    made = Scheduler(Engine(served.model(), served.CONFIG, TOKENIZER))
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(scheduler):
    with served.running(scheduler) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def by_heart():
    """A client of a model that knows a text with more than ASCII in it."""
    made = Scheduler(Engine(served.learned(), served.CONFIG, TOKENIZER))
    with served.running(made, max_tokens=200) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60)
    made.close()


def send(address, path, body=None, method=None, **headers):
    """Status and text of a plain request."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=60)
    data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
    found = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method or ("GET" if body is None else "POST"), path, data, found)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def refusal(address, body, path="/v1/chat/completions", **headers):
    status, text = send(address, path, body, **headers)
    error = json.loads(text)["error"]
    assert error["message"] and error["type"]
    return status, error["param"], error["message"]


def chat_body(**more):
    return {"model": served.NAME, "messages": HELLO, **more}


def chat(client, **settings):
    return client.chat.completions.create(model=served.NAME, messages=HELLO, **settings)


def alone(scheduler, prompt, count, config=None):
    """What the engine says without a server. prompt: a text, or messages."""
    made = TOKENIZER(prompt) if isinstance(prompt, str) else TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True)
    ids = torch.tensor([made["input_ids"]])
    out = scheduler.engine.generate(ids, config=config, max_new_tokens=count, do_sample=False)
    return TOKENIZER.decode(out.sequences[0, ids.shape[1] :])


# ------------------------------------------------------------------------------------------------------------- completions


def test_a_chat(client, scheduler):
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.message.content == alone(scheduler, HELLO, 40) and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.logprobs is None
    prompt = len(TOKENIZER.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"])
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 40, prompt + 40)
    assert answer.model == served.NAME and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_a_chat_as_it_comes(client):
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    *chunks, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 40
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert len(chunks) > 8, "it came in pieces"


def test_texts(client, scheduler):
    prompts = ["the inner", "another there"]
    expected = [alone(scheduler, prompt, 12) for prompt in prompts]
    answer = client.completions.create(model=served.NAME, prompt=prompts, max_tokens=12, n=2)
    assert [choice.text for choice in answer.choices] == [expected[0]] * 2 + [expected[1]] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.usage.completion_tokens == 48
    assert answer.usage.prompt_tokens == sum(len(TOKENIZER(prompt).input_ids) for prompt in prompts)
    ids = client.completions.create(model=served.NAME, prompt=TOKENIZER(prompts[0]).input_ids, max_tokens=12)
    assert ids.choices[0].text == expected[0] and ids.object == "text_completion"
    texts = ["", ""]
    for chunk in client.completions.create(model=served.NAME, prompt=prompts, max_tokens=12, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_unicode_across_tokens(by_heart):
    """Every character comes whole, streamed or not, in text, in tokens and in bytes."""
    begun, rest = served.TEXT[:6], served.TEXT[6:]
    answer = by_heart.completions.create(model=served.NAME, prompt=begun, logprobs=0)
    assert answer.choices[0].text == rest and answer.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].text for chunk in by_heart.completions.create(model=served.NAME, prompt=begun, stream=True)]
    assert "".join(pieces) == rest and not any("\ufffd" in piece for piece in pieces)
    for stop in ("🎉", "👩‍🔬", "é", "﷽"):
        for stream in (False, True):
            found = by_heart.completions.create(model=served.NAME, prompt=begun, stop=stop, stream=stream)
            text = "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text
            assert text == rest[: rest.index(stop)]


def test_stop_strings(client):
    whole = chat(client).choices[0].message.content
    for place in range(0, 30, 4):
        stop = whole[place : place + 5]
        answer = chat(client, stop=["\x00", stop])
        assert answer.choices[0].message.content == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
        chunks = list(chat(client, stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


def test_seeds(client):
    hot = {"temperature": 1.5, "top_p": 0.95, "extra_body": {"top_k": 40}, "n": 3}
    texts = [[choice.message.content for choice in chat(client, seed=seed, **hot).choices] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3
    plain = chat(client, temperature=0).choices[0].message.content
    assert plain not in texts[0] and chat(client, temperature=0, seed=5).choices[0].message.content == plain
    one_token = chat(client, temperature=1, extra_body={"top_k": 1}).choices[0].message.content
    assert one_token == plain


def test_what_is_not_used_is_named_with_what_does_not_use_it(address):
    """As the command line does it."""
    asked = {"mode": "sirius", "threshold": 0.5}
    message = "sirius.threshold: it is not used with mode 'sirius', sparsity 'csparse', accept 'match'"
    assert refusal(address, chat_body(sirius=asked))[2] == message
    message = "sirius.period: it is not used with mode 'sparse', sparsity 'fsparse'"
    assert refusal(address, chat_body(sirius={"mode": "sparse", "sparsity": "fsparse", "period": 8}))[2] == message
    assert refusal(address, chat_body(sirius={"mode": "full", "period": 8}))[2].endswith("it is not used with mode 'full'")


def test_what_clients_send_whatever_they_want(client):
    """Beside a temperature of 0, or none, what says how to draw leaves the likeliest tokens as they are."""
    plain = chat(client).choices[0].message.content
    for more in ({"top_p": 1, "seed": 1}, {"temperature": 0, "top_p": 0.9, "seed": 1, "extra_body": {"top_k": 40}}):
        assert chat(client, frequency_penalty=0, presence_penalty=0, n=1, **more).choices[0].message.content == plain
    used = {"mode": "sirius", "period": 3, "accept": "threshold", "threshold": 0, "follow": False, "lookup": False}
    assert chat(client, extra_body={"top_k": 0, "sirius": used}).choices[0].message.content


def test_logprobs(client, scheduler):
    """F's own: of every token, beside the likeliest; the greedy text is made of the likeliest."""
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=20)
    content = answer.choices[0].logprobs.content
    assert len(content) == 20 and bytes(sum((each.bytes for each in content), [])).decode() == answer.choices[0].message.content
    for each in content:
        assert len(each.top_logprobs) == 3 and each.top_logprobs[0].token == each.token
        assert each.top_logprobs[0].logprob == each.logprob < 0
    chunks = list(chat(client, logprobs=True, max_tokens=20, stream=True))
    streamed = [each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [(each.token, each.logprob) for each in streamed] == [(each.token, each.logprob) for each in content]
    old = client.completions.create(model=served.NAME, prompt="the", max_tokens=9, logprobs=2).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == len(old.text_offset) == 9
    assert all(len(each) == 2 for each in old.top_logprobs) and old.text_offset[0] == 0


def test_offsets_while_text_is_held_back(client):
    """Because a stop string may begin in it: tokens are where they are in the text, and not in what was given out of it."""
    asked = {"model": served.NAME, "prompt": "hello", "logprobs": 0, "max_tokens": 30}
    choice = client.completions.create(**asked).choices[0]
    for first in range(3, 20):
        stop = choice.text[first : first + 6] + "\n"
        chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stop=stop, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        offsets = [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset


def test_settings_of_a_request(client, scheduler):
    """Whatever the mode, `match` and `full` are one text; and a trace says where it comes from."""
    config = SiriusConfig(mode="sparse", density=0.4)
    sparse = chat(client, extra_body={"sirius": {"mode": "sparse", "trace": True}})
    assert sparse.choices[0].message.content == alone(scheduler, HELLO, 40, config)
    full = chat(client, extra_body={"sirius": {"mode": "full"}}).choices[0].message.content
    asked = {"period": 7, "tree_width": 2, "accept": "match", "trace": True}
    answer = chat(client, extra_body={"sirius": asked})
    assert answer.choices[0].message.content == full
    trace = answer.sirius["choices"][0]
    tokens = trace["tokens"]
    assert "".join(token["text"] for token in tokens) == full and {token["source"] for token in tokens} == {"draft", "full"}
    assert all(token["logprob"] <= 0 for token in tokens)
    replaced = [token for token in tokens if "replaced" in token]
    assert replaced and all(token["replaced"]["logprob"] <= token["logprob"] for token in replaced)
    assert trace["stats"]["average_advance_length"] > 1 and trace["stats"]["tokens"] == 40


def test_a_prompt_is_read_once(client):
    long = [{"role": "user", "content": "the other thing " * 25}]
    answers = [client.chat.completions.create(model=served.NAME, messages=long, max_tokens=4) for _ in range(2)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in answers] == [0, 256]


def test_ten_clients_at_once(client, scheduler):
    """Each gets the text that it gets alone."""
    prompts = [f"the thing number {number} " * (1 + number) for number in range(10)]
    expected = [alone(scheduler, prompt, 30 + 3 * number) for number, prompt in enumerate(prompts)]

    def ask(number):
        stream = client.completions.create(
            model=served.NAME, prompt=prompts[number], max_tokens=30 + 3 * number, stream=number % 2 == 0
        )
        return "".join(chunk.choices[0].text for chunk in stream) if number % 2 == 0 else stream.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert list(pool.map(ask, range(10))) == expected


# ----------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 422, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 422, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 422, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 422, "max_completion_tokens"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"temperature": 2.5}, 422, "temperature"),
        ({"top_p": 0}, 422, "top_p"),
        ({"n": 99}, 422, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 422, "stop"),
        ({"stop": ""}, 422, "stop"),
        ({"top_logprobs": 2}, 422, "top_logprobs"),
        ({"stream_options": {}}, 422, "stream_options"),
        ({"presence_penalty": 0.5}, 422, "presence_penalty"),
        ({"tools": [{}]}, 422, "tools"),
        ({"what": 1}, 422, "what"),
        ({"sirius": {"density": 0.1}}, 422, "sirius.density"),
        ({"sirius": {"period": 999}}, 422, "sirius.period"),
        ({"sirius": {"period": 200, "tree_width": 16}}, 400, "sirius.tree_width"),
        ({"sirius": {"prune": True}}, 400, "sirius.prune"),
        ({"sirius": {"accept": "sample"}}, 400, "sirius.accept"),
        ({"sirius": {"accept": "match"}, "temperature": 1}, 400, "sirius.accept"),
        ({"sirius": {"lookup": True}, "temperature": 1}, 400, "sirius.lookup"),
        ({"sirius": {"mode": "full", "threshold": 0.5}}, 400, "sirius.threshold"),
        ({"sirius": {"mode": "full", "tree_width": 3}}, 400, "sirius.tree_width"),
        ({"sirius": {"mode": "full", "sparsity": "csparse"}}, 400, "sirius.sparsity"),
        ({"sirius": {"mode": "sparse", "period": 8}}, 400, "sirius.period"),
        ({"sirius": {"mode": "full", "accept": "match"}, "temperature": 1}, 400, "sirius.accept"),
        ({"sirius": {"sparsity": "fsparse", "follow": False}}, 400, "sirius.follow"),
        ({"sirius": {"threshold": 0.5}}, 400, "sirius.threshold"),  # the server's rule is match
        ({"sirius": {"accept": "threshold", "threshold": 0.5}, "temperature": 1}, 400, "sirius.accept"),
        ({"sirius": {"threshold": 0.5}, "temperature": 1}, 400, "sirius.threshold"),
        ({"top_k": 5}, 400, "top_k"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured(address, more, status, param):
    """By the field's name."""
    found = refusal(address, chat_body(**more))
    assert found[:2] == (status, param) and found[2].startswith(param.split(".")[0])


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("", {"prompt": ""}, 'prompt: expected a text, token ids, or a list of up to 16 of either, none of them empty, got ""'),
        ("", {"prompt": [1, "a"]}, 'prompt: expected a text, token ids, or a list of up to 16 .*, got [1, "a"]'),
        ("", {"suffix": "x"}, 'suffix: expected "", since text is only continued, got "x"'),
        ("", {"echo": True}, "echo: expected false, got true"),
        ("", {"frequency_penalty": 0.7}, "frequency_penalty: expected 0, since penalties are not supported, got 0.7"),
        ("", {"logit_bias": {"5": 1}}, 'logit_bias: expected {}, since biases are not supported, got {"5": 1}'),
        ("", {"stop": ["a"] * 5}, 'stop: expected a string of 1 to 256 characters, or a list of up to 4 of them, got ["a", .*]'),
        ("", {"max_tokens": "4"}, 'max_tokens: expected an integer, got "4"'),
        ("", {"n": 0}, "n: expected at least 1, got 0"),
        ("", {"user": 7 * 10**90}, "user: expected a string, got 7" + 56 * "0" + "..."),
        ("", {"what": 1}, "what: this server does not know or support it; /openapi.json has all fields"),
        ("", {"what-is": 1}, '"what-is": this server does not know or support it; /openapi.json has all fields'),
        ("", {"\ud800": 1}, 'body: expected Unicode, of which no surrogate is a part by itself, got "\\ud800"'),
        ("", {"sirius": {"density": 1}}, "sirius.density: this server does not .*; expected some of mode, sparsity, .*, trace"),
        ("", {"sirius": {"period": 0}}, 'sirius.period: expected an integer, 1 to 256, or "auto", got 0'),
        ("", {"sirius": 5}, "sirius: expected an object with some of mode, sparsity, .*, got 5"),
        ("chat/", {"tools": [{}]}, "tools: expected [], since tools are not supported, got [{}]"),
        ("chat/", {"messages": []}, "messages: expected a length of at least 1, got []"),
        ("chat/", {"messages": [{"role": "user"}]}, "messages.0.content: it is missing"),
        ("chat/", {"response_format": {"type": "json"}}, "response_format.type: expected 'text', got \"json\""),
    ],
    ids=str,
)
def test_what_is_supported_is_said_in_plain_words(address, path, more, message):
    body = {**(chat_body() if path else {"model": served.NAME, "prompt": "hello"}), **more}
    status, _, found = refusal(address, body, f"/v1/{path}completions")
    assert status == 422 and re.fullmatch(re.escape(message).replace(r"\.\*", ".*"), found), found


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/embeddings", 404, "/v1/embeddings: there is no such endpoint; /openapi.json has all of them"),
        ("GET", "/v1/embeddings", 404, "/v1/embeddings: there is no such endpoint; /openapi.json has all of them"),
        ("POST", "/v1/completions/", 404, "/v1/completions/: there is no such endpoint; /openapi.json has all of them"),
        ("GET", "/no.js", 404, "/no.js: there is no such endpoint; /openapi.json has all of them"),
        ("GET", "/v1/completions", 405, "/v1/completions: expected POST, got GET"),
        ("POST", "/v1/models", 405, "/v1/models: expected GET, got POST"),
        ("DELETE", f"/v1/models/{served.NAME}", 405, f"/v1/models/{served.NAME}: expected GET, got DELETE"),
        ("PUT", "/page.js", 405, "/page.js: expected GET or HEAD, got PUT"),
    ],
)
def test_endpoints_that_are_none(address, method, path, status, message):
    found, text = send(address, path, method=method)
    error = json.loads(text)["error"]
    assert found == status and error == {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def test_the_page_is_at_its_root(address):
    assert send(address, "/") == send(address, "/index.html") and "<title>Sirius</title>" in send(address, "/")[1]
    assert send(address, "/", method="HEAD") == (200, "")
    assert {send(address, f"/{name}")[0] for name in ("page.js", "style.css", "icon.svg")} == {200}


def test_more_tokens_than_the_context_has(address):
    body = {"model": served.NAME, "prompt": [5] * (served.CONTEXT - 9), "max_tokens": 10**6}
    status, text = send(address, "/v1/completions", body)
    found = json.loads(text)
    assert status == 200 and found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == served.CONTEXT


def test_bodies_that_are_none(address):
    assert refusal(address, "{")[0] == 422 and refusal(address, b"\xff\xfe{}")[0] in (400, 422)
    assert refusal(address, "[]")[0] == 422 and refusal(address, "null")[0] == 422
    assert refusal(address, json.dumps(chat_body()), Content_Type="text/plain")[0] == 422
    assert refusal(address, {"model": served.NAME, "prompt": [9999]}, "/v1/completions")[:2] == (400, "prompt")
    assert refusal(address, {"model": served.NAME, "prompt": []}, "/v1/completions")[0] == 422


def test_no_token_of_a_client_is_padding(address, scheduler):
    """Wherever the model's pad token is in a prompt."""
    own = scheduler.engine.model.generation_config
    own.pad_token_id = 7
    try:
        body = {"model": served.NAME, "prompt": [7, 5, 7, 9], "max_tokens": 3}
        status, text = send(address, "/v1/completions", body)
        assert status == 200 and json.loads(text)["usage"]["prompt_tokens"] == 4
    finally:
        own.pad_token_id = None


def test_a_body_is_limited(scheduler):
    with served.running(scheduler, most_bytes=2000) as address:
        large = json.dumps(chat_body(user="x" * 4000))
        assert refusal(address, large)[0] == 413
        # Without a length, in chunks.
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=60)
        connection.request(
            "POST", "/v1/chat/completions", iter([large[:1000].encode(), large[1000:].encode()]),
            {"Content-Type": "application/json"}, encode_chunked=True,
        )  # fmt: skip
        assert connection.getresponse().status == 413
        assert send(address, "/v1/chat/completions", chat_body(max_tokens=1))[0] == 200


def test_a_key(scheduler):
    with served.running(scheduler, api_key="secret") as address:
        for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer sécret"}):
            assert refusal(address, chat_body(), **{k: v.encode("latin-1") for k, v in shown.items()})[0] == 401
            assert send(address, "/metrics", **{k: v.encode("latin-1") for k, v in shown.items()})[0] == 401
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        assert right.models.list().data[0].id == served.NAME
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0).models.list()
        assert send(address, "/health")[0] == send(address, "/")[0] == 200


def test_a_key_under_another_path(scheduler):
    """As where Ray Serve is told a route_prefix: the paths that need the key begin after it."""
    app = fastapi.FastAPI()
    app.mount("/here", create_app(scheduler, Options(served.NAME, api_key="secret")))
    with TestClient(app) as client:
        for path in ("/here/v1/models", "/here/metrics", "/here/v1/sirius"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.post("/here/v1/chat/completions", json=chat_body()).status_code == 401
        assert client.get("/here/health").status_code == 200


def test_without_a_key_only_this_machine(address):
    """No page of another host may have its own name point here."""
    assert send(address, "/health", Host="elsewhere.example:8000")[0] == 403
    assert send(address, "/health", Host="localhost:1")[0] == send(address, "/health", Host="[::1]:80")[0] == 200
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "a.example")] == [
        True, True, True, False, False, False, False
    ]  # fmt: skip


def slow(address):
    """Long answers of which the first has begun: their stream."""
    body = chat_body(stream=True, max_tokens=400, n=16, sirius={"period": 1})
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    return response


@pytest.fixture
def signalled(monkeypatch):
    """A scheduler, its server's address and thread, and what a signal to end does."""
    made = Scheduler(Engine(served.model(), served.CONFIG, TOKENIZER))
    servers = []
    listener = listen("127.0.0.1", 0)
    init = run._Server.__init__
    monkeypatch.setattr(run._Server, "__init__", lambda self, *all: (servers.append(self), init(self, *all))[1])
    addresses = queue.Queue()
    thread = threading.Thread(target=run.serve, args=(made, Options(served.NAME), listener, addresses.put), daemon=True)
    thread.start()
    yield made, addresses.get(timeout=60), thread, lambda: servers[0].handle_exit(signal.SIGINT, None)
    made.close()


def test_the_second_signal_ends_texts(signalled):
    """The first one lets them go on; a stream says that it was cut."""
    made, address, thread, end = signalled
    response = slow(address)
    end()
    _when(lambda: made.stopping, "the first signal was not heard")
    assert made.alive
    end()
    assert "[DONE]" not in (rest := response.read().decode()) and "the server was stopped" in rest
    thread.join(60)
    assert not thread.is_alive() and not made.alive


def test_the_second_signal_ends_what_clients_keep_open(signalled):
    """A body that does not come to its end has no answer that could."""
    made, address, thread, end = signalled
    with socket.create_connection(urllib.parse.urlsplit(address).netloc.split(":")) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b'Content-Length: 100\r\n\r\n{"model"')
        assert send(address, "/health")[0] == 200
        end()
        thread.join(1)
        assert thread.is_alive(), "the rest of the body may come"
        end()
        thread.join(20)
    assert not thread.is_alive() and not made.alive


def take_time(scheduler, monkeypatch):
    """Of its model: so that texts last until something else has happened."""
    model = prepare(scheduler.engine.model)
    compute = model.compute
    monkeypatch.setattr(model, "compute", lambda *asked: (time.sleep(0.005), compute(*asked))[1])


def test_a_full_queue(monkeypatch):
    made = Scheduler(Engine(served.model(), served.CONFIG, TOKENIZER), running=1, waiting=0)
    take_time(made, monkeypatch)
    model = prepare(made.engine.model)
    compute, may_go_on = model.compute, threading.Event()
    may_go_on.set()
    monkeypatch.setattr(model, "compute", lambda *asked: (may_go_on.wait(60), compute(*asked))[1])
    with served.running(made) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        stream = chat(client, stream=True, max_tokens=400, extra_body={"sirius": {"trace": True}})
        next(iter(stream))
        may_go_on.clear()  # the text lasts until the other was refused, however long that takes
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client, max_tokens=1)
        may_go_on.set()
        assert caught.value.code == "queue_full" and caught.value.response.headers["Retry-After"]
        stream.close()
        assert "sirius_refused_total 1.0" in send(address, "/metrics")[1]
    made.close()


# --------------------------------------------------------------------------------------------------------------- leaving


def _when(condition, what):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture
def unhurried(scheduler, monkeypatch):
    take_time(scheduler, monkeypatch)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(address, scheduler, unhurried, stream):
    """Its texts end, whether they were streamed or not, and whether they had begun or not."""
    before = scheduler.totals.ended["cancelled"]
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc)
    body = chat_body(max_tokens=400, n=6, stream=stream)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    _when(lambda: scheduler.running == 4 and scheduler.waiting == 2, "they have not begun")
    connection.sock.close()
    connection.close()
    _when(lambda: scheduler.idle, "they go on without a client")
    assert scheduler.totals.ended["cancelled"] - before == 6
    assert json.loads(send(address, "/health")[1]) == {"status": "ok"}


# ---------------------------------------------------------------------------------------------------- health, metrics, models


def test_models(client, address):
    assert [model.id for model in client.models.list()] == [served.NAME] and client.models.retrieve(served.NAME).id == served.NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    config = json.loads(send(address, "/v1/sirius")[1])["config"]
    assert config["period"] == 4 and "thresholds" not in config


def test_metrics(client, address):
    def metric(name):
        text = send(address, "/metrics")[1]
        return float(re.search(rf"^sirius_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    tokens, texts = metric("tokens_total"), metric('texts_total{finish="length"}')
    chat(client, max_tokens=17)
    assert metric("tokens_total") == tokens + 17 and metric('texts_total{finish="length"}') == texts + 1
    assert metric("queue") == metric("running") == 0 and metric("average_advance_length") >= 1
    assert 0 <= metric("corrected_fraction") < 1 and metric("tokens_per_second") > 0 and metric("caches") > 0
    counted = metric("first_token_seconds_count")
    assert counted == metric('first_token_seconds_bucket{le="+Inf"}') > 0


def test_answers_are_what_openai_says_they_are(address):
    status, text = send(address, "/v1/chat/completions", chat_body(logprobs=True, top_logprobs=1, n=2, max_tokens=3))
    assert status == 200 and len(ChatCompletion.model_validate_json(text, strict=True).choices) == 2


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_its_own_description(address, path, mode):
    """Whatever is sent, by the description or against it: an answer of the description's, never a fault of the server's."""
    operation = schemathesis.openapi.from_url(f"{address}/openapi.json")[path]["POST"]

    @given(operation.as_strategy(mode))
    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    def run(case):
        if isinstance(case.body, dict) and "model" in case.body and mode == schemathesis.GenerationMode.POSITIVE:
            case.body |= {"model": served.NAME, "max_tokens": 1, "max_completion_tokens": 1}
            case.body = {name: case.body[name] for name in case.body if "chat" in path or name != "max_completion_tokens"}
        response = case.call()
        assert response.status_code in (200, 400, 404, 413, 422, 429), response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    run()


def test_the_benchmark_counts_what_comes(address, scheduler):
    before = scheduler.totals.tokens
    found = bench.measure(address, served.NAME, clients=3, tokens=7, first=0)
    assert found["clients"] == 3 and scheduler.totals.tokens - before == 21
    assert found["first_token_seconds"] > 0 and found["tokens_per_second"] > 0


# -------------------------------------------------------------------------------------------------- a process of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.save(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def process(folder):
    """`sirius serve` of that folder, and its address. The last test ends it."""
    options = ["--port", "0", "--period", "4", "--accept", "match", "--threads", "1", "--max-tokens", "400"]
    command = [sys.executable, "-m", "sirius_ext", "serve", "--model", str(folder), *options]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    lines = iter(started.stderr)
    address = next(line for line in lines if "http" in line).split()[-1]
    yield started, address
    started.kill()
    started.wait()
    started.stderr.close()


def test_hundreds_of_requests_take_no_more_memory(process):
    """Of prompts of all lengths, each of which would otherwise leave something behind."""
    started, address = process
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=60)

    def memory():
        with open(f"/proc/{started.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def ask(number):
        body = {"model": served.NAME, "prompt": [1 + number % 250] * (1 + 7 * number % 250), "max_tokens": 1}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()

    for number in range(500):  # each length twice: before, torch and malloc take some more
        ask(number)
    before = memory()
    for number in range(500, 750):
        ask(number)
    assert memory() - before < 2 << 20


def test_sigterm_lets_answers_end(process):  # the last one
    """Those that have begun or wait; new ones are told 503. Then the process ends, with status 0."""
    started, address = process
    assert served.NAME in send(address, "/v1/models")[1]
    responses = [slow(address) for _ in range(4)]
    started.send_signal(signal.SIGTERM)
    _when(lambda: send(address, "/health")[0] == 503, "the signal was not heard")
    assert send(address, "/v1/chat/completions", chat_body(max_tokens=1))[0] == 503
    for response in responses:
        rest = response.read().decode()
        assert len(re.findall('"finish_reason": "(length|stop)"', rest)) == 16 and rest.rstrip().endswith("data: [DONE]")
    assert started.wait(60) == 0
