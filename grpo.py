"""GRPO: group advantages, token weights, packed micro-batches, the clipped loss, one optimizer step.

With responses o_i of a group, rewards r_i, and the policy pi over their tokens (PretrainZero; GRPO with DAPO's dropped
groups, clip-higher and token mean; a KL term only if asked for):

    A_i   = (r_i - mean r) / (std r + 1e-6)                                   group advantage
    rho_t = pi(o_t) / pi_old(o_t)                                             1 at the first update of a batch
    L     = - sum_t w_t * c_t * min(rho_t A, clip(rho_t, 1 - low, 1 + high) A)
    w_t   = 1 / (number of kept tokens, all ranks)                            or per-sequence mean, `loss_mean`
    c_t   = min(pi_old(o_t) / pi_sampler(o_t), cap)                           corrects for sampler kernels, no gradient

All normalisation sits in the weights w_t, counted once over the whole batch, which every rank knows. The loss is then a
plain sum, so that micro-batch size and number of ranks change nothing but rounding. Leaves out where rewards come from.
"""

from __future__ import annotations

import heapq
import math
import statistics
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import Config
from ops import move, pack
from ranks import Ranks, gather, stop_if_signalled
from rollout import Rollout, Sampler


def add_ref_logprobs(samples: list[Sample], reference: nn.Module, sampler: Sampler) -> None:
    """What the frozen copy thinks of the sampled tokens, for the KL penalty. Every rank calls it."""
    config = sampler.config
    sequences = [(sample.rollout.prompt_ids, sample.rollout.completion_ids) for sample in samples]
    scores = score(reference, sequences, config, sampler.ranks, config.temperature)
    for sample, (logprobs, _) in zip(samples, scores, strict=True):
        sample.ref_logprobs = logprobs


@torch.no_grad()
def score(
    model: nn.Module, sequences: list[tuple[list[int], list[int]]], config: Config, ranks: Ranks,
    temperature: float = 1.0,
) -> list[tuple[list[float], list[float]]]:  # fmt: skip
    """Of each (prefix ids, continuation ids): log-prob and entropy at each continuation token, nats, teacher-forced.

    model: the reference, the trainer's policy, or partial(ops.logprobs_of, replica). The same list goes in and comes
    out on every rank; the work is split over them in packed micro-batches, equally many forwards each, because every
    forward of a sharded model is a collective. The entropy at a token is that of the distribution it was drawn from.
    temperature: 1 for what the model believes; the sampler's for what is compared with sampled responses.
    Raises ValueError for an empty prefix (nothing predicts the first token) or continuation.
    """
    for number, (prefix, continuation) in enumerate(sequences):
        if not prefix or not continuation:
            raise ValueError(f"sequence {number}: {len(prefix)} prefix and {len(continuation)} continuation tokens")
    lengths = [len(prefix) + len(continuation) for prefix, continuation in sequences]
    bins = micro_batch_plan(lengths, config.tokens_per_micro_batch, ranks.world)
    given = [Sample(Rollout(*pair, [], "", ""), 0.0) for pair in sequences]
    mine = []
    for one in bins[ranks.rank :: ranks.world]:
        batch = pack_samples([[given[index]] for index in one], ranks.device)
        predictions = {"predicts": batch.predicts, "targets": batch.targets, "temperature": temperature}
        logprobs, entropies = (values.tolist() for values in model(**predictions, **batch.inputs))
        begin = 0
        for index in one:  # none where the bin is empty: a dummy ran
            end = begin + len(sequences[index][1])
            mine.append((index, logprobs[begin:end], entropies[begin:end]))
            begin = end
    scores = {index: (logprobs, entropies) for index, logprobs, entropies in gather(mine)}
    return [scores[index] for index in range(len(sequences))]


@dataclass
class Group:
    """The responses to one prompt, and what each earned. Advantages are relative to this group."""

    role: str
    """`gen` or `pred`."""
    rollouts: list[Rollout]
    rewards: list[float]


