"""The application as a process: it listens, and ends gracefully."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from .app import Options, create_app
from .scheduler import Scheduler

LAST_SECONDS = 2.0  # after the second signal, in which streams say that they were cut


class _Server(uvicorn.Server):
    """The first signal to end lets all texts that were taken go on to their ends; requests that come meanwhile are told 503. The
    second ends them where they are.

    ready: called once requests are taken.
    """

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._scheduler, self._ready, self._signals = scheduler, ready, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1  # a handler may come between any two instructions: the rest waits for the next tick

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        if self._signals == 1:
            self._scheduler.stop()
        elif self._signals > 1:
            self._scheduler.abort()
        return await super().on_tick(counter) or (self._signals > 0 and self._scheduler.idle)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for answers to be read to their ends, and for what clients have begun to send, until the second signal comes: a
        client that does neither would be waited for without end."""
        over = asyncio.ensure_future(super().shutdown(sockets))
        while not over.done() and self._signals < 2:
            await asyncio.wait({over}, timeout=0.1)
        await asyncio.wait({over}, timeout=LAST_SECONDS)
        over.cancel()
        await asyncio.gather(over, return_exceptions=True)


def serve(scheduler: Scheduler, options: Options, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve on a socket that listens, until a signal to end, and close the scheduler.

    ready: called with the address, once requests are taken.
    """
    app = create_app(scheduler, options)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    try:
        _Server(config, scheduler, lambda: ready(address)).run(sockets=[listener])
    finally:
        scheduler.close()
