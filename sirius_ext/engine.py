"""A model and how to decode with it."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import jinja2
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput
from transformers.utils.logging import is_progress_bar_enabled

from .config import SiriusConfig
from .decoding.costs import keep_costs
from .decoding.sequence import Request, Sequence, start
from .decoding.sparsity import drafts_of
from .decoding.stats import CostlyDrafts, Stats
from .errors import warn
from .generation.resolve import Call, resolve
from .kernels import ops
from .kernels.dispatch import check_device, has_cuda_kernels
from .kernels.threads import choose_threads, cpu_threads
from .loading import DEFAULT_MODEL, parse_memory
from .models.hub import load_model, load_within, parse_dtype, reporting
from .models.weights import Weights, restore
from .runtime.backend import model_of
from .runtime.cache import Cache
from .runtime.graphs import graph_mode
from .runtime.model import Model, lasting

BACKENDS = ("auto", "cpu", "cuda")

# One of `transformers`, or None. Its own types do not say of what a call returns whether it is one text or many.
Tokenizer = Any

_models: weakref.WeakKeyDictionary[PreTrainedModel, Model] = weakref.WeakKeyDictionary()
_changes: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
_advised: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_preparing = threading.Lock()  # two threads must not lay the same weights out, each in memory of its own
_copying = threading.Lock()  # nor make the same copy, or say that they do


def inside(model: object) -> PreTrainedModel:
    """The `transformers` model, taken out of what `torch.compile` has put around it. TypeError if there is none."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        hint = "; decode what its merge_and_unload() returns" if hasattr(model, "merge_and_unload") else ""
        raise TypeError(f"model: expected a transformers causal language model, got {type(model).__name__}{hint}")
    return model


@lasting
def prepare(model: PreTrainedModel) -> Model:
    """The decoding model that shares this `transformers` model's weights; made at the first call, then kept with the model."""
    # What was computed with weights that have been changed in place since (by an optimizer, say) must not be reused: neither the
    # caches, also of texts that have not ended yet, nor what is known of the weights, nor a copy of them. A change by way of
    # `weight.data` is not seen: `release` the model after one.
    with _preparing:
        changes = sum(map(_version, model.parameters()))
        ready = _models.get(model)
        current = ready is not None and ready.weights.is_current(model)
        if ready is not None and current and _changes.get(model) == changes:
            return ready
        if ready is not None:
            ready.caches.clear()
        new = model_of(Weights(model))
        if ready is not None and current:
            keep_costs(ready, new)
        _models[model], _changes[model] = new, changes
        return new


