"""How fast one step is, on random weights: nothing is downloaded, and lengths do not depend on what a model says.

    python -m bench configs/tiny.yaml [key=value ...]                         a laptop: under a minute
    torchrun --nproc_per_node=8 -m bench configs/smollm3.yaml [key=value ...]
    python -m bench configs/tiny.yaml rollouts=64,128,256,512                 is a step linear in its rollouts?
    python -m bench plan configs/smollm3.yaml gpus=8 gpu=h100                 what a run needs, calculated

One step is that of train.py: the same rollout, update and refresh, on prompts of random tokens. The length of every
response is given in advance, drawn once from a seeded list: one row of lognormal lengths, one of equal ones. Rewards
are 0 or 1 by the seed, with both in each group, so that every response is trained on.

Reported: seconds by phase (median of `repeats`, the warm-up apart), response tokens/s, training tokens/s, the share of
the decode limit and the MFU (only on a known GPU), the sampler's cache and the largest memory in training.
Left out: masking, parsing, probe, checkpoints; scoring by a second copy (kl, rlp, entropy_token).
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation.continuous_batching import PagedAttentionCache

from bench.limits import (
    GPUS,
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
from bench.plan import Phase, PlanOptions, check_options, default_prompt, phases, report
from config import Config, ConfigError, read_config
from grpo import Group, bundle, make_optimizer, make_samples, update
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


def one_step(works: list[Work], policy, optimizer, sampler: Sampler, number: int) -> dict:
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
        update(policy, optimizer, samples, config, sampler.ranks, number)
    peak = memory["peak_memory_gb"] if torch.cuda.is_available() else None
    with clock(row, "refresh"):
        refresh(policy, sampler.replica)
    row["time/step"] = sum(row.values())
    trained = [
        (len(one[0].rollout.prompt_ids), [len(sample.rollout.completion_ids) for sample in one])
        for one in bundle(samples, config)
    ]
    tokens, size = max(caches, default=(0, 0))
    return row | {"trained": trained, "training_gb": peak, "cache_tokens": tokens, "cache_gb": size / 1e9}


@dataclass
class BenchOptions:
    """Words of the command that are no keys of the config."""

    prompt: int = 0
    """Tokens of a prompt; 0: 400, or a third of max_prompt_tokens if that is less."""
    cap: int = 0
    """Longest response, tokens; 0: 1024, or the config's if that is less."""
    mean_response: float = 0
    """Mean of the lognormal list; 0: three eighths of cap."""
    sigma: float = 0.6
    """Of the lengths' logarithm."""
    equal: int = 0
    """The length in the row of equal ones; 0: half of cap."""
    repeats: int = 3
    rollouts: str = ""
    """Numbers of responses, as in 64,128: then only seconds of a step against these."""
    out: str = ""
    """Where the JSON goes; empty: runs/bench/NAME.json."""


# ---- words of the command line


def split_words(words: list[str], kind: type) -> tuple:
    """Command-line words -> (a `kind` filled from those that name its fields, the others). Raises ConfigError."""
    types, own, rest = {field.name: field.type for field in fields(kind)}, {}, []
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key in types):
            rest.append(word)
            continue
        try:
            own[key] = {"int": int, "float": float, "str": str}[types[key]](text)
        except ValueError:
            allowed = {"int": "a whole number", "float": "a number"}[types[key]]
            raise ConfigError(f"{key}={text!r}: expected {allowed}") from None
    return kind(**own), rest


def complete(options: BenchOptions, config: Config) -> BenchOptions:
    """Fills in what was left at 0. Raises ConfigError, one line with key and value."""
    steps = phases(config)
    if not steps:
        raise ConfigError(f"method={config.method!r}: samples nothing; time a method that does")
    longest = min(phase.cap for phase in steps)
    options = replace(options, cap=options.cap or min(1024, longest), prompt=options.prompt or default_prompt(config))
    options = replace(
        options, mean_response=options.mean_response or 0.375 * options.cap, equal=options.equal or options.cap // 2
    )
    ranges = {"prompt": config.max_prompt_tokens, "cap": longest, "mean_response": options.cap, "equal": options.cap}
    for key, largest in (ranges | {"repeats": 1000}).items():
        if not 1 <= getattr(options, key) <= largest:
            raise ConfigError(f"{key}={getattr(options, key)}: must be from 1 to {largest}")
    if not options.sigma >= 0:
        raise ConfigError(f"sigma={options.sigma}: must be 0 or more")
    numbers, group = options.rollouts.split(",") if options.rollouts else [], config.predictions_per_mask
    if not all(number.isdecimal() and int(number) and int(number) % group == 0 for number in numbers):
        raise ConfigError(f"rollouts={options.rollouts!r}: must be multiples of predictions_per_mask={group}")
    return options


