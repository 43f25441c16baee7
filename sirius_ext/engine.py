"""From a call of `transformers`' generate to texts: what may be asked, where a text ends, prompts one by one."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Mapping, Sequence

import jinja2
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .config import SiriusConfig
from .decoding import loop
from .decoding.calibrate import load_thresholds
from .decoding.stats import CostlyDrafts, PromptStats, Stats
from .integrations.settings import Taken, check_surroundings, refuse_resolved, take
from .kernels.dispatch import check_device as kernels_for
from .kernels.dispatch import has_cuda_kernels
from .models.hub import load_model
from .models.weights import Weights, restore
from .runtime.model import Model, model_of

BACKENDS = ("auto", "cpu", "cuda")

# Makes generate greedy, whatever sampling the model's own generation config proposes.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

_models: weakref.WeakKeyDictionary[PreTrainedModel, Model] = weakref.WeakKeyDictionary()
_advised: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def inside(model: object) -> PreTrainedModel:
    """The `transformers` model, taken out of what `torch.compile` has put around it. TypeError if there is none."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        hint = "; decode what its merge_and_unload() returns" if hasattr(model, "merge_and_unload") else ""
        raise TypeError(f"model: expected a transformers causal language model, got {type(model).__name__}{hint}")
    return model


def prepare(model: PreTrainedModel) -> Model:
    """The decoding model that shares this `transformers` model's weights; made at the first call, then kept with the model."""
    ready = _models.get(model)
    if ready is None or not ready.weights.is_current(model):
        ready = _models[model] = model_of(Weights(model))
    return ready


def release(model: PreTrainedModel) -> None:
    """Forget what `prepare` made and give the model's weights their layout back."""
    if _models.pop(model, None) is not None:
        restore(model)


def is_prepared(model: PreTrainedModel) -> bool:
    return model in _models


@dataclasses.dataclass
class SiriusOutput(ModelOutput):
    """What a call gives.

    sequences: int64 [batch, length], prompts included, padded behind the end of a text.
    stats: `Stats` of the call.
    """

    sequences: torch.LongTensor = None
    stats: Stats = None