def _trained(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Fused optimizers change weights in place, and their versions stay. So all of them say when they have made a step."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} if _models else set()
    for model in tuple(_models):
        if any(id(parameter) in own for parameter in model.parameters()):
            _changes.pop(model, None)


register_optimizer_step_post_hook(_trained)


def _version(parameter: torch.Tensor) -> int:
    """How often it was changed in place; what was made in `torch.inference_mode` does not say, even with other data."""
    try:
        return parameter._version
    except RuntimeError:
        return 0


@lasting
def release(model: PreTrainedModel) -> None:
    """Forget what `prepare` made and give the model's weights their layout back."""
    with _preparing:
        ready = _models.pop(model, None)
        if ready is not None:
            ready.caches.clear()
            restore(model)


def is_prepared(model: PreTrainedModel) -> bool:
    return model in _models


@dataclasses.dataclass
class SiriusOutput(ModelOutput):
    """What a call gives.

    sequences: int64 [batch, length], prompts included, padded after the end of a text.
    stats: `Stats` of the call.
    cache: of a call with one prompt, that of its text: all tokens but the last. Given to `generate` as cache, or past_key_values,
        with a prompt that begins with these tokens, it spares reading any of them; the entries of decoded tokens are then those
        of decode passes, whose bits differ from a prefill's. It is not a Cache of `transformers` but the model's own, on loan:
        the model keeps those of its last texts, and a later call may go on in this one, which then holds what that call left in
        it. Without it, a prompt that begins as one of these texts did is read from the first chunk on that differs, bit for bit
        as if all had been read.
    """

    sequences: torch.Tensor | None = None
    stats: Stats | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        """`cache`, by the name that `transformers` had for it until 5.24."""
        return self.cache


class Engine:
    """A model and how to decode with it.

    >>> engine = Engine.from_pretrained("path-or-id", SiriusConfig(period=8), dtype=torch.bfloat16)
    >>> out = engine.generate(input_ids, max_new_tokens=256)
    >>> out.sequences, out.stats.average_advance_length

    model: a loaded `transformers` model of a supported architecture, of one dtype, all on the CPU or on one CUDA device. It goes
        on sharing its weights, and is decoded where they are.
    """

    def __init__(self, model: PreTrainedModel, config: SiriusConfig | None = None, tokenizer: Tokenizer = None) -> None:
        self.config = _checked(config)
        self.model, self.tokenizer = inside(model), tokenizer
        self._name = self.model.name_or_path or ""  # to be shown
        prepare(self.model)

    def __repr__(self) -> str:
        """What one wants to see of it in one line: the model's name and family, the form of its weights, where they are, and how
        they decode."""
        config, ready, device = self.config, _models.get(self.model), str(self.model.device)
        name = Path(self._name).name if Path(self._name).is_absolute() else self._name
        known = [name] if name else []
        known += [self.model.config.model_type, f"{ready.weights.form} on {device}" if ready else device]
        known.append(f"mode={config.mode!r}")
        known += [f"sparsity={config.sparsity!r}"] if config.mode != "full" else []
        known += [f"period={config.period!r}, accept={config.accept!r}"] if config.mode == "sirius" else []
        return f"Engine({', '.join(known)})"

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        config: SiriusConfig | None = None,
        device: str | int | torch.device = "auto",
        dtype: torch.dtype | str = torch.bfloat16,
        progress: bool = True,
        backend: str = "auto",
        weights: str = "plain",
        memory: int | str | None = None,
    ) -> Engine:
        """Load a Hugging Face id, a local folder, a GGUF file, or without a name the default model.

        device: "cpu", "cuda", "cuda:1", ..., or a CUDA device's number; "auto" is a CUDA device where there is one that can be
            used, and the CPU elsewhere.
        dtype: of the weights: bfloat16, float16 or float32; "auto" is the checkpoint's own, and bfloat16 for a GGUF file.
        backend: whose kernels decode, "cpu" or "cuda"; "auto" are those for the device.
        weights: "plain" as they come, or packed: "q8", eight bits, half of the memory and of the time that reading them takes,
            of which S reads the upper four (`SiriusConfig.draft_weights`); or "q4", four bits. Of a GGUF file these are its own
            4-bit matrices with its very numbers, and eight bits of its others; so it is with checkpoints by AWQ, GPTQ and
            compressed-tensors. Of anything else all matrices but embedding and LM head are rounded, which costs quality. Packed
            ones are kept in the cache folder. `dtype` is then that of all else. The `transformers` model cannot be called itself.
        memory: bytes that weights and caches may take on the device, as a number or as "6GB"; without it all that is free, less
            a tenth. A sparse model's copy of plain weights is among them (`SiriusConfig.draft_weights`). A model that needs more
            is written into the cache folder once (as `sirius prepare` does it), and from there the full model reads what is not
            in memory whenever it reads; on a CUDA device from host memory, which holds that part pinned (`SiriusConfig.offload`).
            The text is the same. The memory is divided for the sparse model of `config`.
        ValueError or FileNotFoundError if there is no such model, it is corrupt or not supported, or the device cannot be used;
        RuntimeError if the device's memory does not hold the weights.
        """
        device = device_of(device, backend)
        config = _checked(config)
        cpu_threads()  # before torch reads and converts weights with too many
        if memory is not None and config.offload == "never":
            raise ValueError('memory: with offload="never" all weights are loaded, whatever they need')
        if config.offload == "auto":
            room = None if memory is None else parse_memory(memory)
            drafts = functools.partial(drafts_of, config)
            model, tokenizer = load_within(room, drafts, name, dtype, progress, weights, device)
        else:
            model, tokenizer = load_model(name, dtype, progress, weights)
        try:
            model = model.to(device)  # type: ignore[arg-type]  # its decorator there makes `self` an argument
        except torch.OutOfMemoryError as error:
            size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
            raise RuntimeError(
                f"device: {device} has no room for {size:.1f} GB of weights; try a smaller model or dtype"
            ) from error
        engine = cls(model, config, tokenizer)
        engine._name = str(name or DEFAULT_MODEL)  # what was loaded may be a file of the cache folder
        make_copy(engine.model, config, progress)
        return engine

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        config: SiriusConfig | None = None,
        **settings: Any,
    ) -> SiriusOutput:
        """Decode; `transformers`' own generate resolves the settings, so what it takes is taken here too.

        input_ids: int64 [batch, t], left-padded where attention_mask is 0; on any device. The text's batch-mates do not matter:
            prompts are decoded one by one.
        attention_mask: [batch, t] of zeros and ones. Without it `transformers` infers it: pad_token_id is padding, unless it is
            an end-of-text token, too.
        config: in place of the engine's.
        settings: max_new_tokens, max_length, eos_token_id, stop_strings, stopping_criteria, logits_processor, streamer, ...; a
            setting that cannot be honoured (num_beams > 1, do_sample where drafts are not accepted by "sample", ...) is a
            ValueError. generator draws what do_sample draws, in place of torch's default one; tokenizer is for stop_strings, in
            place of the engine's; cache (or past_key_values) is that of an earlier `SiriusOutput`, for one prompt;
            return_dict_in_generate=False asks for the sequences alone.
        """
        _, returned = _decode(self.model, self._resolve(input_ids, attention_mask, config, settings))
        return cast(SiriusOutput, returned)  # a tensor only for who asked for it

    def start(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        config: SiriusConfig | None = None,
        reuse_decoded: bool = False,
        **settings: Any,
    ) -> Sequence:
        """The text that `generate` would decode, to be decoded step by step; the first step reads the prompt. Any number of them
        may be alive at a time.

        input_ids: int64 [1, t]. The other arguments are those of `generate`.
        reuse_decoded: of a kept cache all tokens that the prompt begins with are used, decoded ones too, whose bits differ from a
            prefill's: a conversation then reads only what is new in it.
        """
        call = self._resolve(input_ids, attention_mask, config, settings)
        if len(call.requests) != 1:
            raise ValueError(f"input_ids: expected one prompt, got {len(call.requests)}; a sequence is one text")
        return next(_sequences(self.model, call, reuse_decoded))

    def requests(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        config: SiriusConfig | None = None,
        **settings: Any,
    ) -> list[Request]:
        """What `generate` would decode, resolved, for who decodes it by other means. Arguments are those of `generate`."""
        return self._resolve(input_ids, attention_mask, config, settings).requests

    def _resolve(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        config: SiriusConfig | None,
        settings: Mapping[str, Any],
    ) -> Call:
        if not isinstance(input_ids, torch.Tensor):
            raise TypeError(f"input_ids: expected an integer tensor, got {type(input_ids).__name__}")
        arguments = {"return_dict_in_generate": True, "input_ids": input_ids.to(self.model.device), **settings}
        if isinstance(attention_mask, torch.Tensor):
            arguments["attention_mask"] = attention_mask.to(self.model.device)
        elif attention_mask is not None:
            raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
        if arguments.get("tokenizer") is None:
            arguments["tokenizer"] = self.tokenizer
        return resolve(self.model, arguments, self.config if config is None else _checked(config), _weights_of)


