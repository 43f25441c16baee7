"""The options of `serve`, all of which are looked at before the model is loaded."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sirius_ext.cli.main import main
from sirius_ext.loading import parse_size


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from other machines; set --api-key or SIRIUS_API_KEY first"),
        (["--api-key", "two words"], "--api-key: expected printable ASCII characters without spaces"),
        (["--accept", "sample"], "--accept: expected threshold or match"),
        (["--temperature", "3"], "--temperature: expected 0 to 2, got 3.0"),
        (["--cache-memory", "much"], "--cache-memory: expected a size as 500M, 6GB or 1.5GiB, got 'much'"),
        (["--max-body", "0"], "--max-body: expected more than 0 bytes, got '0'"),
        (["--max-body", "much"], "--max-body: expected a size as 500M, 6GB or 1.5GiB, got 'much'"),
        (["--port", "70000"], "--port: expected 0 to 65535"),
        (["--mode", "full", "--period", "4"], "--period: --mode full does not use it"),
        (["--model", "/no/such/model", "--port", "0"], "/no/such/model"),
    ],
    ids=str,
)
def test_what_is_refused(capsys, monkeypatch, arguments, error):
    monkeypatch.delenv("SIRIUS_API_KEY", raising=False)
    assert main(["serve", *arguments]) == 2
    assert error in capsys.readouterr().err


def test_a_key_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("SIRIUS_API_KEY", "two words")
    assert main(["serve"]) == 2 and "SIRIUS_API_KEY: expected printable" in capsys.readouterr().err
    monkeypatch.setenv("SIRIUS_API_KEY", "secret")
    assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--model", "/no/such"]) == 2
    assert "/no/such" in capsys.readouterr().err, "with a key any host will do"


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"--port: 127.0.0.1:{port} cannot be listened on: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve"]) == 2
    error = capsys.readouterr().err
    assert f"serve needs {package}" in error and "pip install '.[serve]' in the clone" in error


def test_nothing_else_needs_the_extra():
    """Neither the package nor the other commands, the chat included."""
    code = "import sys; sys.modules |= dict.fromkeys(['fastapi', 'starlette', 'uvicorn', 'prometheus_client'])\n"
    code += "from sirius_ext.cli.main import main; raise SystemExit(main(['chat', '--messages', '/no/such']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no file /no/such" in done.stderr, done.stderr


def test_the_page_is_part_of_the_package():
    """And loads nothing from elsewhere."""
    folder = Path(main.__code__.co_filename).parents[1] / "serving" / "page"
    files = {file.name: file.read_text() for file in folder.iterdir()}
    assert set(files) == {"index.html", "style.css", "page.js", "icon.svg"}
    assert not [name for name, text in files.items() if "//" in text.replace("// ", "").replace("http://www.w3.org/2000/svg", "")]


def test_sizes():
    assert [parse_size(text) for text in ("500", "1K", "2.5M", "3gb", "1.5GiB", "0")] == [
        500,
        1000,
        2500000,
        3 * 10**9,
        3 << 29,
        0,
    ]
