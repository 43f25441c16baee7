"""What a call of `transformers`' generate may ask: every argument and setting by its name. What is not named here is refused.

A new release of transformers may add an argument or a setting. `tests/test_settings.py` then fails, and says where the new name
belongs: to USED if its effect comes through logits processors, stopping criteria or our own code, to IDLE if a text decoded here
cannot depend on it, to ONLY if it can be honoured for some values, or for none.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..config import SiriusConfig
from ..kernels.dispatch import check_device
from ..models.packed import refuse_call
from ..runtime.cache import Cache

# Decide about the text or about what is returned, and are honoured.
USED = frozenset(
    {
        # arguments of generate
        "inputs",
        "input_ids",
        "attention_mask",
        "position_ids",
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "streamer",
        "tokenizer",
        "generator",
        # where a text ends
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        # how tokens are drawn
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "num_return_sequences",
        # what changes logits
        "repetition_penalty",
        "encoder_repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "renormalize_logits",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "watermarking_config",
        # what is returned
        "return_dict_in_generate",
    }
)

# Decide about nothing here: they set up what is refused below (beams, assistant models, other caches), or speed and memory alone.
IDLE = frozenset(
    {
        "trust_remote_code",
        "transformers_version",
        "early_stopping",
        "length_penalty",
        "diversity_penalty",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "assistant_ensemble_weight",
        "target_lookbehind",
        "max_matching_ngram_size",
        "decoder_start_token_id",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
        "low_memory",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
    }
)

# Refused, unless they have one of these values. None always means that nothing was asked.
ONLY: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "use_cache": (True,),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "is_assistant": (False,),
    "synced_gpus": (False,),
    "custom_generate": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "use_mtp": (False,),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "assistant_early_exit": (),
    "speculation_type": (),
    "prompt_lookup_num_tokens": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "inputs_embeds": (),
    "cache_implementation": (),
    # caches, by all the names that transformers has had for them; one of ours is taken before
    "cache": (),
    "past_key_values": (),
    "cache_params": (),
}
KNOWN = USED | IDLE | ONLY.keys()

_HINTS = {
    "num_beams": "num_beams > 1",
    "use_cache": "use_cache=False",
    "token_healing": "token_healing (token healing changes the prompt)",
    "prompt_lookup_num_tokens": "prompt_lookup_num_tokens (SiriusConfig(lookup=True) copies from prompt and text)",
    "cache_implementation": "cache_implementation (the engine keeps its own cache)",
    "cache": "cache (past_key_values): only what an earlier call gave as past_key_values",
    "past_key_values": "past_key_values: only what an earlier call gave as past_key_values",
}

# What those who give an unknown argument want, where its name is like none that is known.
_INSTEAD = {
    "seed": "generator=torch.Generator().manual_seed(1) draws the same again",
    "sirius_config": "an Engine and attach take config=",
    "config": "with custom_generate it is sirius_config=",
}


class _Number(NamedTuple):
    """What a setting must be.

    expected: in words.
    whole: an integer.
    right: whether a number of that kind is among those expected.
    drawn: only where tokens are drawn does it matter which number it is.
    """

    expected: str
    whole: bool
    right: Callable[[Any], bool]
    drawn: bool = False


# What transformers would take for something else, or refuse without its name.
_NUMBERS = {
    "max_new_tokens": _Number("an integer, at least 1", True, lambda value: value >= 1),
    "max_length": _Number("an integer, at least 1", True, lambda value: value >= 1),
    "min_new_tokens": _Number("an integer, at least 0", True, lambda value: value >= 0),
    "min_length": _Number("an integer, at least 0", True, lambda value: value >= 0),
    "num_return_sequences": _Number("an integer, at least 1", True, lambda value: value >= 1),
    "max_time": _Number("a number of seconds", False, lambda value: not math.isnan(value)),
    "repetition_penalty": _Number("a number above 0", False, lambda value: value > 0),
    "temperature": _Number(
        "a number above 0 (do_sample=False takes the likeliest tokens)", False, lambda value: 0 < value < math.inf, drawn=True
    ),
    "top_k": _Number("an integer, at least 0 (0: all tokens)", True, lambda value: value >= 0, drawn=True),
    "top_p": _Number("a number above 0, at most 1", False, lambda value: 0 < value <= 1, drawn=True),
    "min_p": _Number("a number, 0 to 1", False, lambda value: 0 <= value <= 1, drawn=True),
    "typical_p": _Number("a number above 0, at most 1", False, lambda value: 0 < value <= 1, drawn=True),
}


def arguments_of(args: tuple[Any, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a generate call by their names, model left out. TypeError as Python has it for too many, or one twice."""
    bound = _signature().bind(None, *args, **settings)
    arguments: dict[str, Any] = dict(bound.arguments)
    del arguments["self"]
    others: dict[str, Any] = arguments.pop("kwargs", {})
    return arguments | others


@functools.cache
def _signature() -> inspect.Signature:
    return inspect.signature(GenerationMixin.generate)


@dataclasses.dataclass(frozen=True)
class Taken:
    """What `transformers`' generate does not hand to a decoding method, and so is taken before it sees the call."""

    streamer: BaseStreamer | None
    stop_strings: str | list[str] | None
    tokenizer: PreTrainedTokenizerBase | None
    generator: torch.Generator | None
    cache: Cache | None


CACHES = ("past_key_values", "cache")


def take(arguments: Mapping[str, Any], model: PreTrainedModel) -> tuple[dict[str, Any], Taken]:
    """Arguments of a generate call without what is taken before `transformers` sees it, and that.

    ValueError or TypeError for an argument or setting that is unknown, cannot be honoured or cannot be right.
    """
    arguments = dict(arguments)
    config = arguments.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config: expected a GenerationConfig, got {type(config).__name__}")
    caches = [arguments.pop(name) for name in CACHES if isinstance(arguments.get(name), Cache)]
    if len(caches) > 1:
        raise ValueError("past_key_values: expected one cache, got both past_key_values and cache")
    refuse(arguments, arguments)
    if config is not None:
        refuse(vars(config), _own_settings(config))
    own = _own_settings(model.generation_config) & vars(GenerationConfig()).keys()
    refuse(vars(model.generation_config), own - {"use_cache"})
    if model.generation_config.use_cache is False and arguments.get("use_cache") is None:
        # As configs say that were kept from a training. Nobody asked for it in this call, and the text is the same.
        arguments["use_cache"] = True
    _check_ids(arguments)
    _check_mask(arguments)
    _check_numbers(arguments, [each for each in (config, model.generation_config) if each is not None])
    strings = arguments.pop("stop_strings", None)
    if config is not None and config.stop_strings is not None:
        config = arguments["generation_config"] = copy.deepcopy(config)
        strings, config.stop_strings = strings if strings is not None else config.stop_strings, None
    if model.generation_config.stop_strings is not None:
        strings = strings if strings is not None else model.generation_config.stop_strings
        arguments["stop_strings"] = None  # in place of the model's own
    _check_strings(strings)
    streamer = arguments.pop("streamer", None)
    if streamer is not None and not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
        raise TypeError(f"streamer: expected an object with put and end, got {type(streamer).__name__}")
    generator = arguments.pop("generator", None)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    return arguments, Taken(streamer, strings, arguments.pop("tokenizer", None), generator, *(caches or [None]))


def refuse(values: Mapping[str, Any], names: Iterable[str]) -> None:
    """ValueError if one of the names is unknown, or has a value that cannot be honoured."""
    given = [name for name in names if not name.startswith("_") and values[name] is not None]
    unknown = sorted(name for name in given if name not in KNOWN)
    if unknown:
        hints = [hint for name in unknown if (hint := _instead_of(name))] or ["misspelt, or newer than this version of it"]
        raise ValueError(f"generate: {', '.join(unknown)} unknown to sirius_ext ({'; '.join(hints)})")
    refused = [_HINTS.get(name, name) for name in given if name in ONLY and not _is_one_of(values[name], ONLY[name])]
    if refused:
        raise ValueError(f"generate: not supported by sirius_ext: {'; '.join(refused)}")


def _instead_of(unknown: str) -> str:
    """What may have been meant by an unknown name; "" if nothing is like it."""
    close = difflib.get_close_matches(unknown, sorted(USED), n=1, cutoff=0.75)
    return _INSTEAD.get(unknown, f"did you mean {close[0]}?" if close else "")


def refuse_resolved(settings: GenerationConfig, config: SiriusConfig, prompts: int, taken: Taken) -> None:
    """ValueError for settings, resolved by `transformers`, that cannot be honoured, or not with this config or together."""
    refuse(vars(settings), ONLY.keys() & vars(settings).keys())
    corrects, sample = config.mode == "sirius", bool(settings.do_sample)
    asked = {
        f"do_sample=True with accept={config.accept!r} (perhaps from the model's own generation config; pass do_sample=False, or "
        'accept="sample")': corrects and sample and config.accept != "sample",
        'accept="sample" without do_sample=True': corrects and not sample and config.accept == "sample",
        "lookup=True with do_sample=True (tokens that are drawn are not copied)": config.lookup is True and sample,
        "num_return_sequences > 1 without do_sample=True": not sample and (settings.num_return_sequences or 1) > 1,
        "a streamer with more than one prompt": taken.streamer is not None and prompts > 1,
        "past_key_values with more than one prompt": taken.cache is not None and prompts > 1,
    }
    refused = [name for name, wanted in asked.items() if wanted]
    if refused:
        raise ValueError(f"generate: not supported by sirius_ext: {'; '.join(refused)}")


