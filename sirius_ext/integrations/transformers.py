"""Drop-in use with `transformers`: one call by `custom_generate`, whole scripts by `attach`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..config import SiriusConfig
from ..decoding.stats import Stats
from ..engine import Engine, SiriusOutput, Tokenizer, call, inside, is_prepared, release
from ..generation.settings import arguments_of


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    sirius_config: SiriusConfig | None = None,
    sirius_streamer: BaseStreamer | None = None,
    sirius_tokenizer: Tokenizer = None,
    **settings: Any,
) -> SiriusOutput | torch.Tensor:
    """`model.generate(inputs, ..., custom_generate=sirius_ext.generate, sirius_config=config)` comes here with all that it was
    given, and may be written `sirius_ext.generate(model, inputs, ..., sirius_config=config)` as well.

    The first call lays the model's `down_proj` weights out anew, in place; `sirius_ext.detach(model)` undoes that.

    inputs: int64 [batch, t], also as input_ids=.
    sirius_streamer, sirius_tokenizer: other names for streamer and tokenizer.
    settings: what `transformers`' generate takes, and generator=, a torch.Generator that draws what do_sample draws.
    Returns the sequences, int64 [batch, length], or with return_dict_in_generate=True a `SiriusOutput`, which has `stats`.
    ValueError or TypeError for what is unknown or cannot be honoured, before any work.
    """
    config = sirius_config if sirius_config is not None else SiriusConfig()
    if not isinstance(config, SiriusConfig):
        raise TypeError(f"sirius_config: expected a SiriusConfig, got {type(config).__name__}")
    for name, ours in (("streamer", sirius_streamer), ("tokenizer", sirius_tokenizer)):
        if ours is not None and settings.get(name) is not None:
            raise ValueError(f"{name}: expected one, got both {name} and sirius_{name}")
        settings |= {name: ours} if ours is not None else {}
    given = {"inputs": inputs, "generation_config": generation_config}
    return call(inside(model), settings | {name: value for name, value in given.items() if value is not None}, config)[1]


def _redirected(original: Callable[..., Any]) -> Callable[..., Any]:
    """`transformers`' generate, but for calls with `custom_generate=sirius_ext.generate`: it calls such a function without
    streamer, tokenizer and assistant model, which would be ignored in silence. So we are called before they are dropped."""

    @functools.wraps(original)
    def redirected(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not generate and not any(each is generate for each in args):
            return original(self, *args, **kwargs)
        arguments = arguments_of(args, kwargs)
        del arguments["custom_generate"]
        return generate(self, **arguments)

    return redirected


GenerationMixin.generate = _redirected(GenerationMixin.generate)  # type: ignore[method-assign]  # replacing it is the point


class attach:  # noqa: N801 - used like a function
    """Make `model.generate` decode with Sirius until `detach`, as a plain call or as a context manager.

    >>> with sirius_ext.attach(model, config) as handle:
    ...     model.generate(**inputs)
    ...     handle.stats  # of the last call

    `detach` restores the model bit for bit: its generate, and the layout of its weights.
    """

    def __init__(self, model: PreTrainedModel, config: SiriusConfig | None = None) -> None:
        self.model: Any = inside(model)  # PreTrainedModel itself is not said to have a generate
        self.stats: Stats | None = None
        self._prepared_before = is_prepared(self.model)
        if "generate" in vars(self.model):
            raise ValueError("model: generate is replaced already (attached before?); detach it first")
        self._engine = Engine(self.model, config)
        vars(self.model)["generate"] = self._generate

    def _generate(self, *args: Any, **settings: Any) -> Any:
        if settings.get("custom_generate") is not None:
            return type(self.model).generate(self.model, *args, **settings)
        output, returned = call(self.model, arguments_of(args, settings), self._engine.config)
        self.stats = output.stats
        return returned

    def detach(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        if vars(self.model).get("generate") == self._generate:
            del self.model.generate
            if not self._prepared_before:
                release(self.model)

    def __enter__(self) -> attach:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def detach(model: PreTrainedModel) -> None:
    """Undo what `generate`, `attach` or an `Engine` did to the model; it is then as it was loaded, bit for bit."""
    model = inside(model)
    handle = vars(model).get("generate")
    if isinstance(getattr(handle, "__self__", None), attach):
        del model.generate
    release(model)
