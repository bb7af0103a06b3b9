"""How fast one step is, on random weights: nothing is downloaded, and lengths do not depend on what a model says.

The step is that of train.py with made-up tasks: prompts of random tokens, response lengths drawn once from a seeded
list, and rewards of 0 and 1, both in each group, so that every response is trained on. One row has lognormal lengths,
one has equal lengths. Left out: masking, parsing, probe, checkpoints, scoring by a second copy.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation.continuous_batching import PagedAttentionCache

import model
from bench import costs
from bench.costs import Bundle, Gpu
from bench.memory import Shape, decide_checkpointing, shape_of, value_bytes
from bench.options import WORDS, Options, Phase, complete, phases, split_words, text_table
from config import Config, read_config
from data import Corpus, Passage
from engine.batching import describe_attention
from grpo import Group, Sample, bundle, make_optimizer, make_samples
from masking import Mask
from methods import Method, Run, Task
from metrics import environment, peak_memory_gb, write_whole
from ranks import Ranks, gather, start_ranks
from rollout import Rollout, Sampler, derive_seed, make_sampler, rollout
from train import step

NEVER = "\x00never{"  # an opening that no response contains: each is searched for it, as in a run, and none ends by it


@dataclass
class Work:
    """The input of one phase: token prompts, and the length that each response shall have."""

    phase: Phase
    prompts: list[list[int]]
    limits: list[list[int]]


@dataclass
class StepTimes:
    """What one step took on this rank."""

    seconds: dict[str, float]  # by phase, and `step`, their sum
    trained: list[Bundle]
    training_gb: float | None  # largest memory of the GPU in the update; None on a CPU
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
    tokenizer = model.load_tokenizer(config) if local else stand_in_tokenizer(hf_config.vocab_size)
    return make_sampler(model.load_replica(config, ranks, hf_config), tokenizer, config, ranks)


def make_run(sampler: Sampler) -> Run:
    """The trainer for a sampler, whose responses no end-of-sequence ends from here on. Every rank calls it."""
    replica, ranks = sampler.replica, sampler.ranks
    sampler.eos_ids = {replica.config.vocab_size}  # an id that cannot be sampled
    config = decide_checkpointing(replica.config, sampler.config, ranks)
    policy = model.build_policy(replica, config, ranks)
    text = Corpus([Passage("", "", "", "words")], [], {})  # nobody reads it
    run = Run(config, ranks, text, sampler, policy, None, make_optimizer(policy, config))
    gc.collect()
    gc.freeze()  # as train.py does
    return run


def make_work(phase: Phase, lengths: list[int], prompt: int, vocabulary: int, seed: int) -> Work:
    """Prompts of random tokens; the lengths are dealt out in order."""
    rng = random.Random(derive_seed(seed, phase.name))
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(phase.prompts)]
    return Work(phase, prompts, [lengths[i : i + phase.count] for i in range(0, len(lengths), phase.count)])


# ---- one step


def seeded_verdicts(count: int, rng: random.Random) -> list[int]:
    """0 or 1 each, both in every group."""
    return rng.sample([1, 0] + [rng.randrange(2) for _ in range(count - 2)], count)


def given_work(works: list[Work]) -> Method:
    """A method whose prompts and response lengths are given, and whose verdicts are drawn by the seed."""
    by_name = {work.phase.name: work for work in works}

    def sample(run: Run, name: str, number: int) -> list[list[Rollout]]:
        work = by_name[name]
        count, cap = work.phase.count, work.phase.cap
        groups = rollout(run.sampler, work.prompts, count, cap, NEVER, (number, name), limits=work.limits)
        if [[len(one.completion_ids) for one in group] for group in groups] != work.limits:
            raise RuntimeError(f"{name}, step {number}: responses did not get their lengths")
        return groups

    def propose(run: Run, passages: list[Passage], number: int) -> list[list[Task]]:
        prompts = iter(by_name["predict"].prompts)
        groups = sample(run, "propose", number) if "propose" in by_name else [[None] * len(by_name["predict"].prompts)]
        mask = Mask("words", masked="words", target="words", occurrences=1)
        return [[Task(passages[0], mask, response, next(prompts)) for response in group] for group in groups]

    def predict(run: Run, tasks: list[Task], number: int) -> None:
        for task, group in zip(tasks, sample(run, "predict", number), strict=True):
            task.predictions = group

    def grade(run: Run, tasks: list[Task]) -> None:
        rng = random.Random(derive_seed(run.config.seed, "verdicts"))
        for task in tasks:
            task.correct = seeded_verdicts(len(task.predictions), rng)

    def samples(run: Run, groups: list[Group], tasks: list[Task], passages: list[Passage]) -> list[Sample]:
        rng = random.Random(derive_seed(run.config.seed, "rewards"))
        for group in groups:  # contrast in each group: every response is trained on
            group.rewards = [float(right) for right in seeded_verdicts(len(group.rewards), rng)]
        return make_samples(groups, run.config)

    return Method("work of given lengths", propose, predict, grade, samples)


def one_step(run: Run, works: list[Work], number: int) -> StepTimes:
    """train.step on given work, by every rank. Raises RuntimeError if a response has another length."""
    caches, make_cache = [], PagedAttentionCache.__init__

    def recording(self, *args, **kwargs):  # a cache is gone when rollout returns
        make_cache(self, *args, **kwargs)
        caches.append((self.max_tokens_read, self.cache_tensor.nbytes))

    with patch.object(PagedAttentionCache, "__init__", recording):
        done = step(run, number, given_work(works))
    seconds = {key[5:]: value for key, value in done.row.items() if key.startswith("time/")}
    trained = []
    for together in bundle(done.samples, run.config):
        lengths = [len(sample.rollout.completion_ids) for sample in together]
        trained.append(Bundle(len(together[0].rollout.prompt_ids), lengths))
    tokens, size = max(caches, default=(0, 0))
    peak = done.row["peak_memory_gb"] if torch.cuda.is_available() else None
    return StepTimes(seconds | {"step": sum(seconds.values())}, trained, peak, tokens, size / 1e9)


# ---- rows and tables


def time_row(run: Run, works: list[Work], shape: Shape, gpu: Gpu | None, repeats: int) -> dict:
    """A warm-up step and `repeats` more: one row of the table. Every rank calls it and gets the same."""
    steps = [one_step(run, works, number) for number in range(repeats + 1)]
    seconds = {key: statistics.median(one.seconds[key] for one in steps[1:]) for key in steps[0].seconds}
    sampling, trained = sum(seconds[work.phase.name] for work in works), steps[-1].trained
    tokens, updated = sum(sum(map(sum, work.limits)) for work in works), costs.bundle_tokens(trained)
    # the rank with the largest memory counts, and the one with the smallest cache
    memory = gather([(one.training_gb, one.cache_tokens, one.cache_gb) for one in steps])
    room, at_once, least = min(cache for _, cache, _ in memory), run.config.max_requests or costs.REQUESTS, {}
    for work in works if gpu else ():
        prompt, width = len(work.prompts[0]), value_bytes(run.config)
        slots = costs.slots_for(room, prompt, sum(work.limits, []), at_once)
        least[work.phase.name] = costs.decode_limit(shape, gpu, prompt, work.limits, run.ranks.world, slots, width)
    return {
        "responses": sum(len(group) for work in works for group in work.limits), "response_tokens": tokens,
        "trained_tokens": updated, "warmup_seconds": steps[0].seconds, "seconds": seconds,
        "repeats": [one.seconds for one in steps[1:]], "response_tokens_per_second": tokens / sampling,
        "decode_limit_seconds": least or None, "decode_share": sum(least.values()) / sampling if gpu else None,
        "training_tokens_per_second": updated / seconds["update"],
        "mfu": costs.mfu(shape, trained, seconds["update"], run.ranks.world, gpu) if gpu else None,
        "cache_tokens": room, "cache_gb": max(size for _, _, size in memory),
        "training_gb": max((peak for peak, _, _ in memory if peak is not None), default=None),
        "process_gb": max(gather([peak_memory_gb()])),
    }  # fmt: skip


def known_gpu() -> Gpu | None:
    """The entry of costs.GPUS with this card's exact name; its memory comes from the driver."""
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return next((replace(gpu, memory=card.total_memory) for gpu in costs.GPUS.values() if gpu.name == card.name), None)


