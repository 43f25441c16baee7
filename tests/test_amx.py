"""AMX on machines that have none: the tiles in C++ (csrc/cpu/amx_soft.h), by name and in place of AMX's own instructions
(csrc/cpu/amx_trap.cpp), and the bits of what is computed with tiles."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_q4
import test_q8
import torch
from backends import assert_same_bits, randn, using

from sirius_ext.kernels import ops
from sirius_ext.kernels.matrix import Format, Matrix

ISAS = ops.available_isas()
BY_TILES = [isa for isa in ("amx", "amx-soft") if isa in ISAS]
pytestmark = pytest.mark.skipif("avx2" not in ISAS, reason="no FMA, by which the tiles in C++ multiply")
needs_avx512 = pytest.mark.skipif("avx512" not in ISAS, reason="no AVX-512, which the bodies for AMX use beside tiles")

SOURCE = r"""
#ifdef HARDWARE
#include <immintrin.h>
#include <cstdint>
#else
#include "csrc/cpu/amx_soft.h"
#endif

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  Config(int m, int k, int n) {
    const int shapes[3][2] = {{m, 4 * n}, {m, 4 * k}, {k, 4 * n}};
    for (int t = 0; t < 3; ++t) rows[t] = shapes[t][0], bytes[t] = shapes[t][1];
  }
};

// c [m, n] += a [m, k] * b [k, n], in elements of four bytes; rows lie 64 bytes apart.
extern "C" void multiply(bool integers, int m, int k, int n, const void* a, const void* b, void* c) {
  const Config config(m, k, n);
  __asm__ volatile("" ::"m"(config));  // GCC knows of eight bytes that are read
  _tile_loadconfig(&config);
  _tile_loadd(0, c, 64);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
  if (integers)
    _tile_dpbsud(0, 1, 2);
  else
    _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 64);
  _tile_release();
  __asm__ volatile("" ::: "memory");
}

#ifndef HARDWARE  // assemblers refuse one of them
extern "C" void fault(int kind) {
  Config config(8, 4, 2);
  if (kind == 1) config.rows[3] = 17, config.bytes[3] = 64;
  if (kind == 2) config.rows[3] = 1;
  if (kind == 3) config.reserved[5] = 1;
  if (kind == 4) config.rows[8] = 1;
  if (kind == 5) config.rows[2] = 3;
  if (kind == 6) config.bytes[1] = 15;
  if (kind == 7) config.palette = 2;
  _tile_loadconfig(&config);
  if (kind == 8) _tile_zero(3);
  if (kind == 9) _tile_dpbsud(0, 1, 1);
  if (kind == 10) _tile_release();
  _tile_dpbf16ps(0, 1, 2);
}
#endif
"""
FAULTS = [
    (1, "ldtilecfg: a tile of more than 16 rows"),
    (2, "ldtilecfg: rows without bytes"),
    (3, "ldtilecfg: reserved bytes"),
    (4, "ldtilecfg: reserved bytes"),
    (5, "tdpbf16ps: tiles that do not fit"),
    (6, "tdpbf16ps: rows that are no multiple of four"),
    (7, "ldtilecfg: a palette"),
    (8, "tilezero: a tile that is not configured"),
    (9, "tdpbsud: the same tile twice"),
    (10, "tdpbf16ps: a tile that is not configured"),
]


def built(folder: Path, *flags: str) -> Path:
    source, library = folder / "tiles.cpp", folder / f"tiles{''.join(flags)}.so"
    source.write_text(SOURCE)
    root = Path(__file__).resolve().parent.parent
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-mfma", *flags]
    subprocess.run([*command, "-shared", "-fPIC", f"-I{root}", source, "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return built(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module", params=["soft", "instructions"] if BY_TILES else ["soft"])
def tiles(request, library):
    """The products of tiles, and AMX's own instructions: the CPU's where there is AMX, else what stands in for them."""
    if request.param == "soft":
        return ctypes.CDLL(str(library))
    with using(f"cpu-{BY_TILES[0]}"):  # from its first op on, it does
        ops.linear(randn(1, 32, dtype=torch.bfloat16), randn(1, 32, dtype=torch.bfloat16))
    return ctypes.CDLL(str(built(library.parent, "-DHARDWARE", "-mamx-tile", "-mamx-bf16", "-mamx-int8")))


def padded(content: np.ndarray, rows: int) -> np.ndarray:
    """As rows of 64 bytes, with bytes of 255 after what is there."""
    out = np.full((16, 64), 255, np.uint8)
    out[:rows, : content.nbytes // rows] = content.view(np.uint8).reshape(rows, -1)
    return out


def multiply(tiles, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a * b; a: [m, 4 k bytes], b: [k, 4 n bytes], c: [m, n] of four bytes each."""
    (m, n), k = c.shape, b.shape[0]
    held = [padded(each, rows) for each, rows in ((a, m), (b, k), (c, m))]
    before = held[2].copy()
    tiles.multiply(c.dtype == np.int32, m, k, n, *(each.ctypes.data_as(ctypes.c_void_p) for each in held))
    assert (held[2][m:] == before[m:]).all() and (held[2][:, 4 * n :] == before[:, 4 * n :]).all(), "written beyond the tile"
    return held[2][:m, : 4 * n].copy().view(c.dtype)


