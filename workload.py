"""One step of train.py on given work: prompts of random tokens, and the length that each response shall have.

What bench.py times. The phases are the run's own (`rollout`, `update`, refresh by `to_sampler`), replica and policy as
train.py builds them. Only what they work on is made up, so that nothing depends on what a model says. Rewards are 0
or 1 by the seed. Left out: masking, parsing, scoring by a second copy.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation.continuous_batching import PagedAttentionCache

from config import Config
from evidence import clock, largest_memory
from grpo import Group, bundle, make_samples, update
from model import Ranks, load_replica, load_tokenizer
from offload import Lender, to_sampler, to_trainer
from plan import Phase
from rollout import derive_seed, rollout
from sampler import Sampler, make_sampler

NEVER = "\x00never{"
"""An opening that no response contains: each is searched for it, as in a run, and none ends by it."""


@dataclass
class Work:
    """One phase with its inputs: token prompts, and the length that each response shall have."""

    phase: Phase
    prompts: list[list[int]]
    limits: list[list[int]]


def stand_in_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One made-up word per token id, for a model whose tokenizer is not at hand."""
    tokenizer = Tokenizer(models.WordLevel({f" w{number}": number for number in range(vocabulary)}, " w0"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=" w1")


def random_sampler(config: Config, hf_config, ranks: Ranks) -> Sampler:
    """A sampler with random weights, whose responses no end-of-sequence ends."""
    local = (Path(config.model).expanduser() / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(config) if local else stand_in_tokenizer(hf_config.vocab_size)
    sampler = make_sampler(load_replica(config, ranks, hf_config), tokenizer, config, ranks)
    sampler.eos_ids = {hf_config.vocab_size}  # an id that cannot be sampled
    return sampler


def make_work(phase: Phase, lengths: list[int], prompt: int, vocabulary: int, seed: int) -> Work:
    """Prompts of random tokens and the lengths dealt out in order."""
    rng = random.Random(derive_seed(seed, phase.name))
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(phase.prompts)]
    return Work(phase, prompts, [lengths[i : i + phase.count] for i in range(0, len(lengths), phase.count)])


@contextmanager
def recorded_caches(sizes: list):
    """Inside, each cache that a sampler makes adds (tokens, bytes) to `sizes`; it is gone when rollout returns."""
    original = PagedAttentionCache.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        sizes.append((self.max_tokens_read, self.cache_tensor.nbytes))

    PagedAttentionCache.__init__ = __init__
    try:
        yield
    finally:
        PagedAttentionCache.__init__ = original


def seeded_rewards(count: int, rng: random.Random) -> list[float]:
    """0 or 1 each, both in every group."""
    rewards = [1.0, 0.0] + [float(rng.randrange(2)) for _ in range(count - 2)]
    return rng.sample(rewards, count)


def one_step(works: list[Work], lender: Lender, sampler: Sampler, number: int) -> dict:
    """A step of train.py on given work. Returns seconds as time/PHASE, tokens, memory. Every rank calls it.

    Raises RuntimeError if a response did not get the length that it was to have.
    """
    config, row, caches, groups = sampler.config, {}, [], []
    rng = random.Random(derive_seed(config.seed, number, "rewards"))
    for work in works:
        phase = work.phase
        with clock(row, phase.name), recorded_caches(caches):
            noise = (number, phase.name)
            responses = rollout(sampler, work.prompts, phase.count, phase.cap, NEVER, noise, limits=work.limits)
        if [[len(one.completion_ids) for one in group] for group in responses] != work.limits:
            raise RuntimeError(f"{phase.name}, step {number}: responses did not get their lengths")
        groups += [("gen" if phase.name == "propose" else "pred", group) for group in responses]
    with clock(row, "reward"):
        rewarded = [Group(role, group, seeded_rewards(len(group), rng)) for role, group in groups]
        samples = make_samples(rewarded, config)
    memory = {}
    with clock(row, "update"), largest_memory(memory):
        to_trainer(lender)
        update(lender.policy, lender.optimizer, samples, config, sampler.ranks, number)
    peak = memory["peak_memory_gb"] if torch.cuda.is_available() else None
    with clock(row, "refresh"):
        to_sampler(lender)
    row["time/step"] = sum(row.values())
    trained = [
        (len(one[0].rollout.prompt_ids), [len(sample.rollout.completion_ids) for sample in one])
        for one in bundle(samples, config)
    ]
    tokens, size = max(caches, default=(0, 0))
    return row | {"trained": trained, "training_gb": peak, "cache_tokens": tokens, "cache_gb": size / 1e9}