@dataclass
class Sample:
    """One response that is trained on."""

    rollout: Rollout
    advantage: float
    weight: float = 0.0
    """Of each of its completion tokens in the loss."""
    ref_logprobs: list[float] | None = None
    """Of its completion tokens under the frozen copy, where there is a KL penalty."""
    group: int = 0
    """Number of its GRPO group in the batch: mini-batches keep groups whole."""
    likelihood: bool = False
    """Cross-entropy instead of the clipped loss; all samples of a batch or none."""

    @property
    def tokens(self) -> int:
        """What it adds to its prompt in a packed row."""
        return len(self.rollout.completion_ids)

    @property
    def shares(self) -> tuple:
        """What is computed once for all samples that have the same."""
        return tuple(self.rollout.prompt_ids)


def group_advantages(rewards: list[float], config: Config) -> list[float]:
    """A_i = (r_i - mean) / (std + 1e-6), the standard deviation with n - 1 (arXiv 2402.03300). With advantage_std=False
    there is no division (Dr.GRPO).

    >>> [round(a, 3) for a in group_advantages([1.0, 0.0, 0.0, 0.0], Config())]
    [1.5, -0.5, -0.5, -0.5]
    """
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + 1e-6 if config.advantage_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def keep_group(group: Group) -> bool:
    """False if all rewards are equal (DAPO): predictions all right or all wrong, or masks that all earn the same."""
    return max(group.rewards) > min(group.rewards)


def make_samples(groups: list[Group], config: Config) -> list[Sample]:
    """Kept groups -> responses with advantage and token weight. Dropped groups count in neither sum nor divisor."""
    samples = [
        Sample(rollout, advantage, group=number)
        for number, group in enumerate(groups)
        if keep_group(group)
        for rollout, advantage in zip(group.rollouts, group_advantages(group.rewards, config), strict=True)
        if not (config.mask_truncated and rollout.finish == "length")
    ]
    tokens = sum(len(sample.rollout.completion_ids) for sample in samples)
    for sample in samples:  # the loss's divisor, over all ranks: every rank holds the whole list
        own = len(sample.rollout.completion_ids)
        sample.weight = 1 / tokens if config.loss_mean == "token" else 1 / (len(samples) * own)
    return samples


