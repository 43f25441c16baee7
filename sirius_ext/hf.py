"""Drop-in use with `transformers`: one call by `custom_generate`, whole scripts by `attach`."""

from __future__ import annotations

import inspect

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .config import SiriusConfig
from .engine import Engine, SiriusOutput, decode_batch, is_prepared, release


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    sirius_config: SiriusConfig | None = None,
    sirius_streamer: BaseStreamer | None = None,
    **kwargs,
) -> SiriusOutput | torch.Tensor:
    """For `model.generate(**inputs, custom_generate=sirius_ext.generate, sirius_config=config)`.

    The first call lays the model's `down_proj` weights out anew, in place; `sirius_ext.detach(model)` undoes that.
    With return_dict_in_generate=True the result has `stats`.

    Streaming: `streamer=` works. transformers 5 does not hand it to a callable, so it is looked up in the calling frame of its
    generate; where a later release has no such frame, pass the streamer as `sirius_streamer=`.
    """
    streamer = sirius_streamer or kwargs.pop("streamer", None) or _streamer_of_caller()
    kwargs.pop("synced_gpus", None)
    config = sirius_config if sirius_config is not None else SiriusConfig()
    if not isinstance(config, SiriusConfig):
        raise TypeError(f"sirius_config: expected a SiriusConfig, got {type(config).__name__}")
    return decode_batch(model, input_ids, config, streamer=streamer, **kwargs)


def _streamer_of_caller() -> BaseStreamer | None:
    frame = inspect.currentframe().f_back.f_back
    is_generate = (
        frame is not None and frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("self"), GenerationMixin)
    )
    return frame.f_locals.get("streamer") if is_generate else None


class attach:  # noqa: N801 - used like a function
    """Make `model.generate` decode with Sirius until `detach`, as a plain call or as a context manager.

    >>> with sirius_ext.attach(model, config) as handle:
    ...     model.generate(**inputs)
    ...     handle.stats  # of the last call

    `detach` restores the model bit for bit: its generate, and the layout of its weights.
    """

    def __init__(self, model: PreTrainedModel, config: SiriusConfig | None = None) -> None:
        prepared_before = isinstance(model, PreTrainedModel) and is_prepared(model)
        self._engine = Engine(model, config)
        if "generate" in vars(model):
            raise ValueError("model: generate is replaced already (attached before?); detach it first")
        self._prepared_before = prepared_before
        self.model, self.stats = model, None
        model.generate = self._generate

    def _generate(self, inputs: torch.Tensor | None = None, *, streamer: BaseStreamer | None = None, **settings):
        if settings.get("custom_generate") is not None:
            return type(self.model).generate(self.model, inputs, streamer=streamer, **settings)

        def decode(model, input_ids, **kwargs):
            kwargs["generation_config"].return_dict_in_generate, wanted = (
                True,
                kwargs["generation_config"].return_dict_in_generate,
            )
            output = decode_batch(model, input_ids, self._engine.config, streamer=streamer, **kwargs)
            self.stats = output.stats
            return output if wanted else output.sequences

        return type(self.model).generate(self.model, inputs, streamer=streamer, custom_generate=decode, **settings)

    def detach(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        if vars(self.model).get("generate") == self._generate:
            del self.model.generate
            if not self._prepared_before:
                release(self.model)

    def __enter__(self) -> attach:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def detach(model: PreTrainedModel) -> None:
    """Undo what `generate`, `attach` or an `Engine` did to the model; it is then as it was loaded, bit for bit."""
    handle = vars(model).get("generate")
    if isinstance(getattr(handle, "__self__", None), attach):
        del model.generate
    release(model)
