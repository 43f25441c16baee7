import dataclasses
import math

import pytest

from sirius_ext.config import MAX_PERIOD, SiriusConfig


def test_defaults_are_the_papers():
    assert dataclasses.asdict(SiriusConfig()) == {
        "mode": "sirius",
        "sparsity": "csparse",
        "density": 0.5,
        "period": 16,
        "threshold": 0.1,
        "score_temperature": 0.6,
        "accept": "threshold",
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
        {"density": 1},
        {"density": 1e-6},
        {"period": 1},
        {"period": MAX_PERIOD},
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
