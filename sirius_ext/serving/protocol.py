"""What clients send: OpenAI's chat and text completions, and what this server has beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ..config import MAX_PERIOD, MAX_WIDTH

MOST_CHOICES = 16
MOST_NODES = 256  # of a tree that a client may ask for: each costs a row of logits
MOST_TOKENS = 2**31 - 1

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class Body(BaseModel):
    """Nothing is converted, and nothing is ignored: a field that is not named here is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Settings(Body):
    """How to decode, in place of what the server was started with: fields of `SiriusConfig`. One that is not used is refused.

    trace: the answer says of each token where it comes from, with F's likelihoods, and what was counted.
    """

    mode: Literal["sirius", "sparse", "full"] | None = None
    sparsity: Literal["csparse", "fsparse", "cascade"] | None = None
    follow: bool | None = None
    period: Annotated[int, Field(ge=1, le=MAX_PERIOD)] | Literal["auto"] | None = None
    tree_width: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    prune: bool | None = None
    accept: Literal["threshold", "match", "sample"] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    lookup: bool | None = None
    trace: bool = False

    def given(self) -> dict[str, Any]:
        """Fields of `SiriusConfig` that the client has set."""
        return self.model_dump(exclude={"trace"}, exclude_none=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(Body):
    """What both kinds of completions have in common.

    The last fields decide nothing about the text. Of those before them only the values that ask for nothing are taken.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sirius: Settings = Settings()

    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_options(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation. Content in parts is put together."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _check_name(self) -> Message:
        if self.name is not None:
            raise ValueError("name: not supported; chat templates have roles alone")
        return self

    def for_template(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_completion_tokens: not together with another max_tokens")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each; None if no likelihoods are."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(Request):
    """prompt: a text, token ids, or several of either."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Ids
        | Annotated[list[Annotated[str, Field(min_length=1)]] | list[Ids], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_text(self) -> TextRequest:
        if self.best_of not in (None, self.choices):
            raise ValueError(f"best_of: expected n, {self.choices}: all texts are returned")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def scored(self) -> int | None:
        return self.logprobs


# In words, where a bound of one of the types that a field may have says too little: what is taken.
_TAKEN = {
    "prompt": f"a text, token ids, or a list of up to {MOST_CHOICES} of either, none of them empty",
    "stop": "a string of 1 to 256 characters, or a list of up to 4 of them",
    "frequency_penalty": "0, since penalties are not supported",
    "presence_penalty": "0, since penalties are not supported",
    "logit_bias": "{}, since biases are not supported",
    "tools": "[], since tools are not supported",
    "suffix": '"", since text is only continued',
    "sirius": f"an object with some of {', '.join(Settings.model_fields)}",
    "sirius.period": f'an integer, 1 to {MAX_PERIOD}, or "auto"',
}
_TYPES = {
    "string_type": "a string",
    "string_unicode": "Unicode, of which no surrogate is a part by itself",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
# By the kind of an error and the name of what it tells.
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
    "too_short": ("a length of at least", "min_length"),
    "string_too_short": ("a length of at least", "min_length"),
    "too_long": ("a length of at most", "max_length"),
    "string_too_long": ("a length of at most", "max_length"),
}


def what_is_wrong(errors: Sequence[Mapping[str, Any]], body: object) -> tuple[str, str | None]:
    """The first of pydantic's errors in a body in words of our own, and the field's name if it is about one."""
    # A field that may have several types has an error for each of them. The one that got furthest is the likeliest to be meant.
    first = max((each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]), key=lambda each: len(each["loc"]))
    kind, context, given = first["type"], first.get("ctx", {}), first.get("input")
    if kind == "json_invalid":
        return f"body: it is not JSON: {context.get('error', '')}", None
    # The types' names are among the places, and say nothing to who has sent it.
    place = [str(part) for part in first["loc"][1:] if str(part).isidentifier() or isinstance(part, int)]
    place = [part for part in place if part not in ("str", "int", "float")]
    name = ".".join(place) or "body"
    if kind == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        name = name if place else message.partition(":")[0]
        return message if message.startswith(f"{name}: ") else f"{name}: {message}", name
    if kind == "missing":
        return f"{name}: it is missing", name
    if kind == "extra_forbidden":
        if not str(first["loc"][-1]).isidentifier():
            name = json.dumps(first["loc"][-1])[:60]
        hint = (
            f"expected some of {', '.join(Settings.model_fields)}" if place[:1] == ["sirius"] else "/openapi.json has all fields"
        )
        return f"{name}: this server does not know or support it; {hint}", name
    if name in _TAKEN or (place and place[0] in _TAKEN and place[0] != "sirius"):
        if name not in _TAKEN:  # of one in several parts the whole is said
            name = place[0]
        if isinstance(body, Mapping) and name in body:
            given = body[name]
        expected = _TAKEN[name]
    elif kind == "literal_error":
        expected = {"False": "false", "True": "true"}.get(context["expected"], context["expected"])
    elif kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        expected = f"{words} {context[key]}"
    else:
        expected = _TYPES.get(kind) or first["msg"].removeprefix("Input should be ")
    shown = json.dumps(given, default=str)
    return f"{name}: expected {expected}, got {shown if len(shown) <= 60 else f'{shown[:57]}...'}", name