@lasting
def make_copy(model: PreTrainedModel, config: SiriusConfig, progress: bool) -> None:
    """Make the copy of plain weights that the config's sparse model reads, if it reads one that is not there: that takes seconds,
    and is said. progress: on stderr."""
    weights = prepare(model).weights
    if config.mode == "full":
        return
    with _copying:
        if weights.copy_is_due(config.draft_weights):
            _make_copy(weights, config, progress)


def _make_copy(weights: Weights, config: SiriusConfig, progress: bool) -> None:
    with reporting("packing the sparse model's copy into four bits", progress) as report:

        def show(layers: int, done: int) -> None:
            report.show(f"layer {done} of {layers}")

        if config.draft_weights == "q4":
            weights.make_copy(show)
        elif not weights.settle(show):
            report.remarks.append("it cannot be had: the sparse model reads what the full model reads")


def _weights_of(model: PreTrainedModel) -> Weights:
    return prepare(model).weights


def call(
    model: PreTrainedModel, arguments: Mapping[str, Any], config: SiriusConfig
) -> tuple[SiriusOutput, SiriusOutput | torch.Tensor]:
    """A call of `transformers`' generate, decoded here.

    arguments: of generate, by name.
    Returns what was decoded, and what generate returns of it: the sequences alone, unless return_dict_in_generate is set.
    """
    return _decode(model, resolve(model, arguments, config, _weights_of))


