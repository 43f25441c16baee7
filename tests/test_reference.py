"""The oracle itself: against `transformers`, against itself under rules that must not matter, and against SPEC.md's numbers."""

import math

import pytest
import torch
import transformers

from sirius_ext.config import SiriusConfig
from sirius_ext.decoding import reference
from sirius_ext.decoding.reference import Decoder, Period
from sirius_ext.kernels import reference as ops

VOCAB = 199
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 60, "intermediate_size": 97, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True),
    "llama3-rope": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
    "yarn-rope": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=YARN_ROPE),
    "smollm2": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "head-size": lambda: transformers.LlamaConfig(**SMALL, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
}


def tiny(name="llama", dtype=torch.float32):
    """A random model. Biases and norm weights, which start at 0 and 1, are random too, so that leaving one out shows."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.normal_(1.0 if "norm" in key else 0.0, 0.3)
    return model.eval().to(dtype)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    return Decoder(tiny())


PROMPT = [(37 * i * i + 11 * i + 5) % VOCAB for i in range(23)]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name):
    model = tiny(name)
    decoder = Decoder(model)
    decoder.reset(40)
    tokens = torch.randint(VOCAB, (40,))
    logits = torch.cat([decoder.chain(tokens[:29].tolist(), 0), decoder.chain(tokens[29:].tolist(), 29)])
    torch.testing.assert_close(logits, model(tokens.unsqueeze(0)).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float32(dtype):
    model = tiny(dtype=dtype)
    decoder = Decoder(model)
    decoder.reset(len(PROMPT))
    logits = decoder.chain(PROMPT, 0)
    assert decoder.k[0].dtype == dtype and logits.dtype == torch.float32
    exact = Decoder(model.float())
    exact.reset(len(PROMPT))
    assert torch.cosine_similarity(logits, exact.chain(PROMPT, 0)).min() > 0.999


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2", "mistral"])
def test_full_mode_is_greedy_generation(name):
    model = tiny(name)
    expected = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, min_new_tokens=40)[0, len(PROMPT) :]
    tokens, periods = reference.generate(Decoder(model), PROMPT, SiriusConfig(mode="full"), 40)
    assert tokens == expected.tolist() and periods == []


def test_a_tree_is_its_paths(decoder):
    """One pass over a tree gives each node the logits that its path alone would."""
    parents = [-1, 0, 0, 1, 2, 2, 4]
    tokens, prefix = [3, 14, 15, 92, 65, 35, 89], len(PROMPT)
    mask = ops.tree_mask(torch.tensor(parents, dtype=torch.int32))[:, 0]
    bits = (mask.unsqueeze(1) >> torch.arange(7) & 1).bool()
    visible = torch.cat([torch.ones(7, prefix, dtype=torch.bool), bits], dim=1)
    positions = prefix + bits.sum(1) - 1

    decoder.reset(prefix + 7)
    decoder.chain(PROMPT, 0)
    logits = decoder.forward(torch.tensor(tokens), positions, prefix + torch.arange(7), visible)
    for node in range(7):
        path = [token for token, seen in zip(tokens, bits[node]) if seen]
        decoder.reset(prefix + 7)
        alone = decoder.chain(PROMPT + path, 0)[-1]
        torch.testing.assert_close(logits[node], alone, rtol=1e-4, atol=1e-4)


def test_accepted_path_is_compacted(decoder):
    """Decoding goes on from a compacted tree path as it would from a chain."""
    prefix = len(PROMPT)
    parents = torch.tensor([-1, 0, 0, 1, 2], dtype=torch.int32)
    tokens, path = torch.tensor([3, 14, 15, 92, 65]), torch.tensor([0, 2, 4], dtype=torch.int32)
    bits = (ops.tree_mask(parents) >> torch.arange(5) & 1).bool()
    visible = torch.cat([torch.ones(5, prefix, dtype=torch.bool), bits, torch.zeros(5, 3, dtype=torch.bool)], dim=1)
    decoder.reset(prefix + 8)
    decoder.chain(PROMPT, 0)
    decoder.forward(tokens, prefix + bits.sum(1) - 1, prefix + torch.arange(5), visible)
    k, v = torch.stack(decoder.k), torch.stack(decoder.v)
    ops.kv_rewrite(k, v, prefix, path)
    decoder.k, decoder.v = list(k), list(v)
    logits = decoder.chain([7], prefix + 3)

    decoder.reset(prefix + 8)
    torch.testing.assert_close(logits, decoder.chain([*PROMPT, 3, 15, 65, 7], 0)[-1:], rtol=1e-4, atol=1e-4)


def full_text(decoder, count, eos=()):
    return reference.generate(decoder, PROMPT, SiriusConfig(mode="full"), count, eos)[0]


@pytest.mark.parametrize("period", [1, 2, 5, 16])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_match_reproduces_the_full_model(decoder, period, density):
    config = SiriusConfig(accept="match", period=period, density=density)
    tokens, periods = reference.generate(decoder, PROMPT, config, 37)
    assert tokens == full_text(decoder, 37)
    assert sum(record.committed for record in periods) == 36
    assert all(record.committed == record.accepted + 1 <= period for record in periods)
    if density == 1:
        assert all(record.accepted == record.drafted for record in periods)


@pytest.mark.parametrize("sparsity", ["csparse", "fsparse"])
@pytest.mark.parametrize("prune", [False, True])
def test_match_with_trees_reproduces_the_full_model(decoder, sparsity, prune):
    """And a wider tree advances further."""
    advance = []
    for width in (1, 4):
        config = SiriusConfig(
            accept="match", period=5, density=0.3, sparsity=sparsity, tree_width=width, prune=prune and width > 1
        )
        tokens, periods = reference.generate(decoder, PROMPT, config, 25)
        assert tokens == full_text(decoder, 25)
        assert all(record.accepted <= record.drafted <= record.nodes <= record.drafted * width for record in periods)
        assert all(len(record.likelihoods) == record.nodes for record in periods)
        advance.append(reference.average_advance_length(periods))
    assert advance[1] > advance[0]


def test_a_threshold_of_zero_keeps_every_neuron(decoder):
    """FSparse's threshold form then is the full model."""
    config = SiriusConfig(mode="sparse", sparsity="fsparse", density=0.3)
    assert reference.generate(decoder, PROMPT, config, 20, thresholds=[0.0] * 3)[0] == full_text(decoder, 20)
    assert reference.generate(decoder, PROMPT, config, 20, thresholds=[0.5] * 3)[0] != full_text(decoder, 20)
    assert reference.generate(decoder, PROMPT, config, 20)[0] != full_text(decoder, 20)


