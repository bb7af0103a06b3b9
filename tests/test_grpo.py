"""One GRPO step: by hand, then the packed and sharded path against the plain one (reference.py); the KL penalty."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from reference import (
    DENSE, REWARDS, CaptureGradients, largest_error, load_plain, make_groups, make_run, naive_score, naive_update,
    same_bits, tiny_config, weights,
)  # fmt: skip

from config import Config
from grpo import (
    Group, MicroBatch, Sample, bundle, bundle_length, clipped_loss, group_advantages, k3, keep_group, learning_rate,
    make_optimizer, make_samples, mini_batches, pack_samples, micro_batch_plan, update,
)  # fmt: skip
from methods import grpo_samples
from model import build_policy, load_replica
from rollout import Rollout

CPU = torch.device("cpu")


def response(tokens: int, finish="eos", prompt=(1, 2)) -> Rollout:
    return Rollout(list(prompt), list(range(10, 10 + tokens)), [-1.0] * tokens, "", finish)


def group(rewards, lengths, finish="eos") -> Group:
    return Group("pred", [response(tokens, finish) for tokens in lengths], list(rewards))


# ----------------------------------------------------------------------------------------------------------- advantages
def test_advantages_by_hand():
    """1, 0, 0, 0: mean 1/4, standard deviation 1/2 (with n - 1): 3/4 over 1/2, and -1/4 over 1/2."""
    plain = Config(advantage_std=False)
    assert group_advantages([1.0, 0.0, 0.0, 0.0], Config()) == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert group_advantages([1.0, 0.0, 0.0, 0.0], plain) == [0.75, -0.25, -0.25, -0.25]
    assert [sample.advantage for sample in make_samples([group([1, 0], [1, 1])], plain)] == [0.5, -0.5]


@pytest.mark.parametrize("rewards", [[0, 0], [1, 1], [0.5, 0.5]])
def test_a_group_of_equal_rewards_leaves_numerator_and_denominator(rewards):
    dropped = group(rewards, [50, 50])
    assert not keep_group(dropped)
    samples = make_samples([dropped, group([1, 0], [2, 3]), dropped], Config())
    assert [(len(one.rollout.completion_ids), one.weight, one.group) for one in samples] == [(2, 0.2, 1), (3, 0.2, 1)]
    assert make_samples([dropped], Config()) == []


def test_truncated_responses_stay_unless_asked_and_then_leave_both_sides_but_not_their_group():
    groups = [Group("pred", [response(2), response(3), response(40, "length")], [1.0, 0.0, 0.0])]
    assert [sample.weight for sample in make_samples(groups, Config())] == [1 / 45] * 3
    samples = make_samples(groups, Config(mask_truncated=True))
    assert [sample.weight for sample in samples] == [1 / 5] * 2
    # mean 1/3 and standard deviation 1/sqrt(3) are those of all three
    assert [sample.advantage for sample in samples] == pytest.approx([2 / 3**0.5, -1 / 3**0.5], rel=1e-5)
    samples = make_samples(groups, Config(mask_truncated=True, loss_mean="sequence"))
    assert [sample.weight for sample in samples] == pytest.approx([1 / 4, 1 / 6])


def test_mini_batches_keep_groups_whole_and_weigh_each_part_as_a_batch_of_its_own():
    """Five groups, the second dropped: 1 and 4 are the first part, 3 and 5 the second. Tokens: 3 + 7, and 5 + 5."""
    sizes = [[1, 2], [9, 9], [2, 3], [3, 4], [1, 4]]
    groups = [Group("gen" if n > 2 else "pred", group([n != 1, 0], size).rollouts, [n != 1, 0.0])
              for n, size in enumerate(sizes)]  # fmt: skip
    by_sequence = [[1 / 4, 1 / 8, 1 / 12, 1 / 16], [1 / 8, 1 / 12, 1 / 4, 1 / 16]]
    for loss_mean, expected in (("token", [[1 / 10] * 4] * 2), ("sequence", by_sequence)):
        samples = make_samples(groups, Config(loss_mean=loss_mean))
        parts = mini_batches(samples, 2)
        assert [[one.group for one in part] for part in parts] == [[0, 0, 3, 3], [2, 2, 4, 4]]  # both roles in each
        assert [[one.weight for one in part] for part in parts] == [pytest.approx(row) for row in expected]
        assert mini_batches(samples, 1)[0] is samples  # with one part nothing is computed anew
        assert [len(part) for part in mini_batches(samples, 9)] == [2] * 4  # no more parts than groups, none empty
    assert mini_batches([], 1) == mini_batches([], 2) == []


# ------------------------------------------------------------------------------------------------------------- the loss
def loss_and_slopes(logprobs, old, sampler, advantages, weights) -> tuple[float, list[float], list[bool]]:
    """Loss, its derivatives by the log-probs, and which of them the clip removed; one list entry a token."""
    logprobs = torch.tensor(logprobs, requires_grad=True)
    sampler, advantages, weights = (torch.tensor(values) for values in (sampler, advantages, weights))
    batch = SimpleNamespace(sampler_logprobs=sampler, advantages=advantages, weights=weights)
    loss, clipped = clipped_loss(logprobs, torch.tensor(old), batch, Config(clip_low=0.2, clip_high=0.28))
    loss.backward()
    return loss.item(), logprobs.grad.tolist(), clipped.tolist()


@pytest.mark.parametrize("ratio, advantage, loss, slope, clipped", [
    (1.0, 2.0, -2.0, -2.0, False), (1.0, -2.0, 2.0, 2.0, False),  # the first update: -A, whose derivative is -A
    (1.1, 2.0, -2.2, -2.2, False), (1.1, -2.0, 2.2, 2.2, False),  # inside
    (1.27, 2.0, -2.54, -2.54, False),  # clip-higher: 1.27 is still inside above, ...
    (1.5, 2.0, -2.56, 0.0, True),  # too probable already: 1.28 A
    (1.5, -2.0, 3.0, 3.0, False),  # too probable and wrong: unclipped, must come down
    (0.75, -2.0, 1.6, 0.0, True),  # ... 0.75 is outside below: 0.8 A
    (0.75, 2.0, -1.5, -1.5, False),  # improbable and right: unclipped, must go up
    (1.5, 0.0, 0.0, 0.0, False),
])  # fmt: skip
def test_the_clip_by_hand(ratio, advantage, loss, slope, clipped):
    found = loss_and_slopes([math.log(ratio)], [0.0], [0.0], [advantage], [1.0])
    assert found == (pytest.approx(loss, rel=1e-6), pytest.approx([slope], rel=1e-6), [clipped])


@pytest.mark.parametrize("importance, factor", [(0.25, 0.25), (1.0, 1.0), (1.9, 1.9), (2.0, 2.0), (7.0, 2.0)])
def test_the_importance_weight_multiplies_and_is_capped(importance, factor):
    loss, (slope,), _ = loss_and_slopes([math.log(1.1)], [0.0], [-math.log(importance)], [3.0], [0.5])
    assert [loss, slope] == pytest.approx([-0.5 * factor * 3.3] * 2, rel=1e-5)


def test_a_loss_by_hand():
    """Rewards 1, 0, 0, 0: A = 1.5, -0.5, -0.5, -0.5. Ratios 1.5, 0.5, 1, 2 on 1, 2, 3, 4 tokens, so that min(rho A,
    clip(rho) A) is 1.28 * 1.5 = 1.92 (clipped), 0.8 * -0.5 = -0.4 (clipped), -0.5, -1. In the mean of tokens, DAPO,
    every token weighs the same: (1.92 - 2 * 0.4 - 3 * 0.5 - 4 * 1) / 10 = -0.438; in the mean of sequences, GRPO, every
    response: (1.92 - 0.4 - 0.5 - 1) / 4 = 0.005."""
    by_response = [1 / 4, 1 / 8, 1 / 12, 1 / 16]
    for loss_mean, each, expected in (("token", [1 / 10] * 4, 0.438), ("sequence", by_response, -0.005)):
        config = Config(loss_mean=loss_mean)
        samples = make_samples([group([1, 0, 0, 0], [1, 2, 3, 4])], config)
        assert [sample.weight for sample in samples] == pytest.approx(each)
        batch = pack_samples([[sample] for sample in samples], CPU)
        ratios = torch.tensor([1.5, *[0.5] * 2, *[1.0] * 3, *[2.0] * 4])
        loss, clipped = clipped_loss(batch.sampler_logprobs + ratios.log(), batch.sampler_logprobs, batch, config)
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        assert clipped.tolist() == [True] * 3 + [False] * 7


def test_where_the_clip_has_removed_the_gradient_a_ratio_beyond_float32_spoils_nothing():
    """e^90 overflows; beside it stands a token whose gradient counts."""
    loss, slopes, clipped = loss_and_slopes([0.0, 0.0], [-90.0, 0.0], [-90.0, 0.0], [1.0, 1.0], [0.5, 0.5])
    assert (loss, slopes, clipped) == (pytest.approx(-0.5 * 1.28 - 0.5), [0.0, -0.5], [True, False])


# -------------------------------------------------------------------------------------------------------------- packing
def test_only_completion_tokens_are_trained_each_predicted_by_the_token_before():
    first, second = Rollout([1, 2, 3], [4, 5], [-0.1, -0.2], "", "eos"), Rollout([6], [7], [-0.3], "", "eos")
    samples = make_samples([Group("pred", [first, second], [1.0, 0.0])], Config(advantage_std=False))
    batch = pack_samples([[sample] for sample in samples], CPU)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.predicts.tolist() == [2, 3, 5] and batch.targets.tolist() == [4, 5, 7]
    assert batch.sampler_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3])
    assert batch.advantages.tolist() == [0.5, 0.5, -0.5]
    assert batch.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_with_shared_prompts_a_group_is_packed_as_its_prompt_once_and_all_completions():
    """The prompt 1 2 3 with completions 4 5 and 9, then 6 with 7 alone, which is packed as ever."""
    responses = (([1, 2, 3], [4, 5]), ([6], [7]), ([1, 2, 3], [9]))
    samples = [Sample(Rollout(prompt, tokens, [-0.1] * len(tokens), "", "eos"), advantage, 1 / 4)
               for advantage, (prompt, tokens) in enumerate(responses)]  # fmt: skip
    bundles = bundle(samples, Config(share_prompts=True))
    assert bundles == [[samples[0], samples[2]], [samples[1]]]
    assert [bundle_length(one) for one in bundles] == [6, 2]
    batch = pack_samples(bundles, CPU)
    inputs = {name: batch.inputs[name].tolist() for name in batch.inputs if "max" not in name}
    assert inputs == {
        "input_ids": [[1, 2, 3, 4, 5, 9, 6, 7]], "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5, 6, 8], "cu_seq_lens_k": [0, 3, 8, 12, 14],
        "shared_keys": [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7],
    }  # fmt: skip
    assert batch.predicts.tolist() == [2, 3, 2, 6]  # 4 and 9 are both predicted by the prompt's last token
    assert batch.targets.tolist() == [4, 5, 9, 7] and batch.advantages.tolist() == [0, 0, 2, 1]


def test_a_group_that_outgrows_a_micro_batch_is_computed_in_parts_each_with_the_prompt():
    samples = [Sample(response(tokens, prompt=range(10)), 1.0) for tokens in (5, 4, 3, 8)]
    config = Config(share_prompts=True, tokens_per_micro_batch=20)
    assert bundle(samples, config) == [samples[:2], samples[2:3], samples[3:]]  # 19, then 13, then 18 tokens
    assert bundle(samples, Config(share_prompts=False)) == [[sample] for sample in samples]


def test_a_rank_without_work_packs_a_dummy_of_weight_zero():
    batch = pack_samples([], CPU)
    assert batch.inputs["input_ids"].shape == (1, 2) and batch.weights.tolist() == [0.0]
    logprobs = torch.tensor([-500.0], requires_grad=True)  # however improbable the dummy, 0 times its penalty is 0
    (batch.weights * k3(logprobs, batch.ref_logprobs)).sum().backward()
    assert logprobs.grad.tolist() == [0.0]


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("number", [1, 7, 64, 300])
def test_a_plan_holds_every_sequence_once_within_the_budget_and_evenly(number, world):
    rng = random.Random(number)
    lengths = [rng.randint(1, 100) for _ in range(number)]
    bins = micro_batch_plan(lengths, 100, world)
    loads = [sum(lengths[index] for index in one) for one in bins]
    assert sorted(index for one in bins for index in one) == list(range(number))
    assert len(bins) % world == 0 and max(loads) <= 100
    assert len(bins) < sum(lengths) / 100 * 1.5 + 2 * world  # few
    assert bins == micro_batch_plan(list(lengths), 100, world)  # the same on every rank
    if number == 300:
        per_rank = [sum(loads[rank::world]) for rank in range(world)]
        assert max(per_rank) - min(per_rank) <= 100


def test_plans_by_hand():
    assert micro_batch_plan([5, 4, 3, 2], budget=8, world=2) == [[0, 3], [1, 2]]
    assert micro_batch_plan([5, 4, 3, 2], budget=14, world=1) == [[0, 1, 2, 3]]
    assert micro_batch_plan([3], budget=8, world=2) == [[0], []]  # the second rank gets a dummy
    assert micro_batch_plan([], budget=8, world=2) == []
    assert list(map(len, micro_batch_plan([5] * 1000, budget=8, world=2))) == [1] * 1000  # no two fit: at once
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a micro-batch of 8"):
        micro_batch_plan([3, 9], budget=8, world=1)


# ---------------------------------------------------------------------------------------------------- the learning rate
def test_learning_rate_warms_up_and_falls_along_a_cosine_or_stays():
    config = Config(learning_rate=1.0, warmup_steps=10, steps=110, lr_schedule="cosine")
    assert [learning_rate(config, step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(config, 60) == pytest.approx(0.5)  # half-way
    assert learning_rate(config, 35) == pytest.approx(0.5 * (1 + 0.5**0.5))
    assert learning_rate(config, 109) == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))
    assert learning_rate(config, 110) == 0.0
    config = Config(learning_rate=2.0, warmup_steps=4, steps=100, lr_schedule="constant")
    assert [learning_rate(config, step) for step in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    # one schedule over both methods of a warmed-up run: no restart where they change
    warmed = Config(warmup_method="random_span", warmup_method_steps=100)
    assert all(learning_rate(warmed, step) == learning_rate(Config(), step) for step in range(2000))


# ------------------------------------------------------------------------------- the whole update against the plain one
@pytest.fixture
def build_policy_for(folders, ranks):
    def build(family="smollm3", **changes):
        config = tiny_config(folders[family], **changes)
        return build_policy(load_replica(config, ranks), config, ranks), config, load_plain(folders[family])

    return build


@pytest.mark.parametrize("changes", [
    *({"family": family, "tokens_per_micro_batch": budget, "gradient_checkpointing": on}
      for family in DENSE for budget in (60, 10_000) for on in (False, True)),
    {"loss_mean": "sequence"}, {"mask_truncated": True}, {"advantage_std": False},
])  # fmt: skip
def test_loss_and_gradients_equal_a_naive_padded_loop(build_policy_for, ranks, changes):
    sizes = {"tokens_per_micro_batch": 60, "temperature": 0.7, "max_grad_norm": 1e9}
    policy, config, plain = build_policy_for(**sizes | changes)
    groups = make_groups(plain, REWARDS)
    expected, found = CaptureGradients(plain), CaptureGradients(policy)
    metrics = naive_update(plain, expected, groups, config)
    result = update(policy, found, make_samples(groups, config), config, ranks, 0)
    assert largest_error(found.gradients, expected.gradients) < 1e-4
    assert {key: result[key] for key in metrics} == pytest.approx(metrics, rel=1e-4)
    norm = torch.cat([gradient.flatten() for gradient in expected.gradients.values()]).norm().item()
    assert result["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("passes, parts, mean", [(1, 1, "token"), (2, 1, "token"), (1, 2, "token"), (2, 2, "sequence")])
def test_all_steps_of_a_batch_clip_against_the_policy_before_them(build_policy_for, ranks, passes, parts, mean):
    """Plain gradient descent with a step large enough that ratios leave the clip's range."""
    keys = {"loss_mean": mean, "learning_rate": 1.0, "lr_schedule": "constant", "tokens_per_micro_batch": 60}
    policy, config, plain = build_policy_for(updates_per_batch=passes, mini_batches=parts, **keys)
    groups, steps, before = make_groups(plain, REWARDS), [], weights(plain)
    metrics = naive_update(plain, torch.optim.SGD(plain.parameters(), lr=1.0), groups, config)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    result = update(policy, optimizer, make_samples(groups, config), config, ranks, 0)
    moved, expected = ({name: x - before[name] for name, x in weights(model).items()} for model in (policy, plain))
    assert len(steps) == passes * parts and largest_error(moved, expected) < 1e-4
    assert {key: result[key] for key in metrics} == pytest.approx(metrics, rel=1e-4)
    clipped = result["clip_fraction"]
    assert clipped == 0 if passes * parts == 1 else 0 < clipped < 0.5  # in the first step the ratio is 1
    assert result["grad_norm"] > config.max_grad_norm == 1  # as it was before it was clipped
    assert result["trained_tokens"] == sum(len(one.rollout.completion_ids) for one in make_samples(groups, config))


