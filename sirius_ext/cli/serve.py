"""The command `serve`."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys

from ..engine import engine_of
from ..extras import need
from ..loading import parse_size
from ..serving.scheduler import Scheduler
from .arguments import Commands, integer_in, not_empty, number, reads
from .options import TOKENS, add_command, add_mode_options, mode_config

API_KEY = "SIRIUS_API_KEY"
# oneDNN keeps what it has compiled for a shape, for 1024 shapes: a few MB each, and every length of a prompt's last chunk is one.
SHAPES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


@reads
def key(text: str) -> str:
    """A header must be able to hold it."""
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("expected printable ASCII characters without spaces")
    return text


def add(commands: Commands) -> None:
    serve = add_command(commands, "serve", run, "serve a model to OpenAI's clients, with a page to chat")
    serve.description = (
        "OpenAI's /v1/chat/completions and /v1/completions, /v1/models, /health, /metrics, and at / a page. A request may have "
        "its own settings (`sirius`); the options here are what it goes by otherwise."
    )
    option = serve.add_argument
    option("--host", default="127.0.0.1", help="to listen on; another than this machine's own needs an API key (%(default)s)")
    option("--port", type=integer_in(0, 65535), default=8000, help="0 takes a free one (default: %(default)s)")
    option("--api-key", metavar="KEY", type=key, help=f"that clients must show; better in the environment as {API_KEY}")
    option("--name", type=not_empty, help="of the model, for clients (default: that of --model, without its folder)")
    purpose = "texts that are decoded in turn (default: %(default)s)"
    option("--parallel", metavar="N", type=integer_in(1, 256), default=4, help=purpose)
    option("--queue", metavar="N", type=integer_in(0, 65536), default=64, help="texts that may wait (default: %(default)s)")
    purpose = "kept for prompts that begin as earlier ones did: 500M, 2G, ... (default: 1G)"
    option("--cache-memory", metavar="SIZE", type=reads(parse_size), default=1 << 30, help=purpose)
    purpose = (
        "use what was decoded, too, where a conversation goes on: less to read, but answers are then no longer, bit for bit, "
        "those that the prompt alone would get"
    )
    option("--reuse-decoded", action="store_true", help=purpose)
    purpose = "of an answer whose request does not say (default: %(default)s)"
    option("--max-tokens", type=TOKENS, default=1024, help=purpose)
    purpose = "of a request that does not say; 0 takes the likeliest tokens (default: %(default)s)"
    option("--temperature", type=number, default=0.0, help=purpose)
    option("--max-body", metavar="SIZE", type=reads(parse_size), default=4 << 20, help="of a request (default: 4M)")
    add_mode_options(serve)
    serve.set_defaults(sample=False)  # a request says


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault(*SHAPES)  # oneDNN reads it when it first compiles something
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        need(module, "serve", "serve")
    from ..serving.app import Options
    from ..serving.guard import is_loopback
    from ..serving.run import serve

    if getattr(options, "accept", "") == "sample":
        raise ValueError("accept: expected threshold or match; requests with a temperature above 0 have sample by themselves")
    if not 0 <= options.temperature <= 2:
        raise ValueError(f"temperature: expected 0 to 2, got {options.temperature}")
    config = mode_config(options)
    api_key = options.api_key
    if api_key is None and API_KEY in os.environ:
        try:
            api_key = key(os.environ[API_KEY])
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{API_KEY}: {error}") from error
    if api_key is None and not is_loopback(options.host):
        raise ValueError(f"host: {options.host} can be reached from other machines; set --api-key or {API_KEY} first")
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