# ---- rows


def measure(
    works: list[Work], policy, optimizer, sampler: Sampler, shape: Shape, gpu: Gpu | None, repeats: int
) -> dict:  # fmt: skip
    """A warm-up step and `repeats` more, and what they say: one row of the table."""
    config, world = sampler.config, sampler.ranks.world
    runs = [one_step(works, policy, optimizer, sampler, number) for number in range(repeats + 1)]
    times = [{key[5:]: value for key, value in run.items() if key.startswith("time/")} for run in runs]
    seconds = {key: statistics.median(one[key] for one in times[1:]) for key in times[0]}
    sampling = sum(seconds[work.phase.name] for work in works)
    tokens = {work.phase.name: sum(map(sum, work.limits)) for work in works}
    trained = runs[-1]["trained"]
    # every rank has its own GPU: the largest, and the smallest cache, decide
    memory = gather([(run["training_gb"], run["cache_tokens"], run["cache_gb"]) for run in runs])
    cache_tokens = min(cache for _, cache, _ in memory)
    row = {
        "responses": sum(len(group) for work in works for group in work.limits),
        "response_tokens": sum(tokens.values()),
        "trained_tokens": bundle_tokens(trained),
        "warmup_seconds": times[0],
        "seconds": seconds,
        "repeats": times[1:],
        "response_tokens_per_second": sum(tokens.values()) / sampling,
        "training_tokens_per_second": bundle_tokens(trained) / seconds["update"],
        "mfu": None,
        "decode_limit_seconds": None,
        "decode_share": None,
        "cache_tokens": cache_tokens,
        "cache_gb": max(size for _, _, size in memory),
        "training_gb": max((peak for peak, _, _ in memory if peak is not None), default=None),
        "process_gb": max(gather([peak_memory_gb()])),
    }
    if gpu:
        width, prompt = value_bytes(config), len(works[0].prompts[0])
        limits = {}
        for work in works:
            slots = slots_for(cache_tokens, prompt, sum(work.limits, []), requests_at_once(config))
            limits[work.phase.name] = decode_limit(shape, gpu, prompt, work.limits, world, slots, width)
        row["decode_limit_seconds"] = limits
        row["decode_share"] = sum(limits.values()) / sampling
        row["mfu"] = mfu(shape, trained, seconds["update"], world, gpu)
    return row


