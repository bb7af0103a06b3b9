"""The KL penalty: nothing at the start, then the mean of k3 over the trained tokens, against the plain model."""

import pytest
import torch
from reference import REWARDS, CaptureGradients, largest_error, load_plain, make_groups, weights
from reference_checks import naive_score

from grpo import add_ref_logprobs, make_optimizer, make_samples, update
from methods import training_samples
from model import build_policy, build_reference


@pytest.fixture
def sampler(build_sampler, folders):
    """On a random model whose tokens are bytes."""
    return build_sampler(folders["smollm3"])


def kl_setting(sampler, temperature: float):
    """(policy, reference, plain model, samples with reference log-probs, config) on the tests' random model."""
    config = sampler.config
    config.temperature, config.max_grad_norm, config.tokens_per_micro_batch = temperature, 1e9, 100
    policy = build_policy(sampler.replica, config, sampler.ranks)
    reference = build_reference(sampler.replica, config, sampler.ranks)
    plain = load_plain(config.model)
    samples = make_samples(make_groups(plain, REWARDS), config)
    add_ref_logprobs(samples, reference, sampler)
    return policy, reference, plain, samples, config


def gradients(policy, samples, config, sampler, kl: float) -> tuple[float, dict]:
    config.kl = kl
    capture = CaptureGradients(policy)
    loss = update(policy, capture, samples, config, sampler.ranks, 0)["loss"]
    return loss, capture.gradients


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_reference_logprobs_are_those_of_the_start_model_at_the_sampling_temperature(sampler, temperature):
    _, _, plain, samples, _ = kl_setting(sampler, temperature)
    sequences = [(sample.rollout.prompt_ids, sample.rollout.completion_ids) for sample in samples]
    for sample, (logprobs, _) in zip(samples, naive_score(plain, sequences, temperature), strict=True):
        assert sample.ref_logprobs == pytest.approx(logprobs, abs=1e-5)


def test_samples_carry_them_where_there_is_a_penalty_and_only_there(sampler):
    _, reference, plain, samples, config = kl_setting(sampler, 0.6)
    groups = make_groups(plain, REWARDS)
    found = {}
    for config.kl in (0.0, 0.1):
        trained = training_samples("active", groups, [], [], reference, sampler)
        found[config.kl] = [sample.ref_logprobs for sample in trained]
    assert found[0.0] == [None] * len(samples)
    assert found[0.1] == [sample.ref_logprobs for sample in samples]


def test_at_the_start_the_penalty_and_its_gradient_are_0(sampler):
    policy, _, _, samples, config = kl_setting(sampler, 0.6)
    loss, without = gradients(policy, samples, config, sampler, 0.0)
    penalised, with_penalty = gradients(policy, samples, config, sampler, 10.0)
    assert penalised == pytest.approx(loss, abs=1e-5) and largest_error(with_penalty, without) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_once_the_policy_has_moved_the_penalty_is_the_mean_k3_over_trained_tokens(sampler, temperature):
    """Value and gradient, against the plain model at both places."""
    policy, _, plain, samples, config = kl_setting(sampler, temperature)
    config.learning_rate, config.lr_schedule = 1e-2, "constant"
    update(policy, make_optimizer(policy, config), samples, config, sampler.ranks, 0)
    loss, without = gradients(policy, samples, config, sampler, 0.0)
    penalised, with_penalty = gradients(policy, samples, config, sampler, 0.5)
    plain.load_state_dict(weights(policy), strict=False)
    terms = []
    for sample in samples:
        prompt, completion = sample.rollout.prompt_ids, sample.rollout.completion_ids
        logits = plain(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / temperature).log_softmax(-1)[range(len(completion)), completion]
        difference = torch.tensor(sample.ref_logprobs) - logprobs
        terms.append(difference.exp() - 1 - difference)
    penalty = torch.cat(terms).mean()
    penalty.backward()
    assert penalty.item() > 0.01 and penalised - loss == pytest.approx(0.5 * penalty.item(), rel=1e-3)
    found = {name: (with_penalty[name] - without[name]) / 0.5 for name in without}
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert largest_error(found, expected) < 1e-3


def test_with_a_penalty_the_policy_stays_nearer(sampler):
    """Ten plain steps on the same responses, with and without."""
    distances = []
    for kl in (0.0, 5.0):
        policy, reference, _, samples, config = kl_setting(sampler, 1.0)
        config.kl, config.learning_rate, config.lr_schedule = kl, 1e-3, "constant"
        optimizer = make_optimizer(policy, config)
        for step in range(10):
            update(policy, optimizer, samples, config, sampler.ranks, step)
        start = weights(reference)
        distances.append(sum((one - start[name]).pow(2).sum().item() for name, one in weights(policy).items()))
    assert distances[1] < 0.9 * distances[0]