def _sequences(model: PreTrainedModel, call: Call, reuse_decoded: bool = False) -> Iterator[Sequence]:
    """The texts of a call, each started when it is asked for."""
    for request in call.requests:
        make_copy(model, request.config, is_progress_bar_enabled())  # of a model that others have loaded
        sequence = start(prepare(model), request, call.cache, reuse_decoded)
        if request.streamer is not None:
            request.streamer.put(call.input_ids.cpu())
        yield sequence


def _decode(model: PreTrainedModel, call: Call) -> tuple[SiriusOutput, SiriusOutput | torch.Tensor]:
    """All texts of a call, one after the other. Returns what `call` does."""
    texts, stats = [], []
    for sequence in _sequences(model, call):
        stats.append(sequence.run())
        texts.append(sequence.tokens)
    cache = sequence.cache if len(texts) == 1 else None
    sequences = call.padded(texts)
    told = Stats(stats)
    _advise(model, told)
    output = SiriusOutput(sequences=sequences, stats=told, cache=cache)
    return output, output if call.in_dict else sequences


def _advise(model: PreTrainedModel, stats: Stats) -> None:
    """Warn of texts that drafts made slower, once a model: a loop over many texts must not say it every time."""
    if model not in _advised and (advice := stats.advice):
        _advised.add(model)
        warn(advice, CostlyDrafts)


def encode(tokenizer: Tokenizer, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a prompt, with `chat` inside the model's chat template.

    ValueError if there is no tokenizer, the prompt is empty, or `chat` is asked of a model without a template.
    """
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so a text prompt cannot be read")
    messages = [{"role": "user", "content": prompt}]
    inputs = encode_messages(tokenizer, messages) if chat else tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0 or not prompt:
        raise ValueError("prompt: it is empty")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def encode_messages(tokenizer: Tokenizer, messages: Iterable[Mapping[str, str]]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a conversation as the model's chat template has it, up to where the answer begins.

    messages: each with `role` and `content`.
    ValueError if there is no tokenizer, it has no template, or the template refuses the messages.
    """
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so a text prompt cannot be read")
    if tokenizer.chat_template is None:
        raise ValueError("chat: this model has no chat template")
    try:
        inputs = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat: this model's chat template cannot be used: {type(error).__name__}: {error}") from error
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def device_of(name: str | int | torch.device, backend: str = "auto") -> torch.device:
    """The device of that name, which "auto" chooses. ValueError if this build cannot decode there; never a silent fall back."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if name == "auto":
        name = backend if backend != "auto" else "cuda" if torch.cuda.is_available() and has_cuda_kernels() else "cpu"
    if isinstance(name, int) and not isinstance(name, bool):
        name = f"cuda:{name}"  # as transformers has it
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:1, ..., got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device.type!r} is not supported; use cpu, cuda, cuda:1, ...")
    if backend not in ("auto", device.type):
        raise ValueError(f"backend: {backend!r} does not run on device {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: 'cuda' was asked for, but there is no CUDA device that torch can use; device='cpu' works everywhere"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}")
    check_device("device", device)
    if device.type == "cpu":
        ops.isa()  # ValueError for a SIRIUS_ISA that this CPU has not, before a model is loaded
    graph_mode()
    return device


class Source(Protocol):
    """Where an engine comes from, as the command line and plans of evaluations have it: `Engine.from_pretrained` says what the
    names mean."""

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def weights(self) -> str: ...
    @property
    def memory(self) -> int | None: ...


def engine_of(source: Source, config: SiriusConfig) -> Engine:
    """The engine, and so many CPU threads, if it says how many."""
    if source.threads is not None:
        choose_threads(source.threads)
    dtype = parse_dtype(source.dtype)
    return Engine.from_pretrained(source.model, config, source.device, dtype, weights=source.weights, memory=source.memory)


def _checked(config: SiriusConfig | None) -> SiriusConfig:
    if config is None:
        return SiriusConfig()
    if not isinstance(config, SiriusConfig):
        raise TypeError(f"config: expected a SiriusConfig, got {type(config).__name__}")
    return config
