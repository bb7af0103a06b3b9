"""A second sharded copy of the model, frozen or following as a moving average, and scoring of given tokens with either.

One mechanism, three uses:

    rlp             the copy follows by `ema_update`; `score` is log p(x_t | x_<t) without a thought, the baseline
    entropy_token   the copy is never updated; the entropies of `score(reference, [(ids[:1], ids[1:])])` say where the
                    start model finds the next token hard
    k3 penalty      the copy is never updated; `score(..., temperature=config.temperature)` of the responses are the
                    ref_logprobs of `grpo.k3`

Memory of the copy: 4 bytes a parameter, divided by the number of ranks: SmolLM3-3B on eight GPUs 1.5 GB each. While it
scores, also what FSDP holds gathered, in config.dtype: embedding and head (0.5 GB there) and a layer or two (0.16 GB
each). Float32 because a step of (1 - tau) = 0.001 of a small difference would round to nothing in bfloat16.
No optimizer, no gradients, no activations beyond one micro-batch.

Build the copy before a checkpoint is loaded: then it is the start model, also in a resumed run. A moving average has a
history, so its masters belong into the checkpoint. Leaves out rewards (rlp.py) and the loss (grpo.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from config import Config
from grpo import Sample, pack_samples, plan
from model import Ranks, build_policy, gather
from sampler import Rollout, Sampler


def build_reference(replica: nn.Module, config: Config, ranks: Ranks) -> nn.Module:
    """A copy of the replica, sharded like the policy and called like it, without gradients. Every rank calls it."""
    reference = build_policy(replica, replace(config, gradient_checkpointing=False), ranks)
    return reference.eval().requires_grad_(False)


def needs_reference(config: Config) -> bool:
    """Whether the run keeps a second copy."""
    return {"rlp", "entropy_token"} & {config.method, config.warmup_method} != set() or config.kl > 0


def add_ref_logprobs(samples: list[Sample], reference: nn.Module, sampler: Sampler) -> None:
    """What the frozen copy thinks of the sampled tokens, for the KL penalty. Every rank calls it."""
    config = sampler.config
    sequences = [(sample.rollout.prompt_ids, sample.rollout.completion_ids) for sample in samples]
    scores = score(reference, sequences, config, sampler.ranks, config.temperature)
    for sample, (logprobs, _) in zip(samples, scores, strict=True):
        sample.ref_logprobs = logprobs


@torch.no_grad()
def ema_update(reference: nn.Module, policy: nn.Module, tau: float) -> None:
    """r <- tau r + (1 - tau) p for every parameter, in place; call it once a step of the loop.

    Both copies are cut over the ranks in the same way, so each rank averages its own shards and nothing is sent. tau 1
    leaves the copy as it is, tau 0 makes it the policy; RLP (arXiv 2510.01265) takes 0.999. Started equal, the copy
    after n steps holds a share tau^n of the start. Raises ValueError if tau is not between 0 and 1.

    With tau 0.5 and a parameter of the policy at 1, 2, 4 after three steps, a copy that began at 0 goes 0.5, 1.25,
    2.625.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}: must be between 0 and 1")
    for (name, average), (other, current) in zip(reference.named_parameters(), policy.named_parameters(), strict=True):
        assert name == other and average.placements == current.placements, f"{name} and {other} are cut differently"
        average.to_local().lerp_(current.to_local(), 1 - tau)


@torch.no_grad()
def score(
    model: nn.Module, sequences: list[tuple[list[int], list[int]]], config: Config, ranks: Ranks,
    temperature: float = 1.0,
) -> list[tuple[list[float], list[float]]]:  # fmt: skip
    """Of each (prefix ids, continuation ids): log-prob and entropy at each continuation token, nats, teacher-forced.

    model: the reference, or the trainer's policy. The same list goes in and comes out on every rank; the work is split
    over them in packed micro-batches, equally many forwards each, because every forward of a sharded model is a
    collective. The entropy at a token is that of the distribution it was drawn from. temperature: 1 for what the model
    believes; the sampler's for what is compared with sampled responses.
    Raises ValueError for an empty prefix (nothing predicts the first token) or continuation.
    """
    for number, (prefix, continuation) in enumerate(sequences):
        if not prefix or not continuation:
            raise ValueError(f"sequence {number}: {len(prefix)} prefix and {len(continuation)} continuation tokens")
    lengths = [len(prefix) + len(continuation) for prefix, continuation in sequences]
    bins = plan(lengths, config.tokens_per_micro_batch, ranks.world)
    mine = []
    for one in bins[ranks.rank :: ranks.world]:
        batch = pack_samples([[_as_sample(*sequences[index])] for index in one], ranks.device)
        predictions = {"predicts": batch.predicts, "targets": batch.targets, "temperature": temperature}
        logprobs, entropies = (values.tolist() for values in model(**predictions, **batch.inputs))
        begin = 0
        for index in one:  # none where the bin is empty: a dummy ran
            end = begin + len(sequences[index][1])
            mine.append((index, logprobs[begin:end], entropies[begin:end]))
            begin = end
    scores = {index: (logprobs, entropies) for index, logprobs, entropies in gather(mine)}
    return [scores[index] for index in range(len(sequences))]


def _as_sample(prefix: list[int], continuation: list[int]) -> Sample:
    """What pack_samples packs; nobody sampled it and nothing weighs it."""
    return Sample(Rollout(prefix, continuation, [0.0] * len(continuation), "", ""), 0.0)
