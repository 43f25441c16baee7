"""Machines that are told by what stands under /proc and /sys."""

from pathlib import Path

from sirius_ext import control_groups
from sirius_ext.models import tiers


def fake_machine(monkeypatch, root, files):
    """A machine with these files, under /proc and /sys alone."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for module in (control_groups, tiers):
        monkeypatch.setattr(module, "Path", lambda path: root / path[1:] if path.startswith("/") else Path(path))