# ---------------------------------------------------------------------------- what moves the weights, and what does not
def test_the_optimizer_gets_the_configs_values_and_the_rate_of_the_step_and_nothing_where_all_groups_are_dropped(
    build_policy_for, ranks
):
    """AdamW would decay the weights and drift along its momentum."""
    keys = {"adam_beta1": 0.8, "adam_beta2": 0.9, "weight_decay": 0.1, "learning_rate": 1e-3, "warmup_steps": 10}
    policy, config, plain = build_policy_for(**keys)
    optimizer = make_optimizer(policy, config)
    result = update(policy, optimizer, make_samples(make_groups(plain, REWARDS), config), config, ranks, step=4)
    settings = optimizer.param_groups[0]
    assert (settings["betas"], settings["weight_decay"]) == ((0.8, 0.9), 0.1)
    assert settings["lr"] == result["lr"] == pytest.approx(5e-4)
    before, steps = weights(policy), [state["step"].item() for state in optimizer.state.values()]
    samples = make_samples(make_groups(plain, [[1.0, 1.0], [0.0, 0.0, 0.0]]), config)
    result = update(policy, optimizer, samples, config, ranks, 1)
    assert same_bits(weights(policy), before)
    assert [state["step"].item() for state in optimizer.state.values()] == steps == [1.0] * len(steps)
    assert result == {"lr": learning_rate(config, 1), "trained_tokens": 0, "trained_responses": 0}  # none else measured


