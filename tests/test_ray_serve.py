"""Replicas of the server under Ray Serve."""

import json
import urllib.request

import pydantic
import pytest
import served

from sirius_ext.integrations.ray_serve import Arguments, app, replica

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.save(tmp_path_factory.mktemp("ray") / "tiny")


def arguments(folder, **more):
    return Arguments(model=str(folder), name="tiny", dtype="float32", device="cpu", period="4", accept="match", **more)


def test_what_a_replica_serves(folder):
    """The server's own app, over what the arguments name."""
    made = replica(arguments(folder, max_tokens=5))
    paths = {route.path for route in made.routes}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= paths
    config = arguments(folder).config
    assert (config.period, config.accept, arguments(folder).options.name) == (4, "match", "tiny")


def test_arguments_that_are_none():
    with pytest.raises(pydantic.ValidationError, match="what"):
        Arguments(what=1)
    with pytest.raises(ValueError, match="^accept: expected one of"):
        _ = Arguments(accept="all").config


def test_two_replicas(folder):
    """On this machine; requests go to either, and the answer is the same."""
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": 8127})
        serve.run(app(arguments(folder, replicas=2)), name="sirius")

        def ask():
            request = urllib.request.Request(
                "http://127.0.0.1:8127/v1/chat/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["choices"][0]["message"]["content"]

        assert len({ask() for _ in range(8)}) == 1
        replicas = serve.status().applications["sirius"].deployments["sirius"].replica_states
        assert sum(replicas.values()) == 2
    finally:
        serve.shutdown()
        ray.shutdown()