def test_threshold_zero_commits_what_was_drafted(decoder):
    """Every period commits n tokens, n - 1 of them as the sparse model alone would continue."""
    config = SiriusConfig(threshold=0, period=6, density=0.3)
    tokens, periods = reference.generate(decoder, PROMPT, config, 1 + 4 * 6 + 3)
    assert [record.committed for record in periods] == [6, 6, 6, 6, 3]
    assert [record.drafted for record in periods] == [5, 5, 5, 5, 2]
    assert [record.cut for record in periods] == [False, False, False, False, True]
    assert reference.average_advance_length(periods) == 6
    assert reference.rollback_length(periods) == reference.corrected_fraction(periods) == 0
    assert tokens != full_text(decoder, len(tokens))


def test_threshold_one_rejects_everything(decoder):
    tokens, periods = reference.generate(decoder, PROMPT, SiriusConfig(threshold=1, period=4, density=0.5), 12)
    assert tokens == full_text(decoder, 12)
    assert all(record.accepted == 0 and record.committed == 1 for record in periods)
    assert reference.average_advance_length(periods) == 1
    assert reference.corrected_fraction(periods) == 10 / 11  # the last period had room for F's token only
    assert [record.drafted for record in periods] == [3] * 8 + [2, 1, 0]


def test_period_of_one_is_the_full_model(decoder):
    tokens, periods = reference.generate(decoder, PROMPT, SiriusConfig(period=1, density=0.1), 9)
    assert tokens == full_text(decoder, 9)
    assert [(record.drafted, record.committed, record.cut, record.likelihoods) for record in periods] == [(0, 1, False, [])] * 8