# ------------------------------------------------------------------------------------------------------- the KL penalty
def test_k3_by_hand_and_on_average_the_divergence_of_the_policy_from_the_reference():
    policy, reference = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.25, 0.25, 0.5]))
    values = k3(policy.log(), reference.log())
    expected = [0.5 - 1 + math.log(2), 0.25 / 0.3 - 1 - math.log(0.25 / 0.3), 2.5 - 1 - math.log(2.5)]
    assert values.tolist() == pytest.approx(expected)
    assert (values > 0).all() and k3(policy.log(), policy.log()).tolist() == [0, 0, 0]
    assert (policy * values).sum().item() == pytest.approx((policy * (policy / reference).log()).sum().item())


def gradients(run, samples, kl: float) -> tuple[float, dict]:
    run.config.kl = kl
    capture = CaptureGradients(run.policy)
    loss = update(run.policy, capture, samples, run.config, run.ranks, 0)["loss"]
    return loss, capture.gradients


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_penalty_is_0_at_the_start_and_then_the_mean_k3_over_trained_tokens(build_sampler, folders, temperature):
    """Value and gradient, against the plain model at both places. At the sampling temperature, as the ratio is."""
    changes = {"max_grad_norm": 1e9, "tokens_per_micro_batch": 100, "learning_rate": 1e-2, "lr_schedule": "constant"}
    run = make_run(build_sampler(folders["smollm3"], kl=0.1, temperature=temperature, **changes))
    config, plain = run.config, load_plain(folders["smollm3"])
    groups = make_groups(plain, REWARDS)
    samples = grpo_samples(run, groups, [], [])
    sequences = [(sample.rollout.prompt_ids, sample.rollout.completion_ids) for sample in samples]
    for sample, (logprobs, _) in zip(samples, naive_score(plain, sequences, temperature), strict=True):
        assert sample.ref_logprobs == pytest.approx(logprobs, abs=1e-5)
    config.kl = 0.0
    assert {one.ref_logprobs for one in grpo_samples(run, groups, [], [])} == {None}  # only where there is a penalty
    loss, without = gradients(run, samples, 0.0)
    penalised, with_penalty = gradients(run, samples, 10.0)
    assert penalised == pytest.approx(loss, abs=1e-5) and largest_error(with_penalty, without) < 1e-4

    config.kl = 0.1
    update(run.policy, run.optimizer, samples, config, run.ranks, 0)
    loss, without = gradients(run, samples, 0.0)
    penalised, with_penalty = gradients(run, samples, 0.5)
    plain.load_state_dict(weights(run.policy), strict=False)
    terms = []
    for sample, (prompt, completion) in zip(samples, sequences, strict=True):
        logits = plain(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / temperature).log_softmax(-1)[range(len(completion)), completion]
        difference = torch.tensor(sample.ref_logprobs) - logprobs
        terms.append(difference.exp() - 1 - difference)
    penalty = torch.cat(terms).mean()
    penalty.backward()
    assert penalty.item() > 0.01 and penalised - loss == pytest.approx(0.5 * penalty.item(), rel=1e-3)
    found = {name: (with_penalty[name] - without[name]) / 0.5 for name in without}
    assert largest_error(found, {name: parameter.grad for name, parameter in plain.named_parameters()}) < 1e-3


