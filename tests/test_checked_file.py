"""Parts of a file: every byte as it was, or an error."""

import errno
import os
import threading

import pytest
import torch

from sirius_ext.models import checked_file
from sirius_ext.models.checked_file import BLOCK, CheckedFile, block_sums

SIZE = 5 * BLOCK + 1234


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8)


@pytest.fixture
def path(tmp_path, data):
    (tmp_path / "file.bin").write_bytes(data.numpy().tobytes())
    return tmp_path / "file.bin"


PLACES = [([0], SIZE), ([0, 1, 8], 8), ([BLOCK - 3, 2 * BLOCK], 6), ([SIZE - 10, 5], 10), ([5 * BLOCK], 1234), ([7], 4 * BLOCK)]


@pytest.mark.parametrize("at_once", [checked_file._AT_ONCE, 0])
@pytest.mark.parametrize("piece", [1 << 22, 1000, BLOCK])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("places, size", PLACES, ids=str)
def test_any_part(path, data, monkeypatch, places, size, short, piece, at_once):
    """Whatever the disk gives at a time, and whether the page cache may be asked by itself."""
    monkeypatch.setattr(checked_file, "_PIECE", piece)
    monkeypatch.setattr(checked_file, "_AT_ONCE", at_once)
    if short:
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, buffers, *where: preadv(file, [buffers[0][:777]], *where))
    file = CheckedFile(path, block_sums(data))
    assert torch.equal(file.read(places, size), torch.stack([data[at : at + size] for at in places]))


@pytest.mark.parametrize("at_once", [checked_file._AT_ONCE, 0])
def test_whatever_torch_is_set_to(path, data, monkeypatch, at_once):
    monkeypatch.setattr(checked_file, "_AT_ONCE", at_once)
    file = CheckedFile(path, block_sums(data))
    with torch.inference_mode(), torch.device("meta"):
        found = file.read([BLOCK - 3], 6)
    assert torch.equal(found[0], data[BLOCK - 3 : BLOCK + 3]) and not found.is_inference()


def test_whole_blocks(tmp_path, data):
    (tmp_path / "file.bin").write_bytes(data[: 2 * BLOCK].numpy().tobytes())
    file = CheckedFile(tmp_path / "file.bin", block_sums(data[: 2 * BLOCK]))
    assert torch.equal(file.read([0], 2 * BLOCK)[0], data[: 2 * BLOCK])


def test_a_byte_that_changes(path, data):
    """It is found by whoever reads its block, and by nobody else; once it is right again there is no error."""
    file = CheckedFile(path, block_sums(data))
    with open(path, "r+b") as stream:
        for at in (2 * BLOCK + 17, SIZE - 1):
            stream.seek(at)
            stream.write(bytes([255 - int(data[at])]))
            stream.flush()
            message = (
                rf"^{path}: from byte {at // BLOCK * BLOCK} on it is not what was written: the file was changed, or the disk"
            )
            with pytest.raises(OSError, match=message):
                file.read([0, at // BLOCK * BLOCK + 5], 2)
            file.read([0, 2 * BLOCK - 4, 3 * BLOCK], 4)
            stream.seek(at)
            stream.write(bytes([int(data[at])]))
            stream.flush()
    assert torch.equal(file.read([0], SIZE)[0], data)


def test_a_file_that_is_cut_off(path, data):
    """A mapped one would end the process."""
    file = CheckedFile(path, block_sums(data))
    os.truncate(path, BLOCK + 100)
    assert torch.equal(file.read([0], BLOCK)[0], data[:BLOCK])
    for at in (BLOCK, BLOCK + 50, 3 * BLOCK):
        with pytest.raises(OSError, match=rf"^{path}: it ends at byte \d+: it was cut off$"):
            file.read([at], 60)
    os.truncate(path, SIZE - 1)
    with pytest.raises(OSError, match="is not what was written"):
        file.read([SIZE - 1], 1)
    with pytest.raises(FileNotFoundError):
        CheckedFile(path.with_name("nowhere"), block_sums(data))


def test_a_disk_that_reports_an_error(path, data, monkeypatch):
    file = CheckedFile(path, block_sums(data))

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=rf"^{path}: reading at byte {BLOCK}: Input/output error$"):
            file.read([BLOCK + 1], 5)
    assert torch.equal(file.read([BLOCK + 1], 5)[0], data[BLOCK + 1 : BLOCK + 6])


def test_a_disk_that_gives_nothing(path, data, monkeypatch):
    """It is given up; one that is slow is not. What is in memory is not waited for."""
    preadv, waiting = os.preadv, threading.Event()

    def in_memory(file, buffers, at, flags):
        assert flags == checked_file._AT_ONCE
        return preadv(file, buffers, at)

    file = CheckedFile(path, block_sums(data), patience=0.5)

    def slow(file, buffers, at, flags):
        if flags:
            raise BlockingIOError
        waiting.wait(0.1)
        return preadv(file, buffers, at)

    def stalls(file, buffers, at, flags):
        if flags:
            raise BlockingIOError
        waiting.wait()

    monkeypatch.setattr(os, "preadv", in_memory)
    assert torch.equal(file.read([3], 8)[0], data[3:11])
    monkeypatch.setattr(os, "preadv", slow)
    places = [at * 8 for at in range(10)]
    assert torch.equal(file.read(places, 8), data[:80].view(10, 8))
    monkeypatch.setattr(os, "preadv", stalls)
    with pytest.raises(OSError, match=rf"^{path}: the disk has not given anything for 0 seconds$"):
        file.read([0], 8)
    waiting.set()