def test_sparse_mode(decoder):
    full = full_text(decoder, 30)
    tokens, periods = reference.generate(decoder, PROMPT, SiriusConfig(mode="sparse", density=0.2), 30)
    assert periods == [] and len(tokens) == 30 and tokens[0] == full[0] and tokens != full
    assert reference.generate(decoder, PROMPT, SiriusConfig(mode="sparse", density=1), 30)[0] == full


@pytest.mark.parametrize("mode", ["full", "sparse", "sirius"])
def test_one_token(decoder, mode):
    tokens, periods = reference.generate(decoder, PROMPT, SiriusConfig(mode=mode), 1)
    assert tokens == full_text(decoder, 1) and periods == []


@pytest.mark.parametrize("mode", ["full", "sparse", "sirius"])
def test_prompt_of_one_token(decoder, mode):
    assert len(reference.generate(decoder, [5], SiriusConfig(mode=mode, period=4), 10)[0]) == 10


@pytest.mark.parametrize(
    "config",
    [SiriusConfig(mode="full"), SiriusConfig(mode="sparse"), SiriusConfig(threshold=0, period=5)],
    ids=lambda config: config.mode,
)
def test_text_ends_at_the_first_eos(decoder, config):
    """Whatever token of the text is declared EOS, the text is the same up to its first occurrence, and ends there."""
    tokens, _ = reference.generate(decoder, PROMPT, config, 17)
    for eos in set(tokens):
        ended, periods = reference.generate(decoder, PROMPT, config, 17, {eos})
        assert ended == tokens[: tokens.index(eos) + 1]
        if config.mode == "sirius":
            assert 1 + sum(record.committed for record in periods) == len(ended)
            assert all(not record.cut for record in periods[:-1])


def test_a_period_cut_by_eos(decoder):
    config = SiriusConfig(threshold=0, period=5)
    tokens, _ = reference.generate(decoder, PROMPT, config, 11)
    last, middle = tokens[5], tokens[3]
    assert tokens.index(last) == 5 and tokens.index(middle) == 3, "the model repeats itself: choose another seed"
    # F's own token at the end of a whole period cuts nothing off.
    assert reference.generate(decoder, PROMPT, config, 11, [last])[1][0].cut is False
    (record,) = reference.generate(decoder, PROMPT, config, 11, [middle])[1]
    assert (record.drafted, record.accepted, record.committed, record.cut) == (4, 4, 3, True)
    assert reference.average_advance_length([record]) is None
    assert reference.rollback_length([record]) == 1 and reference.corrected_fraction([record]) == 0


def test_the_first_token_may_be_eos(decoder):
    x0 = full_text(decoder, 1)
    for mode in ("full", "sparse", "sirius"):
        assert reference.generate(decoder, PROMPT, SiriusConfig(mode=mode), 20, x0) == (x0, [])


def test_an_eos_that_is_rejected_does_not_count(decoder):
    """Under `match` only F's text decides, though S proposes EOS before that."""
    full = full_text(decoder, 30)
    drafted = set(reference.generate(decoder, PROMPT, SiriusConfig(mode="sparse", density=0.1), 30)[0]) - set(full)
    assert drafted
    config = SiriusConfig(accept="match", density=0.1, period=6)
    assert reference.generate(decoder, PROMPT, config, 30, drafted)[0] == full


def test_statistic_follows_the_definition():
    z = torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]])
    expected = [0.6, math.hypot(0.8, 5 / 13), 12 / 13]
    assert reference.csparse_statistic(z).tolist() == pytest.approx(expected)


