"""The command `serve`."""

from __future__ import annotations

import argparse
import os
import socket
import sys

from ..config import SiriusConfig
from ..engine import engine_of
from ..serving.app import Options
from ..serving.run import serve
from ..serving.scheduler import Scheduler

# oneDNN keeps what it has compiled for a shape, for 1024 shapes: a few MB each, and every length of a prompt's last chunk is one.
SHAPES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def run(options: argparse.Namespace, config: SiriusConfig, api_key: str | None) -> int:
    os.environ.setdefault(*SHAPES)  # oneDNN reads it when it first compiles something
    with listen(options.host, options.port) as listener:
        engine = engine_of(options, config)
        if engine.tokenizer is None:
            raise ValueError("model: it has no tokenizer, so texts cannot be read")
        of_file = os.path.basename(os.path.normpath(options.model)) if os.path.exists(options.model) else options.model
        name = options.name or of_file
        told = Options(name, api_key, options.max_tokens, options.temperature, options.max_body)
        scheduler = Scheduler(engine, options.parallel, options.queue, options.cache_memory, options.reuse_decoded)
        serve(scheduler, told, listener, lambda address: print(f"{name} at {address}", file=sys.stderr, flush=True))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before anything that takes time. ValueError if it cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        name = "host" if isinstance(error, socket.gaierror) else "port"
        raise ValueError(f"{name}: {host}:{port} cannot be listened on: {error.strerror}") from error
