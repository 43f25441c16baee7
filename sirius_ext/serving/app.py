"""The HTTP application: OpenAI's completions over a scheduler, metrics, health, and a page."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..config import COLDEST, GREEDY, SiriusConfig
from ..engine import encode_messages, prepare
from .guard import Guard, error_body
from .metrics import SchedulerCollector
from .protocol import MOST_NODES, ChatRequest, TextRequest, what_is_wrong
from .scheduler import Ask, Event, Job, Listener, QueueFull, Scheduler, Stopping, Token
from .text import TokenNames

PAGE = Path(__file__).parent / "page"
GIVEN_UP = 499  # what nginx logs for a client that has left; nobody reads it


@dataclasses.dataclass(frozen=True)
class Options:
    """What a server is told.

    name: of the model, by which clients ask for it.
    api_key: that clients must show, if there is one.
    max_tokens: of an answer whose request does not say.
    temperature: of a request that does not say; 0 takes the likeliest tokens.
    most_bytes: of a request's body.
    """

    name: str
    api_key: str | None = None
    max_tokens: int = 1024
    temperature: float = 0.0
    most_bytes: int = 4 << 20


class Refused(Exception):
    """A request that cannot be served. `param` is the field's name."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def create_app(scheduler: Scheduler, options: Options) -> FastAPI:
    """An application that serves what a scheduler decodes. Whoever makes it closes the scheduler."""
    service = _Service(scheduler, options)
    registry = CollectorRegistry()
    registry.register(SchedulerCollector(scheduler))
    # The pages that FastAPI makes of the description would load their scripts from elsewhere.
    app = FastAPI(title="sirius_ext", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, key=options.api_key, most_bytes=options.most_bytes)
    problems: dict[int | str, dict[str, Any]] = {
        status: {"description": what, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
        for status, what in {
            400: "A field cannot be honoured",
            401: "No API key",
            403: "Not sent to this machine's name",
            404: "No such model",
            413: "The body is too large",
            422: "A field is not as described",
            429: "The queue is full",
            500: "The model cannot go on",
            503: "The server stops",
        }.items()
    }
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The answer, or events as it comes",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }

    @app.post("/v1/chat/completions", responses=answers | problems)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await service.complete(request, body)

    @app.post("/v1/completions", responses=answers | problems)
    async def complete(request: Request, body: TextRequest) -> Response:
        return await service.complete(request, body)

    @app.get("/v1/models", responses={401: problems[401], 403: problems[403]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}", responses={status: problems[status] for status in (401, 403, 404)})
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model()

    @app.get("/v1/sirius", responses={401: problems[401], 403: problems[403]})
    async def defaults() -> dict[str, Any]:
        """How this server decodes where a request does not say: for the page."""
        config = dataclasses.asdict(scheduler.engine.config)
        del config["thresholds"]
        return {"model": options.name, "config": config, "max_tokens": options.max_tokens, "temperature": options.temperature}

    @app.get("/health", responses={status: problems[status] for status in (403, 503)})
    async def health() -> Response:
        if not scheduler.alive or scheduler.stopping:
            return JSONResponse({"status": "stopping" if scheduler.alive else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: problems[401], 403: problems[403]})
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_page(app)
    return app


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _add_page(app: FastAPI) -> None:
    """Its files one by one: mounted at / they would be what every unknown path and wrong method comes to."""
    page = _Page(directory=PAGE, html=True)

    async def file(request: Request) -> Response:
        return await page.get_response(page.get_path(request.scope), request.scope)

    for path in ("/", *(f"/{each.name}" for each in sorted(PAGE.iterdir()))):
        app.add_route(path, file, include_in_schema=False)


class _Page(StaticFiles):
    """The page's files. A browser loads nothing else into it, from nowhere else, and no other site shows it."""

    def file_response(self, *args: Any, **settings: Any) -> Response:
        response = super().file_response(*args, **settings)
        response.headers["Content-Security-Policy"] = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-cache"  # a newer server's page is asked for again
        return response


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    kind = "invalid_request_error" if error.status < 500 and error.status != 429 else "server_error"
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error_body(str(error), kind, error.param, error.code), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"{request.url.path}: there is no such endpoint; /openapi.json has all of them"
    elif error.status_code == 405:
        message = f"{request.url.path}: {request.method} is not for this endpoint"
        if allowed := (error.headers or {}).get("Allow"):
            message = f"{request.url.path}: expected {' or '.join(sorted(allowed.split(', ')))}, got {request.method}"
    return JSONResponse(error_body(message), error.status_code, error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, by the field's name."""
    assert isinstance(error, RequestValidationError)
    message, name = what_is_wrong(error.errors(), error.body)
    return JSONResponse(error_body(message, param=name), 422)


class _Service:
    """Requests into texts for the scheduler, and what comes of them into OpenAI's words."""

    def __init__(self, scheduler: Scheduler, options: Options) -> None:
        self.scheduler, self.options = scheduler, options
        self._started = int(time.time())
        engine = scheduler.engine
        # The scheduler's thread has the engine's own; using one tokenizer in two threads is nowhere promised to work.
        self._tokenizer, self._lock = copy.deepcopy(engine.tokenizer), threading.Lock()
        self._names = TokenNames(self._tokenizer)
        self._context = prepare(engine.model).weights.context

    def model(self) -> dict[str, Any]:
        return {"id": self.options.name, "object": "model", "created": self._started, "owned_by": "sirius_ext"}

    def check_model(self, name: str) -> None:
        if name != self.options.name:
            message = f"model: expected {self.options.name!r}, which is served here, got {name!r}"
            raise Refused(message, "model", 404, "model_not_found")

    async def complete(self, request: Request, body: ChatRequest | TextRequest) -> Response:
        """Serve a request of either kind. The texts end when the client leaves."""
        self.check_model(body.model)
        asks = await run_in_threadpool(self._asks, body)
        channel = _Channel(asyncio.get_running_loop())
        try:
            jobs = self.scheduler.submit((ask, channel.listener(index)) for index, ask in enumerate(asks))
        except QueueFull:
            raise Refused("the queue is full; try again later", status=429, code="queue_full") from None
        except Stopping:
            raise Refused("the server stops and takes no more requests", status=503) from None
        writer = (_ChatWriter if isinstance(body, ChatRequest) else _TextWriter)(self.options.name, body, asks, self._names)
        if body.stream:
            ended: set[int] = set()
            return _Events(self._stream(request, jobs, channel, writer, ended), lambda: self._abandon(jobs, ended))
        return await self._at_once(request, jobs, channel, writer)

    # ------------------------------------------------------------------------------------------------------------ what is asked

    def _asks(self, body: ChatRequest | TextRequest) -> list[Ask]:
        """A text for every choice of every prompt. Refused for what cannot be honoured."""
        config, drawn = self._config(body)
        with self._lock:
            prompts = self._prompts(body)
            if len(prompts) * body.choices > self.scheduler.room:
                message = f"n: expected at most {self.scheduler.room} texts together, got {len(prompts) * body.choices}"
                raise Refused(message, "n")
            asks = []
            for ids in prompts:
                for choice in range(body.choices):
                    asks.append(self._ask(body, config, ids, drawn, choice))
        return asks

    def _prompts(self, body: ChatRequest | TextRequest) -> list[torch.Tensor]:
        """int64 [1, t] each."""
        name = "messages" if isinstance(body, ChatRequest) else "prompt"
        found = []
        try:
            if isinstance(body, ChatRequest):
                inputs = encode_messages(self._tokenizer, [message.for_template() for message in body.messages])
                found = [inputs["input_ids"]]
            else:
                for prompt in body.prompts:
                    ids = self._tokenizer(prompt, verbose=False).input_ids if isinstance(prompt, str) else prompt
                    found.append(torch.tensor(ids, dtype=torch.int64)[None])
        except ValueError as error:
            raise Refused(f"{name}: {error}", name) from error
        for ids in found:
            if ids.shape[1] == 0:
                raise Refused(f"{name}: expected at least one token, got none", name)
            if ids.shape[1] >= self._context:
                message = f"{name}: {ids.shape[1]} tokens; the model's context holds {self._context}, one for the answer"
                raise Refused(message, name, code="context_length_exceeded")
        return found

    def _config(self, body: ChatRequest | TextRequest) -> tuple[SiriusConfig, float]:
        """How to decode, and the temperature, 0 if the likeliest tokens are taken."""
        given, base = body.sirius.given(), self.scheduler.engine.config
        asked = list(given)
        temperature = self.options.temperature if body.temperature is None else body.temperature
        temperature = temperature if temperature >= COLDEST else 0.0  # a colder one draws nothing but the likeliest
        if temperature:
            if given.get("accept", "sample") != "sample" and given.get("mode", base.mode) == "sirius":
                message = f"sirius.accept: {given['accept']!r} is for temperature 0; with one above it is 'sample'"
                raise Refused(message, "sirius.accept")
            if given.get("lookup"):
                raise Refused("sirius.lookup: only with temperature 0; tokens that are drawn are not copied", "sirius.lookup")
            given |= {"accept": "sample", "lookup": False}
        elif given.get("accept") == "sample":
            raise Refused("sirius.accept: 'sample' needs a temperature above 0", "sirius.accept")
        if body.top_k and body.temperature is None and not temperature:
            # Whoever gives no temperature means to draw. One of 0 leaves the likeliest token, as top_k does whatever it is.
            raise Refused("top_k: it needs a temperature; without one this server takes the likeliest tokens", "top_k")
        if given.get("sparsity", base.sparsity) != base.sparsity:
            given["thresholds"] = None  # made for the server's own
        try:
            config = dataclasses.replace(base, **given)
        except (ValueError, TypeError) as error:
            name = f"sirius.{str(error).partition(':')[0]}"
            raise Refused(f"sirius.{error}", name) from error
        for name in asked:
            if name not in config.used:
                by = ", ".join(
                    f"{each} {getattr(config, each)!r}" for each in ("mode", "sparsity", "accept") if each in config.used
                )
                raise Refused(f"sirius.{name}: it is not used with {by}", f"sirius.{name}")
        nodes = 1 + (config.longest_period - 1) * config.tree_width
        if config.mode == "sirius" and nodes > MOST_NODES and {"period", "tree_width"} & given.keys():
            message = f"sirius.tree_width: expected a tree of at most {MOST_NODES} tokens, got one of {nodes}"
            raise Refused(message, "sirius.tree_width")
        return config, temperature

    def _ask(
        self, body: ChatRequest | TextRequest, config: SiriusConfig, ids: torch.Tensor, temperature: float, choice: int
    ) -> Ask:
        settings: dict[str, Any] = dict(GREEDY)
        if temperature:
            generator = torch.Generator()
            if body.seed is None:
                generator.seed()
            else:
                generator.manual_seed((body.seed + choice) % 2**64)
            settings = {"do_sample": True, "temperature": temperature, "generator": generator}
            settings |= {"top_p": 1.0 if body.top_p is None else body.top_p, "top_k": body.top_k or 0}
        limit = body.limit or self.options.max_tokens
        try:
            mask = torch.ones_like(ids)  # of the client's tokens none is padding
            (request,) = self.scheduler.engine.requests(ids, mask, config=config, max_new_tokens=limit, **settings)
            request.longest_period(prepare(self.scheduler.engine.model))
        except ValueError as error:
            name, _, rest = str(error).partition(": ")
            name = {"input_ids": "prompt", "period": "sirius.period"}.get(name, name)
            raise Refused(f"{name}: {rest}", name) from error
        scored = body.scored if body.scored is not None or not body.sirius.trace else 0
        return Ask(dataclasses.replace(request, scored=scored), body.stops, body.sirius.trace)

    # ---------------------------------------------------------------------------------------------------------- what is answered

    async def _at_once(self, request: Request, jobs: list[Job], channel: _Channel, writer: _Writer) -> Response:
        left = asyncio.create_task(_left(request))
        ended: set[int] = set()
        try:
            while len(ended) < len(jobs):
                coming = await channel.get(left)
                if coming is None:
                    return Response(status_code=GIVEN_UP)
                index, event = coming
                if event.finish == "error":
                    raise Refused(event.error, status=500, code="model_error")
                if event.finish == "cancelled":
                    raise Refused("the server was stopped before the text had ended", status=503)
                writer.add(index, event)
                if event.finish:
                    ended.add(index)
            return JSONResponse(writer.whole())
        finally:
            left.cancel()
            self._abandon(jobs, ended)

    async def _stream(
        self, request: Request, jobs: list[Job], channel: _Channel, writer: _Writer, ended: set[int]
    ) -> AsyncIterator[str]:
        left = asyncio.create_task(_left(request))
        try:
            for chunk in writer.opening():
                yield _sse(chunk)
            while len(ended) < len(jobs):
                coming = await channel.get(left)
                if coming is None:
                    return
                index, event = coming
                if event.finish in ("error", "cancelled"):
                    message = event.error or "the server was stopped before the text had ended"
                    yield _sse(error_body(message, "server_error", code="model_error" if event.error else None))
                    return
                if event.finish:
                    ended.add(index)
                for chunk in writer.chunks(index, event):
                    yield _sse(chunk)
            for chunk in writer.closing():
                yield _sse(chunk)
            yield "data: [DONE]\n\n"
        finally:
            left.cancel()

    def _abandon(self, jobs: list[Job], ended: set[int]) -> None:
        for index, job in enumerate(jobs):
            if index not in ended:
                self.scheduler.cancel(job)


class _Events(StreamingResponse):
    """Server-sent events. over: called when all were sent or the client has left, be it before the first one."""

    def __init__(self, events: AsyncIterator[str], over: Callable[[], None]) -> None:
        # The second header keeps proxies from collecting them.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def _sse(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


async def _left(request: Request) -> None:
    """Returns when the client has left. The body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Channel:
    """From the scheduler's thread to a request's task: events, and whose they are."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def listener(self, index: int) -> Listener:
        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return listen

    async def get(self, left: asyncio.Task[None]) -> tuple[int, Event] | None:
        """The next event; None once the client has left."""
        coming = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait({coming, left}, return_when=asyncio.FIRST_COMPLETED)
            return None if left.done() else coming.result()
        finally:
            coming.cancel()


class _Writer:
    """Events in OpenAI's words: as they come, or put together."""

    kind = stream_kind = prefix = ""

    def __init__(self, model: str, body: ChatRequest | TextRequest, asks: list[Ask], names: TokenNames) -> None:
        self._body, self._asks, self._names = body, asks, names
        self._texts = [""] * len(asks)
        self._tokens: list[list[Token]] = [[] for _ in asks]
        self._ends: list[Event] = [Event()] * len(asks)
        self._common = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def add(self, index: int, event: Event) -> None:
        self._texts[index] += event.text
        self._tokens[index] += event.tokens
        if event.finish:
            self._ends[index] = event

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, text in enumerate(self._texts):
            choice = {"index": index, **self.content(text), "finish_reason": self._ends[index].finish}
            choices.append({**choice, "logprobs": self._logprobs(self._tokens[index], 0)})
        found = {**self._common, "object": self.kind, "choices": choices, "usage": self._usage()}
        if self._body.sirius.trace:
            found["sirius"] = {"choices": [self._trace(each, self._ends[i]) for i, each in enumerate(self._tokens)]}
        return found

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Nothing for an event that says nothing yet."""
        offset = sum(len(token.text) for token in self._tokens[index])  # that of the last ones may still be held back
        self.add(index, event)
        logprobs = self._logprobs(event.tokens, offset)
        if not (event.text or event.finish or logprobs or self._body.sirius.trace):
            return []
        found = []
        if event.text or logprobs or not event.finish:
            chunk = self._chunk(index, self.delta(event.text), None, logprobs)
            if self._body.sirius.trace:
                chunk["sirius"] = self._trace(event.tokens, event)
            found.append(chunk)
        if event.finish:
            last = self._chunk(index, self.delta(None), event.finish, None)
            if self._body.sirius.trace:
                told = dataclasses.replace(event, tokens=[], period=None) if found else event
                last["sirius"] = self._trace(told.tokens, told)
            found.append(last)
        return found

    def closing(self) -> list[dict[str, Any]]:
        if not self._body.includes_usage:
            return []
        return [{**self._common, "object": self.stream_kind, "choices": [], "usage": self._usage()}]

    def content(self, text: str) -> dict[str, Any]:
        """Of a choice, its whole text."""
        raise NotImplementedError

    def delta(self, text: str | None) -> dict[str, Any]:
        """Of a choice, new text; None at its end."""
        raise NotImplementedError

    def _logprobs(self, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        raise NotImplementedError

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        choice = {"index": index, **delta, "finish_reason": finish, "logprobs": logprobs}
        chunk = {**self._common, "object": self.stream_kind, "choices": [choice]}
        return {**chunk, "usage": None} if self._body.includes_usage else chunk

    def _usage(self) -> dict[str, Any]:
        """Prompts count once, whatever the number of choices."""
        first = range(0, len(self._asks), self._body.choices)
        prompt = sum(len(self._asks[index].request.prompt) for index in first)
        reused = sum((self._ends[index].stats or {}).get("reused_tokens", 0) for index in first)
        completion = sum(map(len, self._tokens))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _trace(self, tokens: list[Token], event: Event) -> dict[str, Any]:
        """Where each token comes from, and what was counted so far."""
        shown = []
        for token in tokens:
            each: dict[str, Any] = {"id": token.token, "text": token.text, "source": token.source}
            if token.score is not None:
                each["logprob"] = token.score.logprob
            if token.replaced is not None:
                text, _ = self._names.of(token.replaced.token)
                each["replaced"] = {"id": token.replaced.token, "text": text, "logprob": token.replaced.logprob}
            shown.append(each)
        period = event.period and {name: getattr(event.period, name) for name in ("drafted", "accepted", "committed", "copied")}
        return {"tokens": shown, "period": period, "stats": event.stats}


class _ChatWriter(_Writer):
    kind, stream_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(index, delta, None, None) for index in range(len(self._asks))]

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _logprobs(self, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        if self._body.scored is None or not tokens:
            return None
        return {"content": [self._token(token) for token in tokens if token.score is not None], "refusal": None}

    def _token(self, token: Token) -> dict[str, Any]:
        assert token.score is not None
        top = [self._named(*each) for each in token.score.top]
        return {**self._named(token.token, token.score.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._names.of(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


class _TextWriter(_Writer):
    kind = stream_kind = "text_completion"
    prefix = "cmpl"

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _logprobs(self, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        scored = [token for token in tokens if token.score is not None]
        if self._body.scored is None or not scored:
            return None
        offsets, place = [], offset
        for token in scored:
            offsets.append(place)
            place += len(token.text)
        scores = [token.score for token in scored if token.score is not None]
        return {
            "tokens": [self._names.of(token.token)[0] for token in scored],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self._names.of(each)[0]: logprob for each, logprob in score.top} for score in scores],
            "text_offset": offsets,
        }
