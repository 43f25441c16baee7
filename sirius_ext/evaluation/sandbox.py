"""Runs generated code in a process of its own: limited in time, memory and files, without network, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

SECONDS = 10
MEMORY_BYTES = 1 << 30

# What the child does before the code that is judged: limits that it cannot raise again, and no network.
_LIMITS = """
import resource, sys
def _limit(what, amount):
    resource.setrlimit(what, (amount, amount))
_limit(resource.RLIMIT_AS, {memory})
_limit(resource.RLIMIT_CPU, {seconds})
_limit(resource.RLIMIT_FSIZE, 1 << 20)
_limit(resource.RLIMIT_CORE, 0)
_REFUSED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill")
def _audit(event, arguments):
    if event.startswith("socket.") or event in _REFUSED:
        raise PermissionError(event + " is not allowed here")
sys.addaudithook(_audit)
"""
# The tests come last in it: code that exits before they are through has not passed them.
_JUDGED = """
try:
    exec(compile({code!r}, "answer", "exec"), {{"__name__": "answer"}})
except SystemExit as end:
    if end.code not in (None, 0):
        raise
    raise RuntimeError("it exits before the end") from None
"""


def run_code(code: str, seconds: int = SECONDS, memory: int = MEMORY_BYTES) -> str:
    """Run Python code to its end. Returns "passed" if it came to its last line without an exception, else why not: "timeout" or
    the last line of its error.

    A guard against accidents, not against an attacker: run benchmarks of models that you trust as much as their code.
    """
    # What it says goes to a file, whose size is limited: a pipe would be read to its end into our own memory.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        program = _LIMITS.format(memory=memory, seconds=seconds) + _JUDGED.format(code=code)
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-I", "-c", program]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=2 * seconds,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return "timeout"
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if done.returncode == 0:
        return "passed"
    if done.returncode < 0:  # by a signal: SIGXCPU, SIGKILL or SIGSEGV
        return "timeout" if done.returncode in (-24, -9) else f"signal {-done.returncode}"
    return lines[-1][:200] if lines else f"exit status {done.returncode}"
