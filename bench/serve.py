"""The server against llama.cpp's, on the same model file: seconds to the first token, and tokens per second, by the number of
clients that ask at once; and of a conversation, seconds to the first token turn by turn."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import console, header, machine, save
from flags import about, positive
from rich.table import Table

from sirius_ext.models.hub import default_model_path

CLIENTS = (1, 2, 4, 8)
PROMPT = "{} lighthouse keepers meet. Tell their story in plain words."  # no two begin alike
TURN = "And what does keeper number {} say to that?"

Messages = list[dict[str, str]]


def serve_ours(model: Path, threads: int, arguments: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
    """A server of ours, and its address."""
    command = [sys.executable, "-m", "sirius_ext", "serve", "--model", str(model), "--port", "0", "--threads", str(threads)]
    process = subprocess.Popen([*command, "--parallel", str(max(CLIENTS)), *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = _address_in(process.stderr).split()[-1]
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process, address


def serve_llama_cpp(model: Path, threads: int) -> tuple[subprocess.Popen[str], str]:
    """llama.cpp's server, through the PyPI package xllamacpp, in a process of its own."""
    command = [sys.executable, __file__, "--peer", str(model), str(threads)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    return process, _address_in(process.stdout).strip()


def _address_in(said: Iterable[str]) -> str:
    """The first line with an address. SystemExit with what a server has said instead."""
    lines = []
    for line in said:
        if "http://" in line:
            return line
        lines.append(line)
    raise SystemExit("".join(lines) or "a server ended without a word")


def _peer(model: str, threads: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx, params.n_parallel, params.cache_prompt, params.port = 2048 * max(CLIENTS), max(CLIENTS), False, 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


def question(number: int) -> Messages:
    return [{"role": "user", "content": PROMPT.format(number + 2)}]


def ask(address: str, model: str, messages: Messages, tokens: int) -> tuple[float, float, int, str]:
    """One streamed answer: seconds to its first token and to its end, its tokens, and its text."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started, first, count, text = time.perf_counter(), None, 0, ""
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
            piece = event["choices"] and event["choices"][0]["delta"].get("content")
            if piece and first is None:
                first = time.perf_counter() - started
            text += piece or ""
    return first or float("nan"), time.perf_counter() - started, count, text


def converse(address: str, model: str, turns: int, tokens: int, first: int) -> list[float]:
    """A conversation: seconds to the first token of every turn. first: the number of its first question."""
    messages, waits = question(first), []
    for turn in range(turns):
        wait, _, _, text = ask(address, model, messages, tokens)
        waits.append(wait)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": TURN.format(turn + 1)}]
    return waits


def measure(address: str, model: str, clients: int, tokens: int, first: int) -> dict[str, float]:
    """So many clients at once, each with a prompt of its own, none of which was asked before. first: the first one's number."""
    found: list[tuple[float, float, int, str]] = []
    threads = [
        threading.Thread(target=lambda n=number: found.append(ask(address, model, question(n), tokens)))
        for number in range(first, first + clients)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if len(found) != clients:
        raise RuntimeError(f"{clients - len(found)} of {clients} clients got no answer")
    return {
        "clients": clients,
        "first_token_seconds": statistics.median(each[0] for each in found),
        "tokens_per_second": sum(each[2] for each in found) / seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=about(__doc__),
        epilog="All other options are for `sirius_ext serve`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the default model's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=positive, default=128, help="of an answer")
    parser.add_argument("--clients", type=positive, nargs="+", default=CLIENTS)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--turns", type=positive, default=10, help="of the conversation")
    parser.add_argument("--without-peer", action="store_true", help="ours alone, without xllamacpp")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options, more = parser.parse_known_args(arguments)  # the others are for `sirius serve`
    header()
    model = options.model or default_model_path()
    servers: dict[str, tuple[subprocess.Popen[str], str]] = {}
    results, conversations = [], []
    try:
        servers["sirius"] = serve_ours(model, options.threads, more)
        if not options.without_peer:
            servers["llama.cpp"] = serve_llama_cpp(model, options.threads)
        number = 0
        for _, address in servers.values():
            ask(address, model.name, question(1000), 8)  # warm
        for _ in range(options.rounds):
            for clients in options.clients:
                for name, (_, address) in servers.items():
                    results.append({"server": name, **measure(address, model.name, clients, options.tokens, number)})
                number += clients
        for name, (_, address) in servers.items():
            waits = converse(address, model.name, options.turns, 48, number)
            conversations.append({"server": name, "first_token_seconds": waits})
    finally:
        for process, _ in servers.values():
            process.kill()
            process.wait()
    table = Table("clients", *(f"{name}: {what}" for name in servers for what in ("first token, s", "tokens/s")))
    for clients in options.clients:
        row = [str(clients)]
        for name in servers:
            mine = [each for each in results if each["server"] == name and each["clients"] == clients]
            row += [
                f"{statistics.median(each[what] for each in mine):.2f}" for what in ("first_token_seconds", "tokens_per_second")
            ]
        table.add_row(*row)
    console.print(table)
    for each in conversations:
        waits = ", ".join(f"{seconds:.2f}" for seconds in each["first_token_seconds"])
        console.print(f"{each['server']}: seconds to the first token of each turn of a conversation: {waits}")
    if options.out:
        found = {"results": results, "conversations": conversations}
        save(options.out, {"machine": machine(), "benchmark": "serve", "model": model.name, "arguments": more, **found})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        _peer(sys.argv[2], int(sys.argv[3]))
    else:
        raise SystemExit(main())