class Engine:
    """A model and how to decode with it.

    >>> engine = Engine.from_pretrained("path-or-id", SiriusConfig(period=8), dtype=torch.bfloat16)
    >>> out = engine.generate(input_ids, max_new_tokens=256)
    >>> out.sequences, out.stats.average_advance_length

    model: a loaded `transformers` model of a supported architecture, of one dtype, all on the CPU or on one CUDA device. It goes
        on sharing its weights, and is decoded where they are.
    """

    def __init__(self, model: PreTrainedModel, config: SiriusConfig | None = None, tokenizer=None) -> None:
        self.config = _checked(config)
        self.model, self.tokenizer = inside(model), tokenizer
        prepare(self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        config: SiriusConfig | None = None,
        device: str | int | torch.device = "auto",
        dtype: torch.dtype | str = torch.bfloat16,
        progress: bool = True,
        backend: str = "auto",
    ) -> Engine:
        """Load a Hugging Face id, a local folder, a GGUF file, or without a name the default model.

        device: "cpu", "cuda", "cuda:1", ..., or a CUDA device's number; "auto" is a CUDA device where there is one that can be
            used, and the CPU elsewhere.
        dtype: of the weights: bfloat16, float16 or float32; "auto" is the checkpoint's own, and bfloat16 for a GGUF file.
        backend: whose kernels decode, "cpu" or "cuda"; "auto" are those for the device.
        ValueError or FileNotFoundError if there is no such model, it is corrupt or not supported, or the device cannot be used;
        RuntimeError if the device's memory does not hold the weights.
        """
        device = check_device(device, backend)
        config = _checked(config)
        model, tokenizer = load_model(name, dtype, progress)
        try:
            model = model.to(device)
        except torch.OutOfMemoryError as error:
            size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
            raise RuntimeError(
                f"device: {device} has no room for {size:.1f} GB of weights; try a smaller model or dtype"
            ) from error
        return cls(model, config, tokenizer)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        config: SiriusConfig | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer=None,
        generator: torch.Generator | None = None,
        passes: Model | None = None,
        **settings,
    ) -> SiriusOutput:
        """Decode; `transformers`' own generate resolves the settings, so what it takes is taken here too.

        input_ids: int64 [batch, t], left-padded where attention_mask is 0; on any device. The text's batch-mates do not matter:
            prompts are decoded one by one.
        config: in place of the engine's.
        tokenizer: for stop_strings, in place of the engine's.
        generator: draws what do_sample draws; torch's default one without it.
        passes: what runs the passes, in place of the engine's own (a seat of `evaluation.Batch`, say).
        settings: max_new_tokens, max_length, eos_token_id, stop_strings, stopping_criteria, logits_processor, ...; a setting that
            cannot be honoured (num_beams > 1, do_sample where drafts are not accepted by "sample", ...) is a ValueError.
        """
        if not isinstance(input_ids, torch.Tensor):
            raise TypeError(f"input_ids: expected an integer tensor, got {type(input_ids).__name__}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        elif not isinstance(attention_mask, torch.Tensor):
            raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
        arguments = {
            "return_dict_in_generate": True,
            "input_ids": input_ids.to(self.model.device),
            "attention_mask": attention_mask.to(self.model.device),
            "streamer": streamer,
            "tokenizer": self.tokenizer if tokenizer is None else tokenizer,
            "generator": generator,
            **settings,
        }
        return call(self.model, arguments, self.config if config is None else _checked(config), passes)[1]


def call(
    model: PreTrainedModel, arguments: Mapping, config: SiriusConfig, passes: Model | None = None
) -> tuple[SiriusOutput, SiriusOutput | torch.Tensor]:
    """A call of `transformers`' generate, decoded here: that one resolves the settings, we take what it would drop.

    arguments: of generate, by name.
    passes: runs the passes, in place of the model's own.
    Returns what was decoded, and what generate returns of it: the sequences alone, unless return_dict_in_generate is set.
    """
    arguments, taken = take(arguments, model)
    check_surroundings(model)

    # A name in this signature that transformers' own decoding does not have would be taken out of the call: hence **inputs.
    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        attention_mask = inputs.get("attention_mask")
        _check_positions(inputs.get("position_ids"), attention_mask, input_ids)
        output = decode_batch(
            model, input_ids, config, logits_processor, stopping_criteria, generation_config, attention_mask, taken, passes
        )
        return output, output if generation_config.return_dict_in_generate else output.sequences

    generate = type(model).generate  # not one that `attach` put in its place
    return generate(model, **arguments, custom_generate=decode)


def encode(tokenizer, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a prompt, with `chat` inside the model's chat template.

    ValueError if there is no tokenizer, the prompt is empty, or `chat` is asked of a model without a template.
    """
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so a text prompt cannot be read")
    if chat and tokenizer.chat_template is None:
        raise ValueError("chat: this model has no chat template")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat: this model's chat template cannot be used: {type(error).__name__}: {error}") from error
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0 or not prompt:
        raise ValueError("prompt: it is empty")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def check_device(name: str | int | torch.device, backend: str = "auto") -> torch.device:
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
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device.type!r} is not supported; use 'cpu' or 'cuda'")
    if backend not in ("auto", device.type):
        raise ValueError(f"backend: {backend!r} does not run on device {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: 'cuda' was asked for, but there is no CUDA device that torch can use; device='cpu' works everywhere"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}")
    kernels_for("device", device)
    return device


def decode_batch(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: SiriusConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    attention_mask: torch.Tensor | None,
    taken: Taken,
    passes: Model | None = None,
) -> SiriusOutput:
    """The decoding method that `transformers`' generate calls in place of its own, with everything resolved.

    input_ids: int64 [batch, t].
    taken: what generate was not told of.
    passes: runs them, in place of the model's own.
    """
    refuse_resolved(generation_config, config, len(input_ids), taken.streamer)
    if taken.stop_strings:
        if taken.tokenizer is None:
            raise ValueError("stop_strings: they need the model's tokenizer, but none was given")
        stopping_criteria = StoppingCriteriaList([*stopping_criteria, StopStringCriteria(taken.tokenizer, taken.stop_strings)])
    ready = prepare(model) if passes is None else passes
    thresholds = None
    if config.thresholds is not None and config.mode != "full":
        thresholds = load_thresholds(config.thresholds, ready.weights, config.density)
    prompts = _prompts(input_ids, attention_mask, ready.weights)
    streamer = taken.streamer
    if streamer is not None:
        streamer.put(input_ids.cpu())
    texts = []
    for row, prompt in enumerate(prompts):
        text = _Text(row, input_ids.cpu(), len(prompt), ready.weights.context, stopping_criteria, streamer)
        process = _Processor(logits_processor, row, input_ids, len(prompt)) if logits_processor else None
        options = loop.Options(process, generation_config.do_sample, taken.generator, thresholds)
        text.stats = loop.generate(ready, prompt, config, text, options)
        text.stats.finish = text.finish
        texts.append(text)
    if streamer is not None:
        streamer.end()
    _advise(model, texts)
    sequences = _pad(input_ids, [text.tokens for text in texts], generation_config)
    return SiriusOutput(sequences=sequences, stats=Stats(text.stats for text in texts))


def _advise(model: PreTrainedModel, texts: Sequence[_Text]) -> None:
    """Warn of a text that drafts made slower, once a model: a loop over many texts must not say it every time."""
    advice = next((text.stats.advice for text in texts if text.stats.advice), None)
    if advice and model not in _advised:
        _advised.add(model)
        warnings.warn(advice, CostlyDrafts, stacklevel=2)


class _Processor:
    """`transformers`' logits processors, which want the batch as it was given: its padding, and this prompt in its row."""

    def __init__(self, processors: LogitsProcessorList, row: int, batch: torch.Tensor, length: int) -> None:
        self._row, self._rows = row, len(batch)
        self._padding = batch[row, : batch.shape[1] - length]
        # Behind a top-k a top-p looks at k tokens: it need not sort the vocabulary.
        first = next((i for i, each in enumerate(processors) if isinstance(each, TopKLogitsWarper)), len(processors))
        few = all(isinstance(each, (TopPLogitsWarper, MinPLogitsWarper)) for each in processors[first + 1 :])
        cut = first + 1 if few else len(processors)
        self._processors, self._of_few = LogitsProcessorList(processors[:cut]), LogitsProcessorList(processors[cut:])

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        device = self._padding.device  # where the processors keep what they need
        ids = torch.cat((self._padding, ids.to(device))).repeat(self._rows, 1)
        batch = logits.to(device).repeat(self._rows, 1)
        processed = self._processors(ids, batch)
        if not isinstance(processed, torch.Tensor):
            raise TypeError(f"logits_processor: expected it to return a tensor, got {type(processed).__name__}")
        if processed.shape != batch.shape:
            raise ValueError(f"logits_processor: expected scores of shape {list(batch.shape)}, got {list(processed.shape)}")
        logits = processed[self._row].float()
        if self._of_few:
            kept = logits.isfinite()
            logits[kept] = self._of_few(None, logits[kept][None])[0]
        # NaN is not less than anything, and is its row's maximum. -inf rules a token out, as processors do; not all of them.
        if not bool((most := logits.max()).isfinite()):
            what = "scores of -inf alone" if most < 0 else f"a score of {float(most)}"
            raise ValueError(f"logits_processor: expected a likeliest token, got {what} at position {ids.shape[1]} of the text")
        return logits


class _Text:
    """One text as it grows: knows where it ends and hands tokens to the streamer once they are certain."""

    def __init__(
        self,
        row: int,
        batch: torch.Tensor,
        length: int,
        context: int,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ) -> None:
        self._row, self._rows, self._streamer = row, len(batch), streamer
        self._ids = batch[row]  # criteria are asked about the batch as it was given: its padding, and this text in its row
        self._eos: set[int] = set()
        self._others = []
        self.tokens: list[int] = []
        self.ended, self.finish = False, ""
        self.stats: PromptStats | None = None
        # The two criteria of nearly every call are plain arithmetic; the rest are asked token by token.
        self.limit, self._limit_reason = context - length, "context"
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self._eos.update(criterion.eos_token_id.flatten().tolist())
            elif isinstance(criterion, MaxLengthCriteria):
                room = max(1, criterion.max_length - batch.shape[1])  # one token comes always, as in transformers
                if room <= self.limit:
                    self.limit, self._limit_reason = room, "length"
            else:
                self._others.append(criterion)

    def commit(self, tokens: list[int]) -> int:
        count = 0
        for token in tokens:
            self.tokens.append(token)
            count += 1
            if self._others:
                self._ids = torch.cat((self._ids, torch.tensor([token])))
            if token in self._eos:
                self.finish = "eos"
            elif self._others and self._asked():
                self.finish = "criteria"
            elif len(self.tokens) >= self.limit:
                self.finish = self._limit_reason
            if self.finish:
                self.ended = True
                break
        if self._streamer is not None:
            self._streamer.put(torch.tensor(tokens[:count]))
        return count

    def _asked(self) -> bool:
        ids = self._ids.repeat(self._rows, 1)
        done = torch.zeros(self._rows, dtype=torch.bool)
        for criterion in self._others:
            done = done | criterion(ids, None)  # a tensor, or as transformers has it, a single bool
        return bool(done[self._row])


def _checked(config: SiriusConfig | None) -> SiriusConfig:
    if config is None:
        return SiriusConfig()
    if not isinstance(config, SiriusConfig):
        raise TypeError(f"config: expected a SiriusConfig, got {type(config).__name__}")
    return config


def _check_positions(positions: torch.Tensor | None, attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    """ValueError unless the tokens of each prompt stand at 0, 1, 2, ..."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if positions is not None and bool(((positions.to(mask.device) - mask.cumsum(-1) + 1) * mask).any()):
        raise ValueError("position_ids: expected those of the prompt, 0, 1, 2, ..., got others")


def _prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, weights: Weights) -> list[torch.Tensor]:
    """The prompts without their padding, int64 [t] each; ValueError if one is empty, too long or not a prompt at all."""
    prompts = []
    for row, ids in enumerate(input_ids.cpu()):
        if attention_mask is not None:
            mask = attention_mask[row].bool().cpu()
            if not bool((mask[1:] >= mask[:-1]).all()):
                raise ValueError(f"attention_mask: expected left padding only (0 ... 0 1 ... 1), got something else in row {row}")
            ids = ids[mask]
        if len(ids) == 0:
            raise ValueError(f"input_ids: prompt {row} is empty")
        if len(ids) >= weights.context:
            raise ValueError(
                f"input_ids: prompt {row} has {len(ids)} tokens; the model's context holds {weights.context}, one for the answer"
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < weights.vocab:
            raise ValueError(f"input_ids: expected token ids in [0, {weights.vocab}), got {int(ids.min())} to {int(ids.max())}")
        prompts.append(ids)
    return prompts


def _pad(input_ids: torch.Tensor, texts: Sequence[list[int]], generation_config: GenerationConfig) -> torch.Tensor:
    longest = max(map(len, texts))
    pad, eos = generation_config.pad_token_id, generation_config.eos_token_id
    if pad is None:
        pad = 0 if eos is None else int(torch.as_tensor(eos).flatten()[0])
    rows = [torch.tensor(text + [pad] * (longest - len(text))) for text in texts]
    return torch.cat((input_ids, torch.stack(rows).to(input_ids.device)), dim=1)
