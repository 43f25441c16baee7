import dataclasses
import math
from pathlib import Path

import pytest

from sirius_ext.config import MAX_AUTO_PERIOD, MAX_PERIOD, MAX_WIDTH, SiriusConfig


def test_defaults_are_the_papers():
    """But for `follow`, and for what is "auto"."""
    assert dataclasses.asdict(SiriusConfig()) == {
        "mode": "sirius",
        "sparsity": "csparse",
        "follow": True,
        "density": "auto",
        "thresholds": None,
        "period": "auto",
        "tree_width": 1,
        "prune": False,
        "threshold": 0.1,
        "score_temperature": 0.6,
        "accept": "threshold",
        "draft_weights": "auto",
        "lookup": "auto",
        "offload": "auto",
    }


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SiriusConfig().period = 8


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "full"},
        {"mode": "sparse"},
        {"accept": "match"},
        {"accept": "sample"},
        {"accept": "sample", "tree_width": 4},
        {"sparsity": "fsparse"},
        {"sparsity": "cascade", "follow": False},
        {"sparsity": "fsparse", "thresholds": "thresholds.json"},
        {"sparsity": "fsparse", "thresholds": Path("thresholds.json")},
        {"density": 1},
        {"density": 1e-6},
        {"period": 1},
        {"period": MAX_PERIOD},
        {"period": "auto"},
        {"period": "auto", "tree_width": MAX_WIDTH},
        {"period": 1, "tree_width": MAX_WIDTH},
        {"period": MAX_PERIOD, "tree_width": 4},
        {"period": 64, "tree_width": MAX_WIDTH},
        {"period": 256, "tree_width": 16},
        {"tree_width": 2, "prune": True},
        {"tree_width": 2, "prune": True, "accept": "match"},
        {"threshold": 0},
        {"threshold": 1},
        {"score_temperature": 100},
    ],
    ids=str,
)
def test_extremes_are_allowed(values):
    config = SiriusConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("mode", "dense", ValueError),
        ("mode", None, ValueError),
        ("sparsity", "relu", ValueError),
        ("accept", "always", ValueError),
        ("density", 0, ValueError),
        ("density", -0.1, ValueError),
        ("density", 1.01, ValueError),
        ("density", math.nan, ValueError),
        ("density", math.inf, ValueError),
        ("density", "0.5", TypeError),
        ("density", True, TypeError),
        ("density", None, TypeError),
        ("period", 0, ValueError),
        ("period", -3, ValueError),
        ("period", MAX_PERIOD + 1, ValueError),
        ("period", 16.0, TypeError),
        ("period", "16", TypeError),
        ("period", True, TypeError),
        ("period", None, TypeError),
        ("period", "Auto", TypeError),
        ("period", ["auto"], TypeError),
        ("tree_width", 0, ValueError),
        ("tree_width", -1, ValueError),
        ("tree_width", MAX_WIDTH + 1, ValueError),
        ("tree_width", 2.0, TypeError),
        ("tree_width", True, TypeError),
        ("tree_width", "auto", TypeError),
        ("tree_width", None, TypeError),
        ("prune", 1, TypeError),
        ("follow", 1, TypeError),
        ("follow", None, TypeError),
        ("prune", None, TypeError),
        ("prune", 0.95, TypeError),
        ("thresholds", "thresholds.json", ValueError),
        ("thresholds", [0.1], TypeError),
        ("thresholds", 0.1, TypeError),
        ("sparsity", "FSparse", ValueError),
        ("sparsity", None, ValueError),
        ("accept", None, ValueError),
        ("threshold", -0.1, ValueError),
        ("threshold", 1.1, ValueError),
        ("threshold", math.nan, ValueError),
        ("threshold", [0.1], TypeError),
        ("threshold", False, TypeError),
        ("score_temperature", 0, ValueError),
        ("score_temperature", -0.6, ValueError),
        ("score_temperature", math.inf, ValueError),
        ("score_temperature", None, TypeError),
    ],
)
def test_nonsense_is_named(field, value, error):
    with pytest.raises(error, match=f"^{field}: "):
        SiriusConfig(**{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune": True}, "^prune: .*tree_width > 1"),
        ({"prune": True, "tree_width": 2, "accept": "sample"}, "^prune: not with accept"),
        ({"sparsity": "csparse", "thresholds": "thresholds.json"}, "^thresholds: .*fsparse"),
        ({"sparsity": "cascade", "thresholds": "thresholds.json"}, "^thresholds: .*fsparse"),
    ],
    ids=str,
)
def test_what_does_not_go_together(values, message):
    with pytest.raises(ValueError, match=message):
        SiriusConfig(**values)


def test_period_names_its_alternative():
    for value in (0, MAX_PERIOD + 1):
        with pytest.raises(ValueError, match=f'^period: expected 1 to {MAX_PERIOD} or "auto", got {value}$'):
            SiriusConfig(period=value)
    with pytest.raises(TypeError, match="^period: expected an integer or \"auto\", got '16'$"):
        SiriusConfig(period="16")
    with pytest.raises(ValueError, match=f"^tree_width: expected 1 to {MAX_WIDTH}, got 17$"):
        SiriusConfig(tree_width=17)


def test_the_longest_period():
    assert SiriusConfig(period=17).longest_period == 17
    assert SiriusConfig(period="auto", tree_width=MAX_WIDTH).longest_period == MAX_AUTO_PERIOD == 32


def test_the_density_of_a_config():
    """In four bits of more all neurons are cheap."""
    assert SiriusConfig().density_with() == 0.5 and SiriusConfig().density_with(fewer_bits=True) == 1
    for sparsity in ("fsparse", "cascade"):
        assert SiriusConfig(sparsity=sparsity).density_with(fewer_bits=True) == 0.5
    assert SiriusConfig(density=0.3).density_with(fewer_bits=True) == SiriusConfig(density=0.3).density_with() == 0.3
    with pytest.raises(TypeError, match='^density: expected a number or "auto", got'):
        SiriusConfig(density="dense")
