"""From a call of `transformers`' generate to texts to decode: it resolves the settings, and says where a text ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria

from ..config import SiriusConfig
from ..decoding.calibrate import load_thresholds
from ..decoding.sequence import Request
from ..models.weights import Weights
from ..runtime.cache import Cache
from .rows import Clock, Criteria, Processor
from .settings import Taken, check_surroundings, refuse_resolved, take


@dataclasses.dataclass(frozen=True)
class Call:
    """A call, resolved.

    requests: a text for each prompt.
    input_ids: int64 [batch, t], the prompts with their padding.
    pad: the token that fills up shorter texts.
    in_dict: asked for more than the sequences alone: return_dict_in_generate.
    cache: to go on from.
    """

    requests: list[Request]
    input_ids: torch.Tensor
    pad: int
    in_dict: bool
    cache: Cache | None

    def padded(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """Prompts and texts, int64 [batch, length]."""
        longest = max(map(len, texts))
        rows = [torch.tensor(text + [self.pad] * (longest - len(text)), device="cpu") for text in texts]
        return torch.cat((self.input_ids, torch.stack(rows).to(self.input_ids.device)), dim=1)


def resolve(
    model: PreTrainedModel, arguments: Mapping[str, Any], config: SiriusConfig, weights_of: Callable[[PreTrainedModel], Weights]
) -> Call:
    """What a call asks for. `transformers` resolves generation config, logits processors and stopping criteria; what it would
    drop on the way is taken before.

    arguments: of generate, by name.
    weights_of: the model's weights, which it may lay out anew: called when nothing was refused.
    ValueError or TypeError for what is unknown, cannot be honoured or cannot be right.
    """
    passed, taken = take(arguments, model)
    check_surroundings(model)

    # A name in this signature that transformers' own decoding does not have would be taken out of the call: hence **inputs.
    def decode(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Call:
        mask = inputs.get("attention_mask")
        _check_positions(inputs.get("position_ids"), mask, input_ids)
        refuse_resolved(generation_config, config, len(input_ids), taken)
        timed = [Clock(each, len(input_ids)) if isinstance(each, MaxTimeCriteria) else each for each in stopping_criteria]
        criteria = [*timed, *_stop_strings(taken)]
        weights = weights_of(model)
        thresholds = None
        if config.thresholds is not None and config.mode != "full":
            thresholds = load_thresholds(config.thresholds, weights, config.density_with())
        prompts = _prompts(input_ids, mask, passed.get("attention_mask") is None, weights)

        def request(row: int, prompt: torch.Tensor) -> Request:
            ends = _ends(row, input_ids.cpu(), weights.context - len(prompt), criteria)
            process = Processor(logits_processor, row, input_ids, len(prompt)) if logits_processor else None
            sample, streamer = bool(generation_config.do_sample), taken.streamer
            return Request(prompt, config, *ends, process, sample, taken.generator, thresholds, streamer)

        requests = [request(row, prompt) for row, prompt in enumerate(prompts)]
        return Call(
            requests, input_ids, _pad_token(generation_config), bool(generation_config.return_dict_in_generate), taken.cache
        )

    kind: Any = type(model)  # PreTrainedModel itself has no generate
    call = kind.generate(model, **passed, custom_generate=decode)  # not one that `attach` put in its place
    assert isinstance(call, Call)
    return call


def _stop_strings(taken: Taken) -> list[StopStringCriteria]:
    if not taken.stop_strings:
        return []
    if taken.tokenizer is None:
        raise ValueError("stop_strings: they need the model's tokenizer, but none was given")
    return [StopStringCriteria(taken.tokenizer, taken.stop_strings)]


def _ends(row: int, batch: torch.Tensor, limit: int, criteria: Sequence[Any]) -> tuple[int, str, frozenset[int], Criteria | None]:
    """Where a text ends, as `Request` has it. limit: what the context leaves. The two criteria of nearly every call are plain
    arithmetic; the others are asked token by token."""
    limited_by, eos, others = "context", set(), []
    for criterion in criteria:
        if isinstance(criterion, EosTokenCriteria):
            eos.update(criterion.eos_token_id.flatten().tolist())
        elif isinstance(criterion, MaxLengthCriteria):
            room = max(1, criterion.max_length - batch.shape[1])  # one token comes always, as in transformers
            if room <= limit:
                limit, limited_by = room, "length"
        else:
            others.append(criterion.of(row) if isinstance(criterion, Clock) else criterion)
    return limit, limited_by, frozenset(eos), Criteria(others, row, batch) if others else None


def _check_positions(positions: torch.Tensor | None, attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    """ValueError unless the tokens of each prompt stand at 0, 1, 2, ..."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if positions is not None and bool(((positions.to(mask.device) - mask.cumsum(-1) + 1) * mask).any()):
        raise ValueError("position_ids: expected those of the prompt, 0, 1, 2, ..., got others")


def _prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, inferred: bool, weights: Weights
) -> list[torch.Tensor]:
    """The prompts without their padding, int64 [t] each; ValueError if one is empty, too long or not a prompt at all.

    inferred: the mask is not the caller's; `transformers` made it."""
    prompts = []
    for row, ids in enumerate(input_ids.cpu()):
        if attention_mask is not None:
            mask = attention_mask[row].bool().cpu()
            if not bool((mask[1:] >= mask[:-1]).all()):
                raise ValueError(
                    f"attention_mask: expected left padding only (0 ... 0 1 ... 1), got {_padding_of(mask)} in row {row}"
                    + ("; none was given, and pad_token_id in input_ids was taken for padding" if inferred else "")
                )
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


def _padding_of(mask: torch.Tensor) -> str:
    """What is wrong with a mask that has other padding than at the left. mask: bool [t]."""
    if bool((mask[1:] <= mask[:-1]).all()):
        return 'right padding (a tokenizer with padding_side="left" pads as it should be)'
    return "zeros elsewhere"


def _pad_token(settings: GenerationConfig) -> int:
    if settings.pad_token_id is not None:
        return int(settings.pad_token_id)
    return 0 if settings.eos_token_id is None else int(torch.as_tensor(settings.eos_token_id).flatten()[0])
