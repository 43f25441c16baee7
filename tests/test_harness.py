"""The harness: what lm-eval asks, against `transformers`; a run of its command on tasks of our own."""

import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_default_model import in_float32, loaded

from sirius_ext import Engine
from sirius_ext.cli import main as cli
from sirius_ext.decoding.thresholds import Thresholds

TEXT = "The capital of France is Paris. The capital of Italy is Rome."


def test_without_lm_eval(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["lm_eval", "--model", "sirius"]) == 2
    assert "lm_eval needs lm_eval" in capsys.readouterr().err


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval")
    from sirius_ext.integrations import lm_eval as harness

    return harness


def lm(harness, **values):
    engine = Engine(in_float32(), tokenizer=loaded(torch.bfloat16)[1])
    return harness.SiriusLM(engine, **values)


def asked(*each):
    return [SimpleNamespace(args=args) for args in each]


def expected(context, continuation):
    """By transformers: the sum of logarithms, and whether a greedy text would be the same."""
    with torch.no_grad():
        logits = in_float32()(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    tokens = torch.tensor(continuation)
    scores = torch.log_softmax(logits.double(), -1).gather(-1, tokens[:, None])
    return float(scores.sum()), bool((logits.argmax(-1) == tokens).all())


def test_loglikelihood(harness):
    model = lm(harness)
    pairs = [(TEXT[:24], TEXT[24:30]), (TEXT[:24], " Berlin"), (TEXT, " And so on and so forth" * 20), ("", "The")]
    found = model.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found):
        tokens = model.tok_encode(context + continuation)
        start = len(model.tok_encode(context)) if context else 0
        known = expected(tokens[:start] or [model.prefix_token_id], tokens[start:])
        assert score == pytest.approx(known[0], abs=2e-2, rel=1e-4) and greedy == known[1]
    assert found[0][1] and not found[1][1] and found[0][0] > found[1][0]


def test_sparse_loglikelihood(harness):
    pairs = [(TEXT[:24], TEXT[24:30]), (TEXT[:24], " Berlin")]
    full = lm(harness, density=1.0, loglikelihood="full").loglikelihood(asked(*pairs), disable_tqdm=True)
    for sparsity in ("csparse", "fsparse"):
        settings = {"sparsity": sparsity, "draft_weights": "same"}  # S is then F
        dense = lm(harness, density=1.0, **settings, loglikelihood="sparse").loglikelihood(asked(*pairs), disable_tqdm=True)
        assert [score for score, _ in dense] == pytest.approx([score for score, _ in full], abs=1e-3)
        half = lm(harness, density=0.3, sparsity=sparsity, mode="sparse").loglikelihood(asked(*pairs), disable_tqdm=True)
        assert sum(abs(score - known) for (score, _), (known, _) in zip(half, full)) > 0.1


def test_what_the_sparse_model_reads_is_no_matter_of_free_memory(harness, monkeypatch):
    monkeypatch.setattr("sirius_ext.models.weights.free_on", lambda device: 0)
    model = lm(harness, mode="sparse")
    assert model.get_model_info()["sirius"]["draft_weights"] == "q4"
    model.loglikelihood(asked((TEXT[:24], TEXT[24:30])), disable_tqdm=True)
    assert model.weights.has_copy


def test_rolling(harness, monkeypatch):
    model = lm(harness)
    tokens = model.tok_encode(TEXT, add_special_tokens=False)
    (found,) = model.loglikelihood_rolling(asked((TEXT,)), disable_tqdm=True)
    assert found == pytest.approx(expected([model.prefix_token_id], tokens)[0], rel=1e-4)
    # In windows of 6: every token is judged once, the last ones by a full window.
    monkeypatch.setattr(harness.SiriusLM, "max_length", 6)
    (found,) = model.loglikelihood_rolling(asked((TEXT,)), disable_tqdm=True)
    known, first = expected([model.prefix_token_id], tokens[:6])[0], 6
    while first < len(tokens):
        last = min(first + 6, len(tokens))
        window = tokens[last - 7 : last]
        known += expected(window[: 7 - (last - first)], window[7 - (last - first) :])[0]
        first = last
    assert found == pytest.approx(known, rel=1e-4)


def test_generation(harness):
    model = lm(harness, period=2, density=0.7, accept="match")
    long = {"until": ["Rome", "\n\n\n"], "max_gen_toks": 12}
    prompt = "The capital of France is Paris. The capital of Italy is"
    found = model.generate_until(asked((prompt, long), (prompt, {"until": "#", "max_gen_toks": 3})), disable_tqdm=True)
    out = model.engine.generate(torch.tensor([model.tok_encode(prompt)]), max_new_tokens=3, do_sample=False, config=model.config)
    assert found == [" ", model.tokenizer.decode(out.sequences[0, -3:])]
    info = model.get_model_info()
    assert info["sirius"]["period"] == 2 and info["sirius"]["stats"]["texts"] == 2
    assert info["sirius"]["stats"]["effective_density"] > 0.5 and info["sirius"]["stats"]["tokens"] >= 4
    assert json.dumps(info)


