"""llama.cpp as a user would run it, through the PyPI package xllamacpp, in a process of its own; and GGUF files of other types
for it."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from variants import check_known

KINDS = {"own": None, "bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}


def converted(source: Path, kind: str) -> Path:
    """The GGUF file `source` with its matrices of another type, written into the cache folder unless it is there; norms and
    biases stay float32. "own" is the file itself."""
    if KINDS[kind] is None:
        return source
    import gguf
    import numpy as np

    from sirius_ext.models.hub import cache_dir

    target = cache_dir() / f"{source.stem}-{kind}.gguf"
    if target.exists():
        return target
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    partial = target.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    quant = gguf.GGMLQuantizationType[KINDS[kind]]
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if len(tensor.shape) > 1:
            writer.add_tensor(tensor.name, gguf.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


class LlamaCpp:
    """A llama.cpp process that waits for prompts; idle, it takes no CPU time."""

    def __init__(self, model: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def generate(self, prompt: list[int], max_new_tokens: int) -> dict[str, float]:
        """Decode greedily. Returns `tokens`, `seconds` of decoding and `prompt_seconds` of prefill."""
        self._process.stdin.write(json.dumps({"prompt": prompt, "n_predict": max_new_tokens}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"tokens"'):
                return json.loads(line)
        raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def running(gguf: Path | None, kinds: Iterable[str], threads: int) -> Iterator[dict[str, LlamaCpp]]:
    """A process for each kind of a GGUF file's weights, by the kind; none without a file."""
    with contextlib.ExitStack() as stack:
        found = {}
        for kind in kinds if gguf is not None else ():
            found[kind] = LlamaCpp(converted(gguf, kind), threads)
            stack.callback(found[kind].close)
        yield found


def check_named(options: argparse.Namespace) -> None:
    """ValueError for what a benchmark's options name for llama.cpp that is not known, or not there."""
    check_known("llama_types", options.llama_types, KINDS)
    if options.gguf is not None and not options.gguf.is_file():
        raise ValueError(f"gguf: there is no file {options.gguf}")


def gguf_of(options: argparse.Namespace) -> Path | None:
    """The file for llama.cpp that a benchmark's options name, or the default model's; None where it is skipped or not known."""
    from sirius_ext.models.hub import DEFAULT_MODEL, default_model_path

    if "llama.cpp" in options.skip:
        return None
    return options.gguf or (default_model_path() if options.model == DEFAULT_MODEL else None)


def server_of(model: Path | str, threads: int, context: int, mapped: bool = False):
    """A llama.cpp server in this process, by its package, with its own defaults for all else. context: tokens that it has room
    for. mapped: weights are read through the page cache, as far as they are not repacked; else llama.cpp chooses."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx, params.n_parallel, params.cache_prompt = context, 1, False
    if mapped:
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    return xllamacpp.Server(params)


def _serve(model: str, threads: int) -> None:
    server = server_of(model, threads, context=4096)
    for line in sys.stdin:
        reply = server.handle_completions({**json.loads(line), "temperature": 0, "cache_prompt": False})
        timings = (reply if isinstance(reply, dict) else json.loads(reply))["timings"]
        prompt, decoded = timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3
        print(json.dumps({"tokens": timings["predicted_n"], "seconds": decoded, "prompt_seconds": prompt}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