def check_surroundings(model: PreTrainedModel) -> None:
    """ValueError for what a call of the model's modules would heed, and decoding, which reads their weights alone, would not:
    forward hooks, replaced methods, dropout, torch.autocast."""
    check_device("model", model.device)
    if torch.is_autocast_enabled(model.device.type):
        raise ValueError(
            f"torch.autocast: not supported around generate; the kernels compute in the weights' own dtype, {model.dtype}: "
            "leave the autocast block, or load the model in the dtype that you want"
        )
    modules = list(model.named_modules())
    if (model.training and getattr(model.config, "attention_dropout", None)) or any(_drops(module) for _, module in modules):
        raise ValueError("model: it is in training mode and has dropout; call model.eval() first")
    if any((nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)):
        raise ValueError("model: global forward hooks are registered in torch, and decoding would bypass them; remove them first")
    for name, module in modules:
        where = f"{name or 'the model'} ({type(module).__name__})"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not _is_idle(hook) for hook in hooks):
            raise ValueError(f"model: {where} has a forward hook, which decoding would bypass; remove it first")
        if "forward" in vars(module):
            raise ValueError(f"model: the forward method of {where} was replaced, and decoding would bypass it")
        if (package := type(module).forward.__module__.partition(".")[0]) not in ("torch", "transformers", "sirius_ext"):
            advice = "load the model without code of its own"
            if package == "peft":
                advice = "merge adapters first, with merge_and_unload"
            raise ValueError(
                f"model: the forward method of {where} is {package}'s, and decoding computes what that of transformers would; "
                f"{advice}"
            )
    # By this method peft's soft prompts and prefixes come into a text: their `generate` replaces it for the time of a call.
    inputs = model.prepare_inputs_for_generation
    package = inputs.__module__.partition(".")[0]
    if package not in ("transformers", "sirius_ext") or getattr(inputs, "__self__", None) is not model:
        raise ValueError(
            f"model: its prepare_inputs_for_generation is {package}'s (peft has soft prompts and prefixes there), and decoding "
            "would bypass it; it needs that of transformers"
        )


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


def _is_idle(hook: object) -> bool:
    """Whether it is one of transformers' own, left behind by a call that asked for hidden states or attentions: these wait for
    the next such call and change nothing. Or that of gradient checkpointing, for which embeddings require gradients. Or ours,
    which only says that a packed model cannot be called."""
    where, name = getattr(hook, "__module__", ""), getattr(hook, "__name__", "")
    of_gradients = (where, name) == ("transformers.modeling_utils", "make_inputs_require_grads")
    return hook is refuse_call or where == "transformers.utils.output_capturing" or of_gradients


def _own_settings(config: GenerationConfig) -> set[str]:
    """What was set in it: those that a new one has otherwise, or not at all."""
    fresh = vars(GenerationConfig())
    return {name for name, value in vars(config).items() if name not in fresh or not _same(value, fresh[name])}


def _same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, (bool, int, float, str)) and one == other)


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    return isinstance(value, (bool, int, float)) and value in allowed


def _check_ids(arguments: dict[str, Any]) -> None:
    """Of any integer type; int64 is what everything after this takes."""
    name = "inputs" if arguments.get("inputs") is not None else "input_ids"
    ids = arguments.get(name)
    if ids is None:
        return
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"input_ids: expected an integer tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"input_ids: expected an integer tensor, got {ids.dtype}")
    if ids.dim() != 2 or len(ids) == 0:
        raise ValueError(f"input_ids: expected shape [batch, t], got {list(ids.shape)}")
    arguments[name] = ids.long()


def _check_mask(arguments: Mapping[str, Any]) -> None:
    mask = arguments.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(mask).__name__}")
    ids = next((arguments[name] for name in ("inputs", "input_ids") if arguments.get(name) is not None), None)
    if ids is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(ids.shape)}, got {list(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask: expected zeros and ones, got other numbers")


def _check_numbers(arguments: dict[str, Any], configs: Iterable[GenerationConfig]) -> None:
    """Those that are in effect. Numbers of numpy and torch among the arguments become Python's, of which transformers asks some
    settings to be. configs: the given one and the model's own, in this order."""

    def in_effect(name: str) -> Any:
        if name in arguments:
            return arguments[name]
        return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)

    for name, number in _NUMBERS.items():
        given = in_effect(name)
        if given is None:
            continue
        value = _as_python(given)
        kind = numbers.Integral if number.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name}: expected {number.expected}, got {given!r}")
        if (in_effect("do_sample") or not number.drawn) and not number.right(value):
            raise ValueError(f"{name}: expected {number.expected}, got {given!r}")
        if name in arguments:
            arguments[name] = value
    for name, expected in (("eos_token_id", "a token id or a list of them"), ("pad_token_id", "a token id")):
        given = in_effect(name)
        tokens = _as_python(given)
        listed = tokens if name == "eos_token_id" and isinstance(tokens, (list, tuple)) else [tokens]
        integers = (isinstance(each, numbers.Integral) and not isinstance(each, bool) for each in map(_as_python, listed))
        if given is not None and not all(integers):
            raise TypeError(f"{name}: expected {expected}, got {given!r}")


def _as_python(value: Any) -> Any:
    """A scalar of numpy or torch as a number, an array or tensor as a list, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _check_strings(strings: object) -> None:
    if strings is None:
        return
    listed = [strings] if isinstance(strings, str) else strings
    if not isinstance(listed, (list, tuple)) or not all(isinstance(each, str) for each in listed):
        raise TypeError(f"stop_strings: expected a string or a list of strings, got {strings!r}")
    if "" in listed:
        raise ValueError(f"stop_strings: expected strings of at least one character, got {strings!r}")
