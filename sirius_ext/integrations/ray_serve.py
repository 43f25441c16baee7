"""The server on many machines: a Ray Serve application whose replicas are the server's own app, each with a model of its own.

serve run sirius_ext.integrations.ray_serve:app model=MODEL replicas=2
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from ..config import SiriusConfig
from ..engine import engine_of
from ..extras import need
from ..loading import DEFAULT_MODEL
from ..serving.app import Options, create_app
from ..serving.scheduler import Scheduler


class Arguments(BaseModel):
    """What `serve run` is told, as NAME=VALUE.

    replicas, cpus, gpus: how many, and what each of them is given.
    model, device, dtype, weights: as the command line has them; cpus are the threads.
    mode, accept, period: of `SiriusConfig`. The others are those of `sirius serve`; cache_bytes is its --cache-memory.
    """

    model_config = ConfigDict(extra="forbid")

    replicas: int = 1
    cpus: int = 1
    gpus: float = 0
    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str = "bfloat16"
    weights: str = "plain"
    memory: int | None = None
    mode: str = "sirius"
    accept: str = "threshold"
    period: Annotated[int | str, Field(union_mode="left_to_right")] = "auto"
    name: str | None = None
    api_key: str | None = None
    parallel: int = 4
    queue: int = 64
    cache_bytes: int = 1 << 30
    reuse_decoded: bool = False
    max_tokens: int = 1024
    temperature: float = 0.0

    @property
    def threads(self) -> int:
        return self.cpus

    @property
    def config(self) -> SiriusConfig:
        return SiriusConfig(mode=self.mode, accept=self.accept, period=self.period)

    @property
    def options(self) -> Options:
        return Options(self.name or self.model, self.api_key, self.max_tokens, self.temperature)


def replica(arguments: Arguments) -> FastAPI:
    """What one replica serves: it loads the model."""
    engine = engine_of(arguments, arguments.config)
    scheduler = Scheduler(
        engine, arguments.parallel, arguments.queue, arguments.cache_bytes, reuse_decoded=arguments.reuse_decoded
    )
    return create_app(scheduler, arguments.options)


def app(args: Arguments) -> Any:
    """The application, for `serve run` or `serve.run`. ValueError for settings that contradict each other."""
    serve = need("ray.serve", "ray-serve", "the Ray Serve application")
    _ = args.config  # raises here, and not on every replica

    def build() -> FastAPI:
        return replica(args)

    made = serve.deployment(
        name="sirius",
        num_replicas=args.replicas,
        # Each has a queue of its own, which answers 429.
        max_ongoing_requests=args.parallel + args.queue + 1,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    )(serve.ingress(build)())
    return made.bind()
