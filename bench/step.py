"""How fast one step is, on random weights: nothing is downloaded, and lengths do not depend on what a model says.

The step is that of train.py with made-up tasks: prompts of random tokens, response lengths drawn once from a seeded
list, and rewards of 0 and 1, both in each group, so that every response is trained on. One row has lognormal lengths,
one has equal lengths.

Reported: seconds by phase (median of `repeats`, without the warm-up), response tokens/s, training tokens/s, the share
of the decode limit and the MFU (on a known GPU), the sampler's cache, the largest memory in training.
Left out: masking, parsing, probe, checkpoints, scoring by a second copy.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation.continuous_batching import PagedAttentionCache

from bench.costs import (
    GPUS,
    Bundle,
    Gpu,
    architecture,
    bundle_tokens,
    cache_bytes,
    decode_limit,
    mfu,
    requests_at_once,
    response_lengths,
    slots_for,
)
from bench.options import WORDS, Options, Phase, complete, phases, split_words, text_table
from config import Config, read_config
from grpo import Group, Sample, bundle, make_optimizer, make_samples, update
from methods import Run
from metrics import clock, environment, largest_memory, peak_memory_gb, write_whole
from model import (
    Shape,
    build_policy,
    decide_checkpointing,
    describe_attention,
    load_replica,
    load_tokenizer,
    refresh,
    shape_of,
    value_bytes,
)
from ranks import Ranks, gather, start_ranks
from rollout import Sampler, derive_seed, make_sampler, rollout

NEVER = "\x00never{"
"""An opening that no response contains: every response is searched for it, as in a run, and none ends by it."""


@dataclass
class Work:
    """The input of one phase: token prompts, and the length that each response shall have."""

    phase: Phase
    prompts: list[list[int]]
    limits: list[list[int]]


@dataclass
class StepTimes:
    """What one step took on this rank."""

    seconds: dict[str, float]
    """By phase, and `step`, their sum."""
    trained: list[Bundle]
    training_gb: float | None
    """Largest memory of the GPU in the update; None on a CPU."""
    cache_tokens: int
    cache_gb: float


# ---- set-up


def stand_in_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One made-up word per token id, for a model whose tokenizer is not on disk."""
    tokenizer = Tokenizer(models.WordLevel({f" w{number}": number for number in range(vocabulary)}, " w0"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=" w1")


def random_sampler(config: Config, hf_config, ranks: Ranks) -> Sampler:
    """A sampler with random weights."""
    local = (Path(config.model).expanduser() / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(config) if local else stand_in_tokenizer(hf_config.vocab_size)
    return make_sampler(load_replica(config, ranks, hf_config), tokenizer, config, ranks)


def make_run(sampler: Sampler) -> Run:
    """The trainer beside a sampler, whose responses no end-of-sequence ends from here on. Every rank calls it."""
    replica, ranks = sampler.replica, sampler.ranks
    sampler.eos_ids = {replica.config.vocab_size}  # an id that cannot be sampled
    config = decide_checkpointing(replica.config, sampler.config, ranks)
    policy = build_policy(replica, config, ranks)
    optimizer = make_optimizer(policy, config)
    gc.collect()
    gc.freeze()  # as train.py does
    return Run(config, ranks, None, sampler, policy, None, optimizer)


def make_work(phase: Phase, lengths: list[int], prompt: int, vocabulary: int, seed: int) -> Work:
    """Prompts of random tokens; the lengths are dealt out in order."""
    rng = random.Random(derive_seed(seed, phase.name))
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(phase.prompts)]
    return Work(phase, prompts, [lengths[i : i + phase.count] for i in range(0, len(lengths), phase.count)])


# ---- one step


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


def learn(run: Run, samples: list[Sample], number: int) -> dict:
    """Update and refresh with their clocks, as in train.step."""
    row: dict = {}
    with clock(row, "update"), largest_memory(row):
        row |= update(run.policy, run.optimizer, samples, run.config, run.ranks, number)
    with clock(row, "refresh"):
        refresh(run.policy, run.sampler.replica)
    return row


def one_step(run: Run, works: list[Work], number: int) -> StepTimes:
    """A step of train.py on given work. Every rank calls it.

    Raises RuntimeError if a response did not get the length that it was to have.
    """
    row, caches, groups = {}, [], []
    rng = random.Random(derive_seed(run.config.seed, number, "rewards"))
    for work in works:
        phase, noise = work.phase, (number, work.phase.name)
        with clock(row, phase.name), recorded_caches(caches):
            responses = rollout(run.sampler, work.prompts, phase.count, phase.cap, NEVER, noise, limits=work.limits)
        if [[len(one.completion_ids) for one in group] for group in responses] != work.limits:
            raise RuntimeError(f"{phase.name}, step {number}: responses did not get their lengths")
        groups += [("gen" if phase.name == "propose" else "pred", group) for group in responses]
    with clock(row, "reward"):
        rewarded = [Group(role, group, seeded_rewards(len(group), rng)) for role, group in groups]
        samples = make_samples(rewarded, run.config)
    row |= learn(run, samples, number)
    seconds = {key[5:]: value for key, value in row.items() if key.startswith("time/")}
    trained = [
        Bundle(len(one[0].rollout.prompt_ids), [len(sample.rollout.completion_ids) for sample in one])
        for one in bundle(samples, run.config)
    ]
    tokens, size = max(caches, default=(0, 0))
    peak = row["peak_memory_gb"] if torch.cuda.is_available() else None
    return StepTimes(seconds | {"step": sum(seconds.values())}, trained, peak, tokens, size / 1e9)


# ---- rows


def time_row(run: Run, works: list[Work], shape: Shape, gpu: Gpu | None, repeats: int) -> dict:
    """A warm-up step and `repeats` more: one row of the table. Every rank calls it and gets the same."""
    steps = [one_step(run, works, number) for number in range(repeats + 1)]
    seconds = {key: statistics.median(one.seconds[key] for one in steps[1:]) for key in steps[0].seconds}
    sampling = sum(seconds[work.phase.name] for work in works)
    tokens, trained = sum(sum(map(sum, work.limits)) for work in works), steps[-1].trained
    # the rank with the largest memory counts, and the one with the smallest cache
    memory = gather([(one.training_gb, one.cache_tokens, one.cache_gb) for one in steps])
    cache_tokens, limits = min(cache for _, cache, _ in memory), {}
    for work in works if gpu else ():
        slots = slots_for(cache_tokens, len(work.prompts[0]), sum(work.limits, []), requests_at_once(run.config))
        where = (shape, gpu, len(work.prompts[0]), work.limits, run.ranks.world, slots, value_bytes(run.config))
        limits[work.phase.name] = decode_limit(*where)
    return {
        "responses": sum(len(group) for work in works for group in work.limits),
        "response_tokens": tokens,
        "trained_tokens": bundle_tokens(trained),
        "warmup_seconds": steps[0].seconds,
        "seconds": seconds,
        "repeats": [one.seconds for one in steps[1:]],
        "response_tokens_per_second": tokens / sampling,
        "training_tokens_per_second": bundle_tokens(trained) / seconds["update"],
        "mfu": mfu(shape, trained, seconds["update"], run.ranks.world, gpu) if gpu else None,
        "decode_limit_seconds": limits or None,
        "decode_share": sum(limits.values()) / sampling if gpu else None,
        "cache_tokens": cache_tokens,
        "cache_gb": max(size for _, _, size in memory),
        "training_gb": max((peak for peak, _, _ in memory if peak is not None), default=None),
        "process_gb": max(gather([peak_memory_gb()])),
    }


def known_gpu() -> Gpu | None:
    """The entry of costs.GPUS with this card's exact name; its memory comes from the driver."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return next((replace(gpu, memory=memory) for gpu in GPUS.values() if gpu.name == name), None)


def time_rows(config: Config, options: Options, ranks: Ranks) -> dict:
    """All rows, and what they were measured on. Every rank calls it and gets the same. The options must be complete."""
    hf_config = architecture(config.model)
    shape, gpu, rows = shape_of(hf_config), known_gpu(), {}
    run = make_run(random_sampler(config, hf_config, ranks))
    plan = [("lognormal", phases(config), options.mean_response, options.sigma)]
    plan.append(("equal", phases(config), options.equal, 0.0))
    if options.rollouts:
        count, cap = config.predictions_per_mask, config.max_prediction_tokens
        plan = [
            (number, [Phase("predict", int(number) // count, count, cap)], options.mean_response, options.sigma)
            for number in options.rollouts.split(",")
        ]
    for name, steps, mean, sigma in plan:
        works = []
        for number, phase in enumerate(steps):
            lengths = response_lengths(phase.prompts * phase.count, mean, options.cap, sigma, number)
            works.append(make_work(phase, lengths, options.prompt, shape.vocab, config.seed))
        rows[name] = time_row(run, works, shape, gpu, options.repeats)
    gc.unfreeze()
    return {
        "environment": environment().split("\n")[:-1], "gpu": asdict(gpu) if gpu else None, "world": ranks.world,
        "attention": describe_attention(run.sampler.replica), "shape": asdict(shape),
        "options": {key: getattr(options, key) for key in WORDS["step"]},
        "cache_bytes_per_token": cache_bytes(shape, value_bytes(config)), "config": asdict(run.config), "rows": rows,
    }  # fmt: skip


# ---- tables


def step_table(result: dict) -> str:
    """The rows as text, a column each; a dash where the device is not known or has no such figure."""
    rows, first = result["rows"], next(iter(result["rows"].values()))
    device = result["gpu"]["name"] if result["gpu"] else result["environment"][-1].removeprefix("device: ")
    table = [("", *rows)]

    def line(label: str, key: str, form: str) -> None:
        key, _, phase = key.partition("/")
        values = [row[key][phase] if phase else row[key] for row in rows.values()]
        table.append((label, *(None if value is None else format(value, form) for value in values)))

    for name in ("responses", "response tokens", "trained tokens"):
        line(name, name.replace(" ", "_"), ",")
    for name in first["seconds"]:
        line(f"{name}, s", f"seconds/{name}", ".3f")
    line("warm-up step, s", "warmup_seconds/step", ".3f")
    line("response tokens/s", "response_tokens_per_second", ",.0f")
    line("share of decode limit", "decode_share", ".1%")
    line("training tokens/s", "training_tokens_per_second", ",.0f")
    line("MFU", "mfu", ".1%")
    line("cache, tokens", "cache_tokens", ",")
    line("cache, GB", "cache_gb", ".3f")
    line("largest in training, GB", "training_gb", ".2f")
    line("largest so far, GB", "process_gb", ".2f")
    return "\n".join([
        f"{result['config']['model']}, random weights, {result['shape']['parameters']:,} parameters, "
        f"{result['config']['dtype']}, {result['world']} x {device}, {result['attention']}",
        f"prompts of {result['options']['prompt']} tokens; seconds: median of {len(first['repeats'])}", "",
        *text_table(table, 24, 13),
    ])  # fmt: skip


def scaling_table(rows: dict) -> str:
    """Seconds of a step against its rollouts, and the straight line through them by least squares."""
    points = [(int(number), row["seconds"]["step"]) for number, row in rows.items()]
    table = [("rollouts", "step, s", "sampling", "update", "ms a rollout")]
    for (number, step), row in zip(points, rows.values(), strict=True):
        seconds = [f"{row['seconds'][name]:.3f}" for name in ("step", "predict", "update")]
        table.append((str(number), *seconds, f"{1000 * step / number:.2f}"))
    lines = text_table(table, 8, 14)
    if len(points) > 1:
        slope, begin = statistics.linear_regression(*zip(*points, strict=True))
        off = max(abs(begin + slope * number - step) / step for number, step in points)
        lines.append(f"{begin:.3f} s + {1000 * slope:.2f} ms a rollout, at most {off:.0%} off")
    return "\n".join(lines)


def time_config(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word, before the start-up."""
    options, rest = split_words(words, "step")
    config = read_config(rest)
    options, ranks = complete(options, config, "step"), start_ranks()
    result = time_rows(config, options, ranks)
    if ranks.rank == 0:
        print(step_table(result))
        if options.rollouts:
            print("\n" + scaling_table(result["rows"]))
        out = Path(options.out or f"runs/bench/{Path(config.run_dir).name}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(result, indent=1) + "\n")
        print(f"\n{out}")
    dist.destroy_process_group()