def micro_batch_plan(lengths: list[int], budget: int, world: int) -> list[list[int]]:
    """Indices of sequences per micro-batch, the same on every rank; rank r runs plan[r::world].

    As few as fit `budget` tokens each, their number a multiple of `world` so that all ranks run equally many, loads
    even: the longest sequence goes to the emptiest bin. A bin may stay empty; it still runs, with zero weight.

    >>> micro_batch_plan([5, 4, 3, 2], budget=8, world=2)
    [[0, 3], [1, 2]]
    """
    if not lengths:
        return []
    if max(lengths) > budget:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a micro-batch of {budget}")
    least = max(sum(lengths), budget * sum(2 * length > budget for length in lengths))  # two long ones share no bin
    rounds = -(-least // (budget * world))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * world)]
        heap = [(0, number) for number in range(len(bins))]
        fits = True
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            load, number = heapq.heappop(heap)
            bins[number].append(index)
            fits = fits and load + lengths[index] <= budget
            heapq.heappush(heap, (load + lengths[index], number))
        if fits:
            return bins
        rounds += 1


@dataclass
class MicroBatch:
    """Packed inputs of the policy and, per trained token (M of them), what the loss needs."""

    inputs: dict
    predicts: Tensor
    """(M,) positions in the row whose next token is trained."""
    targets: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor
    """(M,) zeros without a KL penalty."""


def bundle(samples: list[Sample], config: Config) -> list[list[Sample]]:
    """What is packed as one piece: a response with its prompt; with share_prompts, responses to one prompt with it.

    A prompt whose responses outgrow a micro-batch is computed in several, with a share of them each.
    """
    if not config.share_prompts:
        return [[sample] for sample in samples]
    open_bundles: dict[tuple, list[Sample]] = {}  # by prompt, in order
    done = []
    for sample in samples:
        prompt = sample.shares
        own = open_bundles.setdefault(prompt, [])
        if own and bundle_length([*own, sample]) > config.tokens_per_micro_batch:
            done.append(open_bundles.pop(prompt))
            own = open_bundles[prompt] = []
        own.append(sample)
    return done + list(open_bundles.values())


def bundle_length(samples: list[Sample]) -> int:
    """Tokens of a bundle: its prompt once, and all its completions."""
    return len(samples[0].rollout.prompt_ids) + sum(sample.tokens for sample in samples)


def pack_samples(bundles: list[list[Sample]], device: torch.device) -> MicroBatch:
    """Bundles -> one packed row. Only completion tokens are trained, EOS among them if it was sampled: the token at
    position p is predicted at p - 1, the first of a completion at the end of its prompt."""
    if not bundles:  # nothing to train here, but every rank must run the same collectives: a dummy of weight zero
        dummy = Sample(Rollout([0], [0], [0.0], "", "length"), 0.0, 0.0, ref_logprobs=[-1e4])  # k3 stays finite
        bundles = [[dummy]]
    rows, prefixes, predicts, targets, per_token, begin = [], [], [], [], [], 0
    for samples in bundles:
        prompt, prompt_end = samples[0].rollout.prompt_ids, begin + len(samples[0].rollout.prompt_ids)
        if len(samples) == 1:
            rows.append(prompt + samples[0].rollout.completion_ids)
            prefixes.append(None)
        else:
            own = len(rows)
            rows += [prompt, *(sample.rollout.completion_ids for sample in samples)]
            prefixes += [None, *[own] * len(samples)]
        begin = prompt_end
        for sample in samples:
            completion = sample.rollout.completion_ids
            predicts += [prompt_end - 1, *range(begin, begin + len(completion) - 1)]
            targets += completion
            begin += len(completion)
            zeros = [0.0] * len(completion)
            sampler_logprobs = sample.rollout.sampler_logprobs or zeros  # zeros: the completion was given, not sampled
            refs = sample.ref_logprobs or zeros
            pairs = zip(sampler_logprobs, refs, strict=True)
            per_token += [(own, sample.advantage, sample.weight, ref) for own, ref in pairs]
    inputs = pack(rows, torch.device("cpu"), prefixes if len(rows) > len(bundles) else None)
    longest = {name: inputs.pop(name) for name in ("max_length_q", "max_length_k")}
    trained = {"predicts": torch.tensor(predicts), "targets": torch.tensor(targets)}
    inputs = move(inputs | trained | {"values": torch.tensor(per_token, dtype=torch.float32)}, device)
    trained = inputs.pop("predicts"), inputs.pop("targets"), *inputs.pop("values").unbind(1)
    return MicroBatch(inputs | longest, *trained)


def clipped_loss(logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config) -> tuple[Tensor, Tensor]:
    """L (see the module docstring) summed over a micro-batch, and per token whether the clip removed its gradient.
    Weights and importance weights c_t are constants; gradient through `logprobs` only."""
    # The clamp prevents 0 x inf = NaN. Above e^80 the clip has removed the gradient, or training has diverged
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=80.0))
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    correction = torch.exp(old_logprobs - batch.sampler_logprobs).clamp(max=config.max_importance)
    surrogate = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    loss = -(batch.weights * correction * surrogate).sum()
    return loss, (clipped * batch.advantages < ratio * batch.advantages).detach()