SHAPES = [(16, 16, 16), (1, 16, 16), (16, 8, 16), (8, 8, 16), (3, 5, 7), (16, 1, 1)]


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_products_of_bytes(tiles, m, k, n):
    random = np.random.default_rng(0)
    a, b = random.integers(-128, 128, (m, 4 * k)).astype(np.int8), random.integers(0, 256, (k, 4 * n)).astype(np.uint8)
    c = random.integers(-(2**31), 2**31, (m, n)).astype(np.int32)
    products = a.astype(np.int64) @ b.reshape(k, n, 4).transpose(0, 2, 1).reshape(4 * k, n).astype(np.int64)
    assert (multiply(tiles, a, b, c) == (c + products).astype(np.int32)).all(), "sums are modulo 2^32"


def bf16(numbers) -> np.ndarray:
    """Rounded toward zero, as 16 bits."""
    return (np.asarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_products_of_bf16(tiles, m, k, n):
    """In the order of Intel's manual: even and odd elements apart, each product added with one rounding, then both, then c."""
    random = np.random.default_rng(0)
    a, b = bf16(random.standard_normal((m, 2 * k))), bf16(random.standard_normal((k, 2 * n)))
    c = random.standard_normal((m, n)).astype(np.float32)
    sums = np.zeros((2, m, n), np.float32)
    for half in range(2):
        for i in range(k):  # float64 holds a product and a sum of such numbers exactly
            product = np.outer(as_float(a)[:, 2 * i + half].astype(np.float64), as_float(b)[i, half::2].astype(np.float64))
            sums[half] = (sums[half].astype(np.float64) + product).astype(np.float32)
    assert (multiply(tiles, a, b, c) == c + (sums[0] + sums[1])).all()


@pytest.mark.parametrize(
    "a, b, c, expected",
    [
        ((2.0**-127, 0), (2.0**100, 0), 1.0, 1.0),  # a subnormal factor is zero
        ((2.0**100, 0), (0, 2.0**-127), 0.0, 0.0),
        ((2.0**-70, 0), (2.0**-70, 0), 0.0, 0.0),  # so is a subnormal product
        ((0, 0), (0, 0), 2.0**-127, 0.0),  # and a subnormal sum, on the way in
        ((2.0**-126, 0), (1.5, 0), -(2.0**-126), 0.0),  # and out: 2^-127
        ((1.0, 1.0), (2.0**24, -(2.0**24)), 1.0, 1.0),  # the products are added up before c
        ((np.inf, 0), (1.0, 0), 1.0, np.inf),
        ((np.inf, 0), (0, 0), 1.0, np.nan),
    ],
)
def test_numbers_at_the_edges(tiles, a, b, c, expected):
    result = multiply(tiles, bf16([a]), bf16([b]), np.array([[c]], np.float32))
    assert np.array_equal(result, [[np.float32(expected)]], equal_nan=True)


@pytest.mark.parametrize("kind, message", FAULTS)
def test_faults_are_found(library, kind, message):
    command = f"import ctypes; ctypes.CDLL({str(library)!r}).fault({kind})"
    run = subprocess.run([sys.executable, "-S", "-c", command], capture_output=True, text=True)
    assert run.returncode == -signal.SIGABRT and f"amx_soft: {message}" in run.stderr


@needs_avx512
def test_it_is_there_for_tests_alone():
    assert "amx-soft" in ISAS and ops.isa() != "amx-soft", "`make test` builds it, and only its name chooses it"


MATRICES = {
    "q8": lambda width: test_q8.three(Format.Q8, width),
    "q8_upper": lambda width: test_q8.three(Format.Q8_UPPER, width),
    "q4": lambda width: test_q4.three(False, width),
    "q4_k": lambda width: test_q4.three(True, width),
}
if "amx" in ISAS:  # where the tiles in C++ have something to be compared with
    MATRICES["bf16"] = lambda width: [Matrix(torch.randn(65, width).bfloat16()) for _ in range(3)]


@needs_avx512
@pytest.mark.parametrize("width", [151, 1600])
@pytest.mark.parametrize("weights", MATRICES)
def test_same_bits(weights, width):
    """Of packed weights VNNI's, whatever the number of rows of input: with few of them there are no tiles."""
    matrices = MATRICES[weights](width)
    x, z = randn(40, width, dtype=torch.bfloat16), randn(40, 65, dtype=torch.bfloat16)
    for m in (1, 8, 12, 13, 16, 17, 29, 40):
        with using("cpu-amx-soft" if weights == "bf16" else "cpu-avx512") as kernels:
            expected = test_q8.everything(kernels, x[:m], z[:m], matrices)
        for isa in BY_TILES:
            with using(f"cpu-{isa}") as kernels:
                for out, same in zip(test_q8.everything(kernels, x[:m], z[:m], matrices), expected):
                    assert_same_bits(out, same)
