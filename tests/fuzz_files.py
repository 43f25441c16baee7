"""Loads damaged model files, each in a process of its own, forked from this one, which has imported what takes seconds.

usage: fuzz_files.py FILE KIND FIRST COUNT SCRATCH      KIND is gguf or safetensors (FILE stands in a model's folder then)

Case i changes bytes of the file's header by a generator seeded with i; case 0 leaves it whole. A line per case gives its number,
and "ok", "refused:" with the message, or what must not happen: another exception, a signal, a hang, a message of several lines.
"""

import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from pathlib import Path

import torch

from sirius_ext.models import hub

SECONDS = 20  # a load takes well under one
BYTES = 8 << 30  # of address space: a length field of 2**60 must not take the machine down
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def header_length(data: bytes, kind: str) -> int:
    """Bytes in front of the tensors' numbers, about."""
    return 8 + struct.unpack("<Q", data[:8])[0] if kind == "safetensors" else data.index(b"blk.1.attn_norm.weight")


def damaged(data: bytes, kind: str, seed: int) -> bytes:
    rng, end = random.Random(seed), header_length(data, kind)
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16)) if seed else 0):
        place = rng.randrange(end)
        match rng.randrange(6):
            case 0:
                data[place] = rng.choice(INTERESTING)
            case 1:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                data[place : place + 8] = struct.pack("<Q", rng.choice((0, 1, 1 << 31, 1 << 62, (1 << 64) - 1)))
            case 3:
                del data[place : place + rng.randrange(1, 64)]
            case 4:
                data[place:place] = rng.randbytes(rng.randrange(1, 64))
            case 5:
                del data[max(8, place) :]
        end = max(1, min(end, len(data)))
    return bytes(data)


def attempt(file: Path, kind: str) -> str:
    try:
        hub.load_model(file if kind == "gguf" else file.parent, torch.float32, progress=False)
    except hub.ModelLoadError as error:
        return "refused: " + str(error) if "\n" not in str(error) and str(error).startswith("model: ") else f"unclear: {error!r}"
    except BaseException:
        return "escaped: " + repr(traceback.format_exc())
    return "ok"


def case(file: Path, kind: str, seed: int, scratch: Path) -> str:
    folder = scratch / "model"
    shutil.copytree(file.parent, folder)
    (folder / file.name).write_bytes(damaged(file.read_bytes(), kind, seed))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        os.environ["SIRIUS_CACHE"] = str(scratch / "cache")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writing, attempt(folder / file.name, kind).encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(folder)
    shutil.rmtree(scratch / "cache", ignore_errors=True)
    return said if status == 0 else f"ended: status {status}"


def main(file: str, kind: str, first: str, count: str, scratch: str) -> None:
    torch.set_num_threads(1)
    for seed in range(int(first), int(first) + int(count)):
        print(seed, case(Path(file), kind, seed, Path(scratch)), flush=True)


if __name__ == "__main__":
    # What a load imports, before the first fork.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: F401

    main(*sys.argv[1:])
