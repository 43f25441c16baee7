"""What every request passes before anything is read of it: whose it is, where it was sent, how large it is."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROTECTED = ("/v1/", "/metrics")  # beginnings of paths that need the key, if there is one


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict:  # type: ignore[type-arg]
    """As OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a socket that is bound to a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """The host of a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


class Guard:
    """An ASGI application around another one.

    key: that clients must show. Without one only requests are taken that were sent to a name of this machine itself, so that no
        page of another host reaches the server by having its own name point here.
    most_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, key: str | None, most_bytes: int) -> None:
        self._app, self._key, self._most_bytes = app, key, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # under which it is mounted, by Ray Serve say
        if (refusal := self._refusal(path, headers)) is not None:
            await refusal(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, limited, send)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        if self._key is None and not is_loopback(host_name(headers.get("host", ""))):
            message = f"host: expected a name of this machine, got {headers.get('host', '')!r}; an API key admits others"
            return JSONResponse(error_body(message), 403)
        if self._key is not None and path.startswith(PROTECTED) and not self._shows_key(headers):
            message = "Authorization: expected 'Bearer' and the server's API key"
            body = error_body(message, "authentication_error", code="invalid_api_key")
            return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._most_bytes:
            return JSONResponse(error_body(self._too_large()), 413, {"Connection": "close"})
        return None

    def _shows_key(self, headers: Headers) -> bool:
        assert self._key is not None
        kind, _, key = headers.get("authorization", "").partition(" ")
        # In a time that does not depend on where they differ.
        return hmac.compare_digest(key.strip().encode(), self._key.encode()) and kind.lower() == "bearer"

    def _too_large(self) -> str:
        return f"body: expected at most {self._most_bytes} bytes"
