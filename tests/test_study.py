"""Studies: one setting varied, gone on with after a stop, a table and a plot."""

import dataclasses
import json

import pytest
from test_evaluation import CSQA, write

from sirius_ext import SiriusConfig
from sirius_ext.cli import main as cli
from sirius_ext.cli.report import title_of
from sirius_ext.evaluation import study
from sirius_ext.evaluation.modes import config_of
from sirius_ext.evaluation.plan import Plan
from sirius_ext.evaluation.results import read_results

BASE = SiriusConfig(sparsity="fsparse", period=4)


def plan(data, **values):
    values = {"modes": ("sirius-c",), "base": BASE, "shots": 1, **values}
    return Plan("none", "float32", "cpu", None, "csqa", data, **values)


def decode(asked, items, results):
    """A run that is right where the threshold is low, and says what it was asked for."""
    for mode in asked.modes:
        config = config_of(mode, asked.base)
        for item in items:
            if (mode, item.id) not in results.done():
                right = mode == "full" or config.threshold < 0.2
                stats = {"density": 0.6, "decode_seconds": 1.0, "periods": [[3, 3, 4, False]]}
                record = {"mode": mode, "id": item.id, "correct": right, "scores": {"exact": right}, "tokens": [1]}
                results.add({**record, "stats": stats, "asked": [config.threshold, config.period]})


def test_study(tmp_path):
    write("csqa", tmp_path, [{**CSQA, "id": str(i)} for i in range(4)])
    out = tmp_path / "out"
    rows = study.study(plan(tmp_path, limit=2), "threshold", (0.1, 0.3), out, decode)
    assert [(row["mode"], row["value"], row["accuracy"], row["items"]) for row in rows] == [
        ("full", None, 1, 2),
        ("sirius-c", 0.1, 1, 2),
        ("sirius-c:threshold=0.3", 0.3, 0, 2),
    ]
    assert rows[1]["effective_density"] == pytest.approx((3 * 0.6 + 1) / 4) and rows[2]["lost"] == 2
    (file,) = out.iterdir()
    assert [record["asked"] for record in read_results(file)[1][2:]] == [[0.1, 4], [0.1, 4], [0.3, 4], [0.3, 4]]

    # More items and another value: only what is missing is decoded.
    before = file.read_text()
    rows = study.study(plan(tmp_path), "threshold", (0.1, 0.05), out, decode)
    assert file.read_text().startswith(before) and [row["items"] for row in rows] == [4, 4, 4]
    assert len(read_results(file)[1]) == 6 + 2 + 2 + 4
    # Fewer items again: those are summed up.
    assert [row["items"] for row in study.study(plan(tmp_path, limit=1), "threshold", (0.1,), out, decode)] == [1, 1]
    # Another study finds what they share: Full, and what has the settings that are not varied.
    before = file.read_text()
    rows = study.study(plan(tmp_path), "period", (4, 2), out, decode)
    assert [(row["mode"], row["value"]) for row in rows] == [("full", None), ("sirius-c", 4), ("sirius-c:period=2", 2)]
    assert file.read_text().startswith(before) and len(read_results(file)[1]) == 14 + 4
    assert read_results(file)[1][-1]["asked"] == [0.1, 2]
    with pytest.raises(ValueError, match="^out: .*another period"):
        other = plan(tmp_path, base=dataclasses.replace(BASE, period=8))
        study.study(other, "threshold", (0.1,), out, decode)


@pytest.mark.parametrize(
    ("what", "values", "base", "message"),
    [
        ("threshold", (0.1,), {"accept": "match"}, "^--what: the threshold decides nothing"),
        ("density", (0.4,), {"thresholds": "file"}, "^--values: 0.4: --thresholds: made for one density"),
        ("period", (4, 4), {}, "^--values: expected one or several different"),
        ("period", (), {}, "^--values: expected one or several different.*none"),
        ("width", (2, 99), {}, "^--values: 99: tree_width: expected 1 to 16"),
        ("threshold", (1.5,), {}, "^--values: 1.5: threshold: expected 0 to 1"),
    ],
)
def test_what_cannot_be_studied(what, values, base, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        study.vary(plan(tmp_path, base=dataclasses.replace(BASE, **base), modes=("sirius-f",)), what, values)


@pytest.mark.parametrize("what", study.SETTINGS)
def test_the_default_values_are_valid(what, tmp_path):
    setting, base = study.SETTINGS[what], plan(tmp_path).base
    modes = study.vary(plan(tmp_path), what, setting.values)
    assert list(modes.values()) == [getattr(config_of(mode, base), setting.field) for mode in modes] == list(setting.values)


def test_command(tmp_path, capsys):
    """On the default model: table, plot and rows."""
    pytest.importorskip("matplotlib")
    write("csqa", tmp_path)
    out = tmp_path / "out"
    arguments = ["study", "--task", "csqa", "--data", str(tmp_path), "--shots", "0", "--out", str(out)]
    arguments += ["--what", "width", "--values", "1,2", "--mode", "sirius-f", "--period", "3", "--draft-weights", "same"]
    assert cli.main(arguments) == 0
    rows = json.loads((out / "sirius-f-width.json").read_text())["rows"]
    assert [(row["value"], row["items"], row["failed"]) for row in rows] == [(None, 1, 0), (1, 1, 0), (2, 1, 0)]
    assert all(row["effective_density"] > 0.4 for row in rows)
    assert (out / "sirius-f-width.png").read_bytes().startswith(b"\x89PNG")
    picture = (out / "sirius-f-width.png").read_bytes()
    files = {file: file.read_text() for file in out.glob("*.jsonl")}
    capsys.readouterr()
    for more in ([], ["--jobs", "2"]):  # nothing is left: no model is loaded, no bar shown
        assert cli.main([*arguments, *more]) == 0 and capsys.readouterr().err == ""
    assert {file: file.read_text() for file in out.glob("*.jsonl")} == files
    assert picture == (out / "sirius-f-width.png").read_bytes()
    assert cli.main([*arguments, "--values", "two"]) == 2
    assert "--values: expected numbers for width, got two" in capsys.readouterr().err


def test_a_title_says_what_weights_are_read_as():
    run = {"task": "gsm8k", "model": "m", "dtype": "bfloat16", "shots": 5, "density": "auto", "period": 16}
    assert title_of({**run, "weights": "q8"}) == "gsm8k, m, q8 of bfloat16, 5 shots, density auto, period 16"
    assert title_of({**run, "weights": "plain"}) == title_of(run) == "gsm8k, m, bfloat16, 5 shots, density auto, period 16"


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write("csqa", tmp_path)
    out = tmp_path / "out"
    assert cli.main(["study", "--what", "period", "--task", "csqa", "--data", str(tmp_path), "--out", str(out)]) == 2
    assert "the plot needs matplotlib" in capsys.readouterr().err and not out.exists()