def time_rows(config: Config, options: Options, ranks: Ranks) -> dict:
    """All rows, and what they were measured on. Every rank calls it and gets the same. The options must be complete."""
    hf_config = costs.architecture(config.model)
    shape, gpu, rows = shape_of(hf_config), known_gpu(), {}
    run = make_run(random_sampler(config, hf_config, ranks))
    lognormal, count = (options.mean_response, options.sigma), config.predictions_per_mask
    plan = {"lognormal": (phases(config), *lognormal), "equal": (phases(config), options.equal, 0.0)}
    if options.rollouts:
        plan = {}
        for number in options.rollouts.split(","):
            phase = Phase("predict", int(number) // count, count, config.max_prediction_tokens)
            plan[number] = ([phase], *lognormal)
    for name, (steps, mean, sigma) in plan.items():
        works = []
        for number, phase in enumerate(steps):
            lengths = costs.response_lengths(phase.prompts * phase.count, mean, options.cap, sigma, number)
            works.append(make_work(phase, lengths, options.prompt, shape.vocab, config.seed))
        rows[name] = time_row(run, works, shape, gpu, options.repeats)
    gc.unfreeze()
    return {
        "environment": environment().split("\n")[:-1], "gpu": asdict(gpu) if gpu else None, "world": ranks.world,
        "attention": describe_attention(run.sampler.replica), "shape": asdict(shape),
        "options": {key: getattr(options, key) for key in WORDS["step"]}, "config": asdict(run.config), "rows": rows,
        "cache_bytes_per_token": costs.cache_bytes(shape, value_bytes(config)),
    }  # fmt: skip


FORMATS = {"seconds": ".3f", "share": ".1%", "mfu": ".1%", "gb": ".3f", "second": ",.0f"}
"""By the last word of a figure's name; others are counts."""


def step_table(result: dict) -> str:
    """The rows as text, a column each; a dash where the device is not known or has no such figure."""
    columns = []
    for row in result["rows"].values():
        figures = {f"{name} seconds": value for name, value in row["seconds"].items()} | row
        figures |= {"warmup_seconds": row["warmup_seconds"]["step"]}
        hidden = ("seconds", "repeats", "decode_limit_seconds")
        columns.append({name.replace("_", " "): value for name, value in figures.items() if name not in hidden})
    table = [("", *result["rows"])]
    for name in columns[0]:
        form = FORMATS.get(name.split()[-1], ",")
        table.append((name, *(None if one[name] is None else format(one[name], form) for one in columns)))
    device = result["gpu"]["name"] if result["gpu"] else result["environment"][-1].removeprefix("device: ")
    return "\n".join([
        f"{result['config']['model']}, random weights, {result['shape']['parameters']:,} parameters, "
        f"{result['config']['dtype']}, {result['world']} x {device}, {result['attention']}",
        f"prompts of {result['options']['prompt']} tokens; median of {result['options']['repeats']}\n",
        *text_table(table, 28, 13),
    ])  # fmt: skip


def scaling_table(rows: dict) -> str:
    """Seconds of a step against its rollouts, and the straight line through them by least squares."""
    points = [(int(number), row["seconds"]["step"]) for number, row in rows.items()]
    table = [("rollouts", "step, s", "sampling", "update", "ms a rollout")]
    for (number, step_seconds), row in zip(points, rows.values(), strict=True):
        cells = [f"{row['seconds'][name]:.3f}" for name in ("step", "predict", "update")]
        table.append((str(number), *cells, f"{1000 * step_seconds / number:.2f}"))
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