# ---- against another implementation
# Loss and its slopes by log-prob, computed once by TRL 1.16.0, GRPOTrainer._compute_loss (epsilon 0.2 and 0.28,
# vllm_importance_sampling_correction with its ratio capped at 2 where `sampler`), on the tensors of the test below.
# The definitions that differ are left out: TRL keeps groups without contrast in its denominator.
FROM_TRL = {
    "token": (-0.0298328, [-0.08683, -0.052665, 0.0, 0.078567, 0.0, -0.133333, 0.0, 0.21983, 0.109164]),
    "sequence": (-0.0185246, [-0.065122, -0.039499, 0.0, 0.176775, 0.0, -0.15, 0.0, 0.164872, 0.081873]),
    "kl": (-0.0284807, [-0.087998, -0.055125, 0.002014, 0.076107, 0.002014, -0.132276, -0.001169, 0.220887, 0.106704]),
    "sampler": (-0.1468716, [-0.088584, -0.052665, 0.0, 0.106054, 0.0, -0.266667, 0.0, 0.19891, 0.120645]),
}


@pytest.mark.parametrize("kind", FROM_TRL)
def test_loss_and_slopes_are_those_of_trl(kind):
    """Responses of 3, 1, 2 and 3 tokens; ratios on both sides of both clips."""
    logprobs = torch.tensor([-0.5, -1.2, -0.3, -2.0, -0.7, -0.1, -1.5, -0.9, -2.2], requires_grad=True)
    old = torch.tensor([-0.6, -0.8, -0.9, -2.0, -1.0, -0.1, -1.1, -1.4, -2.0])
    sampler = torch.tensor([-0.62, -0.8, -0.9, -2.3, -1.0, -1.2, -1.1, -1.3, -2.1]) if kind == "sampler" else old
    ref = torch.tensor([-0.4, -1.0, -0.5, -1.8, -0.9, -0.2, -1.4, -1.0, -2.0])
    lengths = torch.tensor([3, 1, 2, 3])
    advantages = torch.tensor([0.7071, -0.7071, 1.2, -1.2]).repeat_interleave(lengths)
    weights = 1 / (4 * lengths.repeat_interleave(lengths)) if kind == "sequence" else torch.full((9,), 1 / 9)
    batch = MicroBatch({}, torch.zeros(9), torch.zeros(9), sampler, advantages, weights, ref)
    loss, _ = clipped_loss(logprobs, old, batch, Config())
    if kind == "kl":
        loss = loss + 0.1 * (weights * k3(logprobs, ref)).sum()
    loss.backward()
    expected, slopes = FROM_TRL[kind]
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert logprobs.grad.tolist() == pytest.approx(slopes, abs=2e-6)