def test_generation_that_fails_or_does_not_fit(harness, monkeypatch):
    monkeypatch.setattr(harness.SiriusLM, "max_length", 12)
    model = lm(harness, mode="full", max_gen_toks=2)
    found = model.generate_until(asked(("a", {"max_gen_toks": 10**6}), ("Once upon a " * 50, {})), disable_tqdm=True)
    assert found[0] == "" and found[1]
    stats = model.get_model_info()["sirius"]["stats"]
    assert (stats["texts"], stats["failed"], stats["truncated"]) == (1, 1, 1)


def test_sampling(harness):
    greedy, sampling = lm(harness), lm(harness, accept="sample", period=3)
    request = asked(("Once upon a time", {"do_sample": True, "temperature": 0.9, "max_gen_toks": 4}))
    with pytest.raises(ValueError, match="^gen_kwargs: do_sample=True and accept=threshold"):
        greedy.generate_until(request, disable_tqdm=True)
    with pytest.raises(ValueError, match="^gen_kwargs: do_sample=False and accept=sample"):
        sampling.generate_until(asked(("Once", {"do_sample": True, "temperature": 0.0})), disable_tqdm=True)
    assert sampling.generate_until(request, disable_tqdm=True)[0] and not sampling.failed


@pytest.mark.parametrize(
    "values, message",
    [
        ({"densty": 0.5}, "^model_args: expected some of pretrained, .*, mode, .*got densty"),
        ({"loglikelihood": "both"}, "^loglikelihood: expected one of full, sparse, got 'both'"),
        ({"loglikelihood": 3}, "^loglikelihood: expected one of full, sparse, got 3"),
        ({"density": "half"}, "^density: expected a number or .auto., got 'half'"),
        ({"threads": "all"}, "^threads: expected 1 to .*, got 'all'"),
        ({"threads": 100000}, "^threads: expected 1 to .*, got 100000"),
        ({"threads": True}, "^threads: expected 1 to .*, got True"),
        ({"max_gen_toks": 0}, "^max_gen_toks: expected an integer of at least 1, got 0"),
        ({"max_gen_toks": "many"}, "^max_gen_toks: expected an integer of at least 1, got 'many'"),
        ({"pretrained": 5}, "^pretrained: expected a Hugging Face id, .* got 5"),
        ({"dtype": 5}, "^dtype: expected one of .* got 5"),
        ({"device": True}, "^device: expected .* got True"),
        ({"thresholds": __file__, "sparsity": "fsparse"}, "^thresholds: .* is not a file of"),
    ],
    ids=str,
)
def test_wrong_arguments(harness, monkeypatch, values, message):
    """Before the model is loaded."""
    monkeypatch.setattr("sirius_ext.engine.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, TypeError), match=message):
        harness.SiriusLM(**values)


def test_thresholds_for_another_model(harness, tmp_path):
    Thresholds(0.5, [0.1], [0.5], (64, 12), "another").save(tmp_path / "thresholds.json")
    with pytest.raises(ValueError, match="^thresholds: .* was made for another model"):
        lm(harness, sparsity="fsparse", thresholds=str(tmp_path / "thresholds.json"))


def test_chat(harness):
    model = lm(harness)
    text = model.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert "Hello" in text and text.endswith("assistant\n")
    assert model.tok_encode(text) == model.tokenizer(text, add_special_tokens=False)["input_ids"]


TASKS = {
    "made_up_words": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["###"], "do_sample": False, "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "made_up_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["Berlin", "Paris"],
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def test_command(harness, tmp_path, capsys, monkeypatch):
    """Its tasks, its options, its result file, with our stats in it."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "The capital of France is", "answer": "Paris", "label": 1}) + "\n")
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))
    out = tmp_path / "out.json"
    arguments = ["--model", "sirius", "--model_args", "pretrained=smollm2-135m-instruct,density=0.7,period=3"]
    arguments += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--output_path", str(out)]
    assert cli.main(["lm_eval", *arguments]) == 0
    assert "made_up_choices" in capsys.readouterr().out
    (file,) = tmp_path.glob("out*.json")
    results = json.loads(file.read_text())
    assert results["results"]["made_up_choices"]["acc,none"] == 1
    stats = results["config"]["sirius"]["stats"]
    assert results["config"]["sirius"]["density"] == 0.7 and stats["texts"] == 1 and stats["failed"] == 0
    assert stats["average_advance_length"] >= 1 and stats["ms_per_token"] > 0 and stats["corrected_fraction"] is not None


def test_entry_point(harness):
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, value),) = declared["lm_eval.models"].items()
    assert name == "sirius" and EntryPoint(name, value, "lm_eval.models").load() is harness.SiriusLM
