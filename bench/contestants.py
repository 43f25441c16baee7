"""A contestant of bench/offload.py, in a process of its own: reads from standard input, as JSON, what to decode and how, and
writes to standard output what happens, one JSON object a line. It imports what it needs alone, since all of it counts.

Every event has `time`, seconds of a clock that only differences mean something of, and `read`, the bytes that the process has had
from disk by then: "started"; "loaded"; for each prompt "prompt" and then "tokens", with `count`, whenever there are new ones;
"finished". Of our own engine "loaded" has the `plan` of what stays in memory, if not all does, and "finished" has `stats`,
`periods` (seconds of each whole one) and `full_passes`: of the full model's passes over drafts or a token, seconds, bytes that
arrived, and seconds in which the disk was read.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path


def bytes_read() -> int:
    """By this process, from disk: its own reads and pages of mapped files, not what the page cache had already."""
    fields = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(next(value for name, value in fields if name == "read_bytes"))


def say(event: str, **fields) -> float:
    """Returns the event's time."""
    now = time.perf_counter()
    print(json.dumps({"event": event, "time": now, "read": bytes_read(), **fields}), flush=True)
    return now


class Text:
    """One prompt's text: tells of its tokens, and when it has had its `seconds` of decoding."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._first = seconds, 0.0
        self._last = say("prompt")

    def add(self, count: int) -> None:
        self._last = say("tokens", count=count)
        self._first = self._first or self._last

    @property
    def over(self) -> bool:
        return bool(self._first) and time.perf_counter() - self._first > self._seconds


def _followed(seconds: float) -> dict:
    """Settings of generate, of transformers as of ours, by which a text is told of and ends in time."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    text = Text(seconds)

    class Streamer(BaseStreamer):
        prompt = True  # the first `put`

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt:
                text.add(value.numel())
            self.prompt = False

        def end(self) -> None:
            pass

    class Limit(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), text.over, dtype=torch.bool, device=input_ids.device)

    return {"streamer": Streamer(), "stopping_criteria": StoppingCriteriaList([Limit()])}


class FullPasses:
    """Counts what the full model's passes take, and what comes from the disk meanwhile.

    tiers: of the model, with the `statistics` of what it streams; None if everything is in memory.
    """

    def __init__(self, model, tiers) -> None:
        self._tiers, self._step = tiers, model.step
        self.counted = {"passes": 0, "seconds": 0.0, "bytes": 0, "busy_seconds": 0.0}
        model.step = self.step

    def _arrived(self) -> tuple[int, float]:
        statistics = None if self._tiers is None else self._tiers.statistics
        return (0, 0.0) if statistics is None else (statistics.bytes, statistics.busy)

    def step(self, cache, asked):
        if asked.sparsity is not None:
            return self._step(cache, asked)
        (bytes_before, busy_before), started = self._arrived(), time.perf_counter()
        result = self._step(cache, asked)
        seconds, (bytes_after, busy_after) = time.perf_counter() - started, self._arrived()
        more = (1, seconds, bytes_after - bytes_before, busy_after - busy_before)
        self.counted = {name: had + new for (name, had), new in zip(self.counted.items(), more)}
        return result


def ours(job: dict) -> None:
    """config: of SiriusConfig. weights: as `Engine.from_pretrained` takes them. memory: bytes of weights and caches that stay in
    memory, the rest is streamed; None: everything is in memory, and the engine is told of no budget."""
    import torch

    from sirius_ext import Engine, SiriusConfig, Stats
    from sirius_ext.config import GREEDY
    from sirius_ext.engine import prepare
    from sirius_ext.models.hub import parse_dtype

    torch.set_num_threads(job["threads"])
    budget = {} if job["memory"] is None else {"memory": f"{job['memory'] / 1e9:g}GB"}
    engine = Engine.from_pretrained(
        job["model"],
        SiriusConfig(**job["config"]),
        device="cpu",
        dtype=parse_dtype(job["dtype"]),
        progress=False,
        weights=job["weights"],
        **budget,
    )
    model = prepare(engine.model)
    tiers = model.weights.tiers
    say("loaded", plan=None if tiers is None else dataclasses.asdict(tiers.plan))
    passes, prompts = FullPasses(model, tiers), []
    for prompt in job["prompts"]:
        settings = _followed(job["seconds"])
        ids = torch.tensor([prompt])
        out = engine.generate(ids, torch.ones_like(ids), max_new_tokens=job["max_new_tokens"], **settings, **GREEDY)
        prompts += out.stats.prompts
    stats = Stats(prompts)
    whole = [period.seconds for period in stats.periods if not period.cut]
    say("finished", stats=stats.metrics(), periods=whole, full_passes=passes.counted)


def transformers(job: dict) -> None:
    """memory: bytes of weights that stay in memory; what does not fit is read from the model's own files whenever it is used, by
    hooks of accelerate. None: everything in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from sirius_ext.config import GREEDY
    from sirius_ext.models.hub import parse_dtype

    torch.set_num_threads(job["threads"])
    budget = {}
    if job["memory"] is not None:
        budget = {"device_map": "auto", "max_memory": {"cpu": job["memory"]}, "offload_folder": job["scratch"]}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=parse_dtype(job["dtype"]), **budget).eval()
    say("loaded")
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        settings = _followed(job["seconds"])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["max_new_tokens"], **settings, **GREEDY)
    say("finished")


def llama_cpp(job: dict) -> None:
    """model: a GGUF file, read through the page cache."""
    from llama_cpp import server_of

    longest = max(map(len, job["prompts"])) + job["max_new_tokens"]
    server = server_of(job["model"], job["threads"], context=longest, mapped=True)
    say("loaded")
    for prompt in job["prompts"]:
        text, had = Text(job["seconds"]), 0

        def on_chunk(chunk: dict, text: Text = text) -> bool:
            """Whether to stop."""
            nonlocal had
            if (count := chunk["timings"]["predicted_n"]) > had:
                text.add(count - had)
                had = count
            return text.over

        request = {"prompt": prompt, "n_predict": job["max_new_tokens"], "temperature": 0, "cache_prompt": False}
        server.handle_completions({**request, "stream": True, "timings_per_token": True}, on_chunk)
    say("finished")


CONTESTANTS = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}


def main() -> None:
    job = json.load(sys.stdin)
    say("started")
    CONTESTANTS[job["contestant"]](job)


if __name__ == "__main__":
    main()
