"""The application as a process: it listens, and ends gracefully."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from .app import Options, create_app
from .scheduler import Scheduler


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