def test_statistic_ignores_the_length_of_a_token():
    z = torch.randn(9, 33)
    scaled = z * torch.logspace(-6, 6, 9).unsqueeze(1)
    torch.testing.assert_close(reference.csparse_statistic(scaled), reference.csparse_statistic(z))


def test_a_token_of_zeros_contributes_zero():
    z = torch.randn(4, 31)
    padded = torch.cat([z[:2], torch.zeros(1, 31), z[2:]])
    assert torch.equal(reference.csparse_statistic(padded), reference.csparse_statistic(z))
    assert torch.equal(reference.csparse_statistic(torch.zeros(3, 5)), torch.zeros(5))


@pytest.mark.parametrize(
    ("size", "density", "kept"), [(10, 0.5, 5), (10, 0.25, 2), (10, 0.35, 4), (7, 1.0, 7), (7, 0.001, 1), (1, 0.5, 1)]
)
def test_selection_size(size, density, kept):
    """0.25 * 10 is a half: it rounds to the even 2."""
    stat = torch.rand(size)
    neurons = reference.select_neurons(stat, density)
    assert neurons.dtype == torch.int32 and len(neurons) == kept
    assert neurons.tolist() == sorted(sorted(range(size), key=lambda i: -stat[i])[:kept])


def test_equal_statistics_go_to_the_lower_index():
    stat = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 0.0])
    assert reference.select_neurons(stat, 0.5).tolist() == [0, 1, 3]
    assert reference.select_neurons(torch.zeros(1000), 0.1).tolist() == list(range(100))


def test_neurons_of_the_prompt_are_kept(decoder):
    """With half the neurons silenced in the weights, half the density loses nothing."""
    model = tiny()
    silent = torch.randperm(97)[:48]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[silent] = 0
    silenced = Decoder(model)
    full = full_text(silenced, 20)
    tokens, _ = reference.generate(silenced, PROMPT, SiriusConfig(mode="sparse", density=0.51), 20)
    assert tokens == full


def test_density_of_llama_3_8b():
    """SPEC section 2: 0.65 and 0.77 at d = 0.5, 0.58 and 0.72 at d = 0.4; the cascade's is CSparse's."""
    mlp, parameters = 32 * 3 * 4096 * 14336, 8_030_261_248
    densities = {
        (kind, d): reference.density_of(kind, d, mlp, parameters)
        for kind in ("csparse", "fsparse", "cascade")
        for d in (0.5, 0.4)
    }
    assert {key: round(value, 2) for key, value in densities.items()} == {
        ("csparse", 0.5): 0.65,
        ("fsparse", 0.5): 0.77,
        ("csparse", 0.4): 0.58,
        ("fsparse", 0.4): 0.72,
        ("cascade", 0.5): 0.65,
        ("cascade", 0.4): 0.58,
    }


def test_metrics():
    periods = [
        Period(drafted=3, nodes=3, accepted=3, branch=0, committed=4, cut=False, likelihoods=[0.9] * 3),
        Period(drafted=3, nodes=3, accepted=1, branch=0, committed=2, cut=False, likelihoods=[0.9, 0.01, 0.9]),
        Period(drafted=3, nodes=5, accepted=0, branch=None, committed=1, cut=False, likelihoods=[0.01] * 5),
        Period(drafted=2, nodes=4, accepted=2, branch=1, committed=3, cut=True, likelihoods=[0.9] * 4),
    ]
    assert reference.average_advance_length(periods) == pytest.approx(7 / 3)
    assert reference.corrected_fraction(periods) == pytest.approx(2 / 10)
    assert reference.rollback_length(periods) == pytest.approx((0 + 2 + 5 + 2) / 4)
    assert round(reference.effective_density(15.22, 16, 0.65), 3) == 0.706
    for metric in (reference.average_advance_length, reference.corrected_fraction, reference.rollback_length):
        assert metric([]) is None
