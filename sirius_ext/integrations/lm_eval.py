"""EleutherAI's lm-evaluation-harness with our engine: the model `sirius`.

Imported by lm-eval's plug-in entry point, in versions that have one, and by `python -m sirius_ext lm_eval` everywhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from ..config import GREEDY, SiriusConfig
from ..decoding.calibrate import load_thresholds
from ..decoding.reading import Reader
from ..decoding.sparsity import sparsity_of, without_chance
from ..decoding.stats import PromptStats, Stats
from ..decoding.thresholds import read_thresholds
from ..engine import Engine, prepare
from ..kernels.threads import choose_threads
from ..models.hub import parse_dtype

SCORERS = ("full", "sparse")
_log = logging.getLogger(__name__)


@register_model("sirius")
class SiriusLM(TemplateLM):
    """pretrained: Hugging Face id, local folder, GGUF file, or a ready `Engine`.
    loglikelihood: "full" or "sparse", the model that scores given texts; by default "sparse" if the mode is, else "full".
    max_gen_toks: new tokens at most, where a task says nothing.
    batch_size, max_batch_size: lm-eval passes them; requests are decoded one by one.
    config: fields of `SiriusConfig`.

    A request that fails is logged, counted and answered with an empty text. Too long a context loses its beginning.
    """

    def __init__(
        self,
        pretrained: str | Engine | None = None,
        dtype: str = "bfloat16",
        device: str | int = "cpu",
        threads: int | None = None,
        weights: str = "plain",
        loglikelihood: str | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **config: Any,
    ) -> None:
        super().__init__()
        names = [field.name for field in dataclasses.fields(SiriusConfig)]
        unknown = sorted(set(config) - set(names))
        if unknown:
            own = ("pretrained", "dtype", "device", "threads", "weights", "loglikelihood", "max_gen_toks")
            raise ValueError(f"model_args: expected some of {', '.join((*own, *names))}, got {', '.join(unknown)}")
        self.config = SiriusConfig(**config)
        self.scorer = loglikelihood or ("sparse" if self.config.mode == "sparse" else "full")
        if self.scorer not in SCORERS:
            raise ValueError(f"loglikelihood: expected one of {', '.join(SCORERS)}, got {loglikelihood!r}")
        if self.config.thresholds is not None:
            read_thresholds(self.config.thresholds, self.config.density_with())
        # lm-eval makes numbers and booleans of what looks like them.
        if pretrained is not None and not isinstance(pretrained, (str, os.PathLike, Engine)):
            raise TypeError(f"pretrained: expected a Hugging Face id, a folder or a GGUF file, got {pretrained!r}")
        if isinstance(max_gen_toks, bool) or not isinstance(max_gen_toks, int) or max_gen_toks < 1:
            raise ValueError(f"max_gen_toks: expected an integer of at least 1, got {max_gen_toks!r}")
        if threads is not None:
            choose_threads(threads)
        if isinstance(device, int) and not isinstance(device, bool):
            device = f"cuda:{device}"
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            _log.warning("no CUDA device that torch can use: decoding on the CPU")  # lm-eval asks for CUDA by itself
            device = "cpu"
        if isinstance(pretrained, Engine):
            self.engine = pretrained
            self.config = without_chance(self.config, prepare(pretrained.model).weights.leave_no_choice)
        else:
            self.config = without_chance(self.config, weights != "plain")
            self.engine = Engine.from_pretrained(pretrained, self.config, device, parse_dtype(dtype), weights=weights)
        if self.engine.tokenizer is None:
            raise ValueError("pretrained: it has no tokenizer, so a task's texts cannot be read")
        self.tokenizer = self.engine.tokenizer
        self.max_gen_toks = max_gen_toks
        self._model = prepare(self.engine.model)
        self.weights = self._model.weights
        if self.config.thresholds is not None:
            # For this model? Otherwise every request would fail, one by one.
            load_thresholds(self.config.thresholds, self.weights, self.config.density_with())
        self._stop = functools.lru_cache(self._stopping)  # making one takes seconds with a large vocabulary
        self.prompts: list[PromptStats] = []
        self.failed = self.truncated = 0

    # ---------------------------------------------------------------------------------------------------- what lm-eval asks

    @property
    def max_length(self) -> int:
        return self.weights.context

    @property
    def eot_token_id(self) -> int:
        eos: int = self.tokenizer.eos_token_id
        return eos

    @property
    def prefix_token_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        name: str = self.tokenizer.name_or_path
        return name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval puts it into the `config` of a result file."""
        config = dataclasses.asdict(self.config) | {"thresholds": self.config.thresholds and str(self.config.thresholds)}
        stats = Stats(self.prompts).metrics() | {"tokens": Stats(self.prompts).tokens} if self.prompts else {}
        counts = {"texts": len(self.prompts), "failed": self.failed, "truncated": self.truncated}
        return {
            "model_num_parameters": self.weights.num_parameters,
            "model_dtype": str(self.weights.dtype),
            "sirius": {**config, "loglikelihood": self.scorer, "stats": {**counts, **stats}},
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """By default as the tokenizer does, but no second first token where a chat template has put one."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        tokens: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return tokens

    # ------------------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in tqdm(requests, desc="sirius: generate_until", disable=disable_tqdm):
            context, asked = request.args
            settings = self._settings(asked)
            try:
                text = self._generate(context, *settings)
            except (RuntimeError, ValueError, MemoryError) as error:
                self.failed += 1
                _log.warning("a request failed and counts as an empty text: %s: %s", type(error).__name__, error)
                text = ""
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _settings(self, asked: dict[str, Any]) -> tuple[tuple[str, ...], int, dict[str, Any]]:
        """Stop strings, new tokens at most, and what `Engine.generate` is to be told of the rest. ValueError for sampling that
        the config does not do."""
        rest = dict(asked)
        until, limit = rest.pop("until", None) or (), rest.pop("max_gen_toks", self.max_gen_toks)
        sample = bool(rest.pop("do_sample", False)) and rest.get("temperature", 1) != 0
        if self.config.mode == "sirius" and sample != (self.config.accept == "sample"):
            raise ValueError(
                f"gen_kwargs: do_sample={sample} and accept={self.config.accept} do not go together; "
                f"model_args accept={'sample' if sample else 'threshold or match'} does"
            )
        return (until,) if isinstance(until, str) else tuple(until), limit, {**rest, "do_sample": True} if sample else GREEDY

    def _generate(self, context: str, until: tuple[str, ...], limit: int, settings: dict[str, Any]) -> str:
        if not 0 < limit < self.max_length:
            raise ValueError(f"max_gen_toks: expected 1 to {self.max_length - 1}, got {limit}")
        tokens = self._fitting(self.tok_encode(context), self.max_length - limit)
        stop = self._stop(until) if until else None
        ids = torch.tensor([tokens])
        out = self.engine.generate(
            ids, torch.ones_like(ids), config=self.config, max_new_tokens=limit, stopping_criteria=stop, **settings
        )
        assert out.stats is not None and out.sequences is not None
        self.prompts += out.stats.prompts
        text: str = self.tokenizer.decode(out.sequences[0, len(tokens) :], skip_special_tokens=True)
        return text[: min((text.find(string) for string in until if string in text), default=len(text))]

    def _stopping(self, until: tuple[str, ...]) -> StoppingCriteriaList:
        return StoppingCriteriaList([StopStringCriteria(self.tokenizer, list(until))])

    def _fitting(self, tokens: list[int], room: int) -> list[int]:
        self.truncated += len(tokens) > room
        return tokens[-room:]

    # --------------------------------------------------------------------------------------------------------- log-likelihood

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        fitted = []
        for key, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"continuation: expected 1 to {self.max_length} tokens, got {len(continuation)}")
            # The last token is judged, not read: it takes no room.
            fitted.append((key, self._fitting(context, self.max_length + 1 - len(continuation)), continuation))
        thresholds = None
        if self.scorer == "sparse" and self.config.thresholds is not None:
            thresholds = load_thresholds(self.config.thresholds, self.weights, self.config.density_with())
        reader = Reader(self._model, max((len(context) + len(rest) for _, context, rest in fitted), default=1))
        answers, before = [], None
        for key, context, continuation in tqdm(fitted, desc=f"loglikelihood, {self.scorer}", disable=disable_tqdm):
            if context != before:  # the choices of a question come one after the other
                self._read(reader, torch.tensor(context), thresholds)
                before = context
            reader.back_to(len(context))
            tokens = torch.tensor(continuation, dtype=torch.int32)
            scores, likeliest = reader.score(tokens)
            answers.append((float(scores.double().sum()), bool((likeliest == tokens).all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[-1])
        return answers

    def _read(self, reader: Reader, context: torch.Tensor, thresholds: torch.Tensor | None) -> None:
        """F reads it. Or, for S, all of it but the last token, as S decodes after F's prefill: what S then reads, the last token
        among it, is judged by S. (A context of one token has none to spare: F reads it.)"""
        if self.scorer == "full":
            reader.prefill(context)
            return
        alone = max(1, len(context) - 1)
        reader.prefill(context[:alone], sparsity_of(self.config, self.weights, thresholds))
        reader.score(context[alone:].int())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        answers = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            answers.append(sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers
