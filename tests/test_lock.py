"""What `make lock` wrote is what pyproject.toml asks for, exact, and tied to no machine."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {
    "demo": ["demo.txt"],
    "dev": ["demo.txt", "dev.txt"],
    "bench": ["demo.txt", "bench.txt"],
    "serve": ["demo.txt", "serve.txt"],
    "oldest": ["oldest.txt"],
}
FILES = sorted(path.name for path in (ROOT / "requirements").glob("*.txt"))


def lines(file: str) -> list[str]:
    """One for each package, with its hashes."""
    text = (ROOT / "requirements" / file).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def packages(*files: str) -> list[Requirement]:
    """Those of this Python and platform."""
    made = [Requirement(line.split(" --hash=")[0]) for file in files for line in lines(file)]
    return [each for each in made if each.marker is None or each.marker.evaluate()]


def wanted(part: str) -> list[Requirement]:
    """What pyproject.toml asks for directly: for the build, for the package, and with an extra."""
    made = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = made["project"]["optional-dependencies"]
    found = [*made["build-system"]["requires"], *made["project"]["dependencies"]]
    dev = [*extras["dev"], *extras["eval"], *extras["lm-eval"], *extras["serve"]]
    found += {"demo": [], "bench": extras["bench"], "serve": extras["serve"]}.get(part, dev)
    found = [Requirement(each) for each in found if not each.startswith("sirius_ext")]
    return [each for each in found if each.marker is None or each.marker.evaluate()]


@pytest.mark.parametrize("file", FILES)
def test_every_line_is_one_exact_version(file):
    for line in lines(file):
        assert re.match(r"[a-z0-9-]+==[0-9][0-9a-z.]*( +;|  *--hash=|$)", line), line
        assert "://" not in line and "@" not in line


@pytest.mark.parametrize("file", ["demo.txt", "dev.txt", "bench.txt", "serve.txt"])
def test_installed_files_are_known(file):
    assert all("--hash=sha256:" in line for line in lines(file))


@pytest.mark.parametrize("part", LOCKS)
def test_holds_what_is_asked_for(part):
    torch = "torch-oldest.txt" if part == "oldest" else "torch.txt"
    held = {each.name: next(iter(each.specifier)).version for each in packages(*LOCKS[part], torch)}
    for each in wanted(part):
        version = held[canonicalize_name(each.name)]
        assert each.specifier.contains(version), f"{each} is {version}: `make lock` writes the locks anew"


def test_no_package_has_two_versions():
    held = {(each.name, str(each.specifier)) for each in packages("demo.txt", "dev.txt", "bench.txt", "serve.txt", "torch.txt")}
    assert len(held) == len({name for name, _ in held})


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("torch")])
def test_the_build_of_torch_is_a_choice(file):
    readers = {"nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"}  # of what nvcc builds: nothing of torch's
    names = {each.name for each in packages(file)} - readers
    assert not [name for name in names if re.match(r"torch$|triton|nvidia-|cuda-", name)]