def cross_entropy(logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """For samples with `likelihood`: mean cross-entropy. clipped_loss has the gradient at ratio 1, another value."""
    return -(batch.weights * batch.advantages * logprobs).sum(), torch.zeros_like(logprobs, dtype=torch.bool)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token that the policy sampled: exp(d) - 1 - d with d = ref - policy.

    Both (M,), log-probs of the same sampled tokens at the same temperature; gradient through `logprobs` only.
    John Schulman's note "Approximating KL Divergence" (2020), as GRPO uses it (arXiv 2402.03300, equation 4): unbiased,
    like -d, but never negative and of less variance. That holds of its value. Its gradient, 1 - exp(d) per token, is in
    expectation over the policy's tokens the gradient of the other direction, KL(reference || policy).

    A token with probability 0.5 under the policy and 0.25 under the reference: 0.5 - 1 + ln 2 = 0.193.
    """
    difference = ref_logprobs.detach() - logprobs
    return torch.expm1(difference) - difference


def learning_rate(config: Config, step: int) -> float:
    """Of the update at `step` (from 0): linear warm-up, then constant or cosine to 0. A function of the step alone."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "constant":
        return config.learning_rate * warmup
    progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(policy: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW on the float32 masters; its state is sharded as they are."""
    return torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay, fused=True if torch.cuda.is_available() else None,
    )  # fmt: skip


def mini_batches(samples: list[Sample], count: int) -> list[list[Sample]]:
    """Cuts a batch into at most `count` parts with groups kept whole; the token weights of each part sum to 1.

    Groups are dealt out in turn, so that both roles are in every part. The list is the same on every rank, so the
    weights are counted over all ranks.
    """
    if count == 1:
        return [samples] if samples else []
    numbers = {group: number for number, group in enumerate(dict.fromkeys(sample.group for sample in samples))}
    parts = [[sample for sample in samples if numbers[sample.group] % count == part] for part in range(count)]
    cut = []
    for part in filter(None, parts):
        total = sum(sample.weight * len(sample.rollout.completion_ids) for sample in part)
        cut.append([replace(sample, weight=sample.weight / total) for sample in part])
    return cut


def make_micro_batches(samples: list[Sample], config: Config, ranks: Ranks, packing=pack_samples) -> list[MicroBatch]:
    """This rank's packed share of a mini-batch; every rank has equally many."""
    bundles = bundle(samples, config)
    bins = micro_batch_plan([bundle_length(one) for one in bundles], config.tokens_per_micro_batch, ranks.world)
    return [packing([bundles[i] for i in one], ranks.device) for one in bins[ranks.rank :: ranks.world]]


def trained_logprobs(policy: nn.Module, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor, float]:
    """Log-probs (M,) and, without gradient, entropies (M,) of the trained tokens (ops.logprobs_of computes them), and
    what a method adds to the loss: here nothing."""
    return *policy(predicts=batch.predicts, targets=batch.targets, temperature=temperature, **batch.inputs), 0.0


def update(
    policy: nn.Module, optimizer, samples: list[Sample], config: Config, ranks: Ranks, step: int,
    packing=pack_samples, forward=trained_logprobs,
) -> dict:  # fmt: skip
    """Optimizer steps on the samples, the same list on every rank: one for each of `mini_batches` parts of the batch,
    and the whole again `updates_per_batch` times. Returns the step's metrics. packing, forward: a method's own, called
    like pack_samples and trained_logprobs.

    The ratio is against the policy as it was before the first of these steps: with more than one it leaves 1, and the
    clip acts. With nothing to train (every group dropped) no optimizer step is made, for AdamW would still decay and
    drift, and nothing is measured.
    Raises FloatingPointError on every rank, before that optimizer step, if a loss or the gradient is not finite, and
    RuntimeError beyond `max_mismatch`.
    """
    rate = learning_rate(config, step)
    metrics = {"lr": rate, "trained_tokens": 0, "trained_responses": len(samples)}
    parts = [make_micro_batches(part, config, ranks, packing) for part in mini_batches(samples, config.mini_batches)]
    if not parts:
        return metrics
    metrics |= {"loss": 0.0, "grad_norm": 0.0, "clip_fraction": 0.0}
    given = samples[0].rollout.finish == "given"  # all or none: sft and cpt sample nothing
    temperature = 1.0 if given else config.temperature
    healthy = torch.ones((), device=ranks.device)

    # Log-probs before the first optimizer step. Of the first part they come from its own forward pass, below
    before: list[list[Tensor]] = [[] for _ in parts]
    for old, part in zip(before[1:], parts[1:], strict=True):
        for batch in part:
            stop_if_signalled()
            with torch.no_grad():
                old.append(forward(policy, batch, temperature)[0])

    steps = config.updates_per_batch * len(parts)
    first_pass = torch.zeros(6, device=ranks.device)
    for number in range(steps):
        totals = torch.zeros(6, device=ranks.device)
        old = before[number % len(parts)]
        for index, batch in enumerate(parts[number % len(parts)]):
            if number == 0:  # later the weights have changed, and the step must be finished
                stop_if_signalled()
            with watch_gradient(policy, healthy):
                logprobs, entropy, added = forward(policy, batch, temperature)
            if number == 0:
                old.append(logprobs.detach())
            if samples[0].likelihood:
                loss, clipped = cross_entropy(logprobs, batch)
            else:
                loss, clipped = clipped_loss(logprobs, old[index], batch, config)
            if config.kl:
                loss = loss + config.kl * (batch.weights * k3(logprobs, batch.ref_logprobs)).sum()
            loss = loss + added
            (loss * ranks.world).backward()  # FSDP averages the gradient over ranks; the weights ask for the sum
            trained = batch.weights > 0
            drift = torch.where(trained & (not given), old[index] - batch.sampler_logprobs, 0.0)
            kl = torch.expm1(drift) - drift  # k3 estimate of KL(sampler || trainer), never negative
            sums = (loss.detach(), trained.sum(), drift.abs().sum(), kl.sum())
            counts = (*sums, (entropy.detach() * trained).sum(), (clipped & trained).sum())
            totals += torch.stack(counts).to(totals.dtype)
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        _require_finite(totals[0], healthy, grad_norm, ranks, f"step {step + 1}, update {number + 1}")
        dist.all_reduce(totals)
        if number == 0 and 0 < config.max_mismatch < totals[3] / totals[1]:
            raise RuntimeError(
                f"step {step + 1}: the sampler is {totals[3] / totals[1]:.3g} nats a token from the trainer, over "
                f"max_mismatch={config.max_mismatch}; nothing was applied. Try use_cuda_graph=false, liger=false, or "
                f"another attention than {config.attention!r}, one at a time"
            )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics["loss"] += totals[0].item() / steps
        metrics["grad_norm"] += grad_norm.item() / steps
        metrics["clip_fraction"] += totals[5].item() / totals[1].item() / steps
        if number < len(parts):
            first_pass += totals
    _, tokens, absolute, kl, entropy, _ = first_pass.tolist()
    metrics |= {"mismatch_kl": kl / tokens, "mismatch_abs": absolute / tokens, "entropy": entropy / tokens}
    return metrics | {"trained_tokens": int(tokens)}


def watch_gradient(policy: nn.Module, healthy: Tensor):
    """Of a forward pass inside: `healthy` becomes 0 if its backward pass ends with a gradient that is not finite, the
    one at the embeddings, which has passed all layers and is this rank's own, unlike what FSDP sums."""

    def look(gradient: Tensor) -> None:
        healthy.mul_(gradient.isfinite().all())

    def watch(module, inputs, embedded: Tensor) -> None:
        embedded.register_hook(look)

    return policy.get_input_embeddings().register_forward_hook(watch)


def _require_finite(loss: Tensor, healthy: Tensor, grad_norm: Tensor, ranks: Ranks, where: str) -> None:
    """All ranks learn which hold a bad loss or gradient, so that all stop with the same message and none waits."""
    bad = torch.zeros(2, ranks.world, device=ranks.device)
    bad[:, ranks.rank] = torch.stack([~torch.isfinite(loss), healthy == 0])
    dist.all_reduce(bad)
    losses, gradients = (row.nonzero().flatten().tolist() for row in bad)
    if losses:
        raise FloatingPointError(f"{where}: loss not finite on rank {losses}; it was not applied")
    if not torch.isfinite(grad_norm):
        origin = f"on rank {gradients}" if gradients else "in the weights alone"
        raise FloatingPointError(f"{where}: gradient not finite {origin}, though every loss is; it was not applied")
