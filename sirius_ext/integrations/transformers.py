"""Drop-in use with `transformers`: one call by `custom_generate`, whole scripts by `attach`.

The package imports this module at once, so it imports what takes seconds (torch, transformers, the engine) only where that is
called.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..config import SiriusConfig
from ..decoding.stats import Stats

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from ..engine import SiriusOutput, Tokenizer

_GENERATION = "transformers.generation.utils"


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
    from ..engine import call, inside

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
        from ..generation.settings import arguments_of

        arguments = arguments_of(args, kwargs)
        del arguments["custom_generate"]
        return generate(self, **arguments)

    return redirected


def _redirect() -> None:
    from transformers.generation.utils import GenerationMixin

    GenerationMixin.generate = _redirected(GenerationMixin.generate)  # type: ignore[method-assign]  # replacing it is the point


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module that has `transformers`' generate as the other finders do, whoever imports it, and redirects it as soon as
    it is loaded. It must be redirected before it is first looked up: so importing `sirius_ext` is enough, before transformers or
    after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _GENERATION:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _redirect()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this module's loader alone
        return spec


if _GENERATION in sys.modules:
    _redirect()
else:
    sys.meta_path.insert(0, _Finder())


class attach:  # noqa: N801 - used like a function
    """Make `model.generate` decode with Sirius until `detach`, as a plain call or as a context manager.

    >>> with sirius_ext.attach(model, config) as handle:
    ...     model.generate(**inputs)
    ...     handle.stats  # of the last call

    `detach` restores the model bit for bit: its generate, and the layout of its weights.
    """

    def __init__(self, model: PreTrainedModel, config: SiriusConfig | None = None) -> None:
        from ..engine import Engine, inside, is_prepared

        self.model: Any = inside(model)  # PreTrainedModel itself is not said to have a generate
        self.stats: Stats | None = None
        self._prepared_before = is_prepared(self.model)
        if "generate" in vars(self.model):
            raise ValueError("model: generate is replaced already (attached before?); detach it first")
        self._engine = Engine(self.model, config)
        vars(self.model)["generate"] = self._generate

    def __repr__(self) -> str:
        return f"attach({self._engine!r}, {'attached' if self._is_attached else 'detached'})"

    @property
    def _is_attached(self) -> bool:
        return bool(vars(self.model).get("generate") == self._generate)

    def _generate(self, *args: Any, **settings: Any) -> Any:
        from ..engine import call
        from ..generation.settings import arguments_of

        if settings.get("custom_generate") is not None:
            return type(self.model).generate(self.model, *args, **settings)
        output, returned = call(self.model, arguments_of(args, settings), self._engine.config)
        self.stats = output.stats
        return returned

    def detach(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        if self._is_attached:
            del self.model.generate
            if not self._prepared_before:
                from ..engine import release

                release(self.model)

    def __enter__(self) -> attach:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def detach(model: PreTrainedModel) -> None:
    """Undo what `generate`, `attach` or an `Engine` did to the model; it is then as it was loaded, bit for bit."""
    from ..engine import inside, release

    model = inside(model)
    handle = vars(model).get("generate")
    if isinstance(getattr(handle, "__self__", None), attach):
        del model.generate
    release(model)
