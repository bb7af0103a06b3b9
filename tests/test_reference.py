"""The second copy: starts equal, follows as a moving average or stays; scores as the plain model does."""

import pytest
import torch
from reference import (
    FAMILIES, REWARDS, SEQUENCES, load_plain, make_groups, naive_score, same_bits, score_error, tiny_config, weights,
)  # fmt: skip

from grpo import make_optimizer, make_samples, score, update
from model import build_policy, build_reference, ema_update, load_replica


@pytest.fixture(scope="module")
def build(folders, ranks):
    """(family, config keys) -> config, policy, reference."""

    def make(family="smollm3", **changes):
        config = tiny_config(folders[family], **changes)
        replica = load_replica(config, ranks)
        return config, build_policy(replica, config, ranks), build_reference(replica, config, ranks)

    return make


def fill(model, value: float) -> None:
    """All parameters of a sharded model become this number."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(value)


# ------------------------------------------------------------------------------------------------------------- the copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copy_starts_as_the_replica_with_float32_masters_and_no_gradients(folders, ranks, dtype):
    config = tiny_config(folders["smollm3"], dtype=dtype, gradient_checkpointing=True)
    replica = load_replica(config, ranks)
    reference = build_reference(replica, config, ranks)
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert same_bits(weights(reference), {name: one.float() for name, one in weights(replica).items()})
    assert not reference.is_gradient_checkpointing


def test_the_moving_average_by_hand(build):
    """tau 0.5, a copy that begins at 0, a policy at 1, 2, 4: 0.5, then 0.25 + 1, then 0.625 + 2."""
    _, policy, reference = build()
    fill(reference, 0.0)
    for value, expected in ((1.0, 0.5), (2.0, 1.25), (4.0, 2.625)):
        fill(policy, value)
        ema_update(reference, policy, 0.5)
        assert all((one == expected).all() for one in weights(reference).values())
        assert all((one == value).all() for one in weights(policy).values())  # which is only read


def test_a_slow_average_still_moves_by_a_thousandth_of_a_small_step(build):
    """The paper's tau beside an update of Adam's size, 1e-6: 1e-9 must not be lost, summed over a thousand steps."""
    _, policy, reference = build()
    fill(reference, 0.0)
    fill(policy, 1e-6)
    for _ in range(1000):
        ema_update(reference, policy, 0.999)
    expected = 1e-6 * (1 - 0.999**1000)
    assert all(((one - expected).abs() < 1e-3 * expected).all() for one in weights(reference).values())
    for tau in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ema_update(reference, policy, tau)


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [62, 10_000])
def test_scores_are_those_of_the_plain_model_one_by_one(build, ranks, family, budget):
    """In many micro-batches and in one; log-probs and entropies of uneven continuations, by both models."""
    config, policy, reference = build(family, tokens_per_micro_batch=budget, gradient_checkpointing=True)
    plain = load_plain(config.model).eval()
    for temperature in (1.0, 0.6):
        expected = naive_score(plain, SEQUENCES, temperature)
        for model in (reference, policy):
            assert score_error(score(model, SEQUENCES, config, ranks, temperature), expected) < 1e-5


def test_scores_come_in_the_order_of_the_sequences(build, ranks):
    """The plan takes the longest first; what comes out must not."""
    config, _, reference = build(tokens_per_micro_batch=62)
    forth, back = (score(reference, list(one), config, ranks) for one in (SEQUENCES, reversed(SEQUENCES)))
    assert [len(logprobs) for logprobs, _ in forth] == [len(continuation) for _, continuation in SEQUENCES]
    assert score_error(forth, back[::-1]) < 1e-5


def test_scoring_leaves_the_policy_as_it_was_for_training(build, ranks):
    """No gradient comes out, no parameter moves, and the next update is the one that would have been made anyway."""
    results = []
    for scored in (False, True):
        config, policy, _ = build(learning_rate=1e-2, lr_schedule="constant", gradient_checkpointing=True)
        samples = make_samples(make_groups(load_plain(config.model), REWARDS), config)
        if scored:
            before, with_gradient = weights(policy), []
            hook = policy.register_forward_hook(lambda *_, seen=with_gradient: seen.append(torch.is_grad_enabled()))
            score(policy, SEQUENCES, config, ranks)
            hook.remove()
            assert with_gradient == [False]  # one forward, and nothing kept for a backward
            assert same_bits(weights(policy), before) and all(one.grad is None for one in policy.parameters())
            assert policy.training
        update(policy, make_optimizer(policy, config), samples, config, ranks, 0)
        results.append(weights(policy))
    assert same_bits(*results)


def test_nothing_to_score_is_no_error_but_an_empty_side_is(build, ranks):
    config, _, reference = build()
    assert score(reference, [], config, ranks) == []
    for sequence in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="sequence 1: . prefix and . continuation"):
            score(reference, [([1], [2]), sequence], config, ranks)