def known_gpu() -> Gpu | None:
    """The row of limits.GPUS that is this card, by its exact name; its memory as the driver tells it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return next((replace(gpu, memory=memory) for gpu in GPUS.values() if gpu.name == name), None)


def bench(config: Config, options: BenchOptions, ranks: Ranks) -> dict:
    """All rows. Every rank calls it and gets the same. Raises ConfigError before a model is built."""
    options = complete(options, config)
    hf_config = architecture(config.model)
    shape, gpu = shape_of(hf_config), known_gpu()
    sampler = random_sampler(config, hf_config, ranks)
    config = decide_checkpointing(hf_config, config, ranks)
    policy = build_policy(sampler.replica, config, ranks)
    optimizer = make_optimizer(policy, config)
    gc.collect()
    gc.freeze()  # as train.py does
    rows = {}

    def add(name: str, steps: list[Phase], mean: float, sigma: float) -> None:
        works = []
        for number, phase in enumerate(steps):
            lengths = response_lengths(phase.prompts * phase.count, mean, options.cap, sigma, number)
            works.append(make_work(phase, lengths, options.prompt, shape.vocab, config.seed))
        rows[name] = measure(works, policy, optimizer, sampler, shape, gpu, options.repeats)

    if options.rollouts:
        count = config.predictions_per_mask
        for number in map(int, options.rollouts.split(",")):
            one = Phase("predict", number // count, count, config.max_prediction_tokens)
            add(str(number), [one], options.mean_response, options.sigma)
    else:
        add("lognormal", phases(config), options.mean_response, options.sigma)
        add("equal", phases(config), options.equal, 0.0)
    gc.unfreeze()
    return {
        "environment": environment().split("\n")[:-1], "gpu": asdict(gpu) if gpu else None, "world": ranks.world,
        "attention": describe_attention(sampler.replica), "shape": asdict(shape), "options": asdict(options),
        "cache_bytes_per_token": cache_bytes(shape, value_bytes(config)), "config": asdict(config), "rows": rows,
    }  # fmt: skip


# ---- tables


def table(result: dict) -> str:
    """The rows as text; a dash where the device is not known or has no such figure."""
    rows, device = result["rows"], result["gpu"]
    label = device["name"] if device else result["environment"][-1].removeprefix("device: ")
    lines = [f"{result['config']['model']}, random weights, {result['shape']['parameters']:,} parameters, "
             f"{result['config']['dtype']}, {result['world']} x {label}, {result['attention']}"]  # fmt: skip
    first = next(iter(rows.values()))
    names = list(first["seconds"])
    lines += [f"prompts of {result['options']['prompt']} tokens; seconds: median of {len(first['repeats'])}", ""]
    lines.append(f"{'':22}" + "".join(f"{name:>13}" for name in rows))

    def line(name: str, value, form: str) -> None:
        cells = [value(row) for row in rows.values()]
        lines.append(f"{name:22}" + "".join(f"{'-' if cell is None else format(cell, form):>13}" for cell in cells))

    line("responses", lambda row: row["responses"], ",")
    line("response tokens", lambda row: row["response_tokens"], ",")
    line("trained tokens", lambda row: row["trained_tokens"], ",")
    for name in names:
        line(f"{name}, s", lambda row, name=name: row["seconds"][name], ".3f")
    line("warm-up step, s", lambda row: row["warmup_seconds"]["step"], ".3f")
    line("response tokens/s", lambda row: row["response_tokens_per_second"], ",.0f")
    line("share of decode limit", lambda row: row["decode_share"], ".1%")
    line("training tokens/s", lambda row: row["training_tokens_per_second"], ",.0f")
    line("MFU", lambda row: row["mfu"], ".1%")
    line("cache, tokens", lambda row: row["cache_tokens"], ",")
    line("cache, GB", lambda row: row["cache_gb"], ".3f")
    line("largest in training, GB", lambda row: row["training_gb"], ".2f")
    line("largest so far, GB", lambda row: row["process_gb"], ".2f")
    return "\n".join(lines)


def straight_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: (a, b) of y = a + b x.

    >>> straight_line([(1, 3), (2, 5), (3, 7)])
    (1.0, 2.0)
    """
    slope, begin = statistics.linear_regression(*zip(*points, strict=True))
    return begin, slope


def scaling_table(rows: dict) -> str:
    """Seconds of a step against its rollouts, and the straight line through them."""
    lines = [f"{'rollouts':>8} {'step, s':>9} {'sampling':>9} {'update':>9} {'ms a rollout':>13}"]
    points = [(int(number), row["seconds"]["step"]) for number, row in rows.items()]
    for (number, step), row in zip(points, rows.values(), strict=True):
        sampling, training = row["seconds"]["predict"], row["seconds"]["update"]
        lines.append(f"{number:8} {step:9.3f} {sampling:9.3f} {training:9.3f} {1000 * step / number:13.2f}")
    if len(points) > 1:
        begin, slope = straight_line(points)
        off = max(abs(begin + slope * number - step) / step for number, step in points)
        lines.append(f"{begin:.3f} s + {1000 * slope:.2f} ms a rollout, at most {off:.0%} off")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    planning = words[:1] == ["plan"]
    options, rest = split_words(words[1:] if planning else words, PlanOptions if planning else BenchOptions)
    config = read_config(rest)
    if planning:
        check_options(options, config)
        print(report(shape_of(architecture(config.model)), config, options))
        return
    complete(options, config)  # a bad word costs no start-up
    ranks = start_ranks()
    result = bench(config, options, ranks)
    if ranks.rank == 0:
        print(table(result))
        if options.rollouts:
            print("\n" + scaling_table(result["rows"]))
        out = Path(options.out or f"runs/bench/{Path(config.run_dir).name}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(result, indent=1) + "\n")
        print(f"\n{out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # once, not once per rank
            print(f"config error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
