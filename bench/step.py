"""How fast one step is, on random weights: nothing is downloaded, and lengths do not depend on what a model says.

The step is that of train.py with made-up tasks: prompts of random tokens, response lengths drawn once from a seeded
list, and rewards of 0 and 1 in each group, so that every response is trained on. One row has lognormal lengths, one has
equal lengths. Left out: masking, parsing, probe, checkpoints, scoring by a second copy.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation.continuous_batching import PagedAttentionCache

import model
from bench.memory import Shape, decide_checkpointing, shape_of, value_bytes
from bench.options import WORDS, Options, Phase, phases, read_words, response_lengths, text_table
from bench.plan import GPUS, Gpu, architecture, cache_bytes, decode_limit, train_flops
from config import Config
from data import Corpus, Passage
from grpo import Group, Sample, bundle, make_optimizer, make_samples
from masking import Mask
from methods import Method, Run, Task
from metrics import environment, peak_memory_gb, write_whole
from ranks import Ranks, gather, start_ranks
from rollout import Rollout, Sampler, derive_seed, make_sampler, rollout
from train import step

NEVER = "\x00never{"  # an opening that no response contains: each is searched for it, as in a run, and none ends by it


def random_sampler(config: Config, hf_config, ranks: Ranks) -> Sampler:
    """A sampler with random weights; without a tokenizer on disk, each token id stands for one made-up word."""
    if (Path(config.model).expanduser() / "tokenizer.json").is_file():
        tokenizer = model.load_tokenizer(config)
    else:
        words = Tokenizer(models.WordLevel({f" w{number}": number for number in range(hf_config.vocab_size)}, " w0"))
        words.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=" w1")
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


def given_work(works: dict[str, tuple]) -> Method:
    """A method whose work is given: {phase: (token prompts, the length of each response to each prompt)}."""

    def sample(run: Run, name: str, number: int) -> list[list[Rollout]]:
        prompts, limits = works[name]
        cap = run.config.max_mask_tokens if name == "propose" else run.config.max_prediction_tokens
        groups = rollout(run.sampler, prompts, len(limits[0]), cap, NEVER, (number, name), limits=limits)
        if [[len(response.completion_ids) for response in group] for group in groups] != limits:
            raise RuntimeError(f"{name}, step {number}: responses did not get their lengths")
        return groups

    def propose(run: Run, passages: list[Passage], number: int) -> list[list[Task]]:
        prompts = works["predict"][0]
        groups = sample(run, "propose", number) if "propose" in works else [[None] * len(prompts)]
        mask, prompt = Mask("words", masked="words", target="words", occurrences=1), iter(prompts)
        return [[Task(passages[0], mask, response, next(prompt)) for response in group] for group in groups]

    def predict(run: Run, tasks: list[Task], number: int) -> None:
        for task, group in zip(tasks, sample(run, "predict", number), strict=True):
            task.predictions, task.correct = group, [number % 2 for number in range(len(group))]

    def samples(run: Run, groups: list[Group], *_) -> list[Sample]:
        for group in groups:  # 0 and 1 in turn, in the masks' groups too
            group.rewards = [float(number % 2) for number in range(len(group.rewards))]
        return make_samples(groups, run.config)

    return Method("work of given lengths", propose, predict, grade=None, samples=samples)


def one_step(run: Run, works: dict[str, tuple], number: int) -> dict:
    """train.step on given work, by every rank. Raises RuntimeError if a response has another length.

    {"seconds": by phase and `step`, their sum, "trained": [(tokens of a prompt, [tokens of its responses])],
    "memory": (largest GB in the update, None on a CPU; tokens and GB of the largest cache)} of this rank.
    """
    caches, make_cache = [(0, 0)], PagedAttentionCache.__init__

    def recording(self, *args, **kwargs):  # a cache is gone when rollout returns
        make_cache(self, *args, **kwargs)
        caches.append((self.max_tokens_read, self.cache_tensor.nbytes))

    with patch.object(PagedAttentionCache, "__init__", recording):
        done = step(run, number, given_work(works))
    seconds = {key[5:]: value for key, value in done.row.items() if key.startswith("time/")}
    bundles = [[sample.rollout for sample in together] for together in bundle(done.samples, run.config)]
    trained = [(len(own[0].prompt_ids), [len(response.completion_ids) for response in own]) for own in bundles]
    (tokens, size), peak = max(caches), done.row["peak_memory_gb"] if torch.cuda.is_available() else None
    seconds["step"] = sum(seconds.values())
    return {"seconds": seconds, "trained": trained, "memory": (peak, tokens, size / 1e9)}


def time_row(run: Run, works: dict[str, tuple], shape: Shape, gpu: Gpu | None, repeats: int) -> dict:
    """A warm-up step and `repeats` more: one row of the table. Every rank calls it and gets the same."""
    steps, world = [one_step(run, works, number) for number in range(repeats + 1)], run.ranks.world
    times, trained = [one["seconds"] for one in steps], steps[-1]["trained"]
    seconds = {key: statistics.median(one[key] for one in times[1:]) for key in times[0]}
    lengths = [length for _, limits in works.values() for group in limits for length in group]
    sampling, updated = sum(seconds[name] for name in works), sum(prompt + sum(own) for prompt, own in trained)
    # the rank with the largest memory counts, and the one with the smallest cache
    peaks, rooms, sizes = zip(*gather([one["memory"] for one in steps]), strict=True)
    least = {
        name: decode_limit(shape, run.config, gpu, world, min(rooms), len(prompts[0]), limits)
        for name, (prompts, limits) in works.items() if gpu
    }
    flops = train_flops(shape, trained)
    return {
        "responses": len(lengths), "response_tokens": sum(lengths), "trained_tokens": updated,
        "warmup_seconds": times[0], "seconds": seconds, "repeats": times[1:],
        "response_tokens_per_second": sum(lengths) / sampling,
        "decode_limit_seconds": least or None, "decode_share": sum(least.values()) / sampling if gpu else None,
        "training_tokens_per_second": updated / seconds["update"],
        "mfu": flops / (seconds["update"] * world * gpu.flops) if gpu else None,
        "cache_tokens": min(rooms), "cache_gb": max(sizes), "training_gb": max(filter(None, peaks), default=None),
        "process_gb": max(gather([peak_memory_gb()])),
    }  # fmt: skip


def time_rows(config: Config, options: Options, ranks: Ranks) -> dict:
    """All rows, and what they were measured on. Every rank calls it and gets the same. The options must be complete."""
    hf_config = architecture(config.model)
    shape, gpu, rows, count = shape_of(hf_config), None, {}, config.predictions_per_mask
    if torch.cuda.is_available():  # the entry with this card's exact name; its memory comes from the driver
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        known = [replace(entry, memory=card.total_memory) for entry in GPUS.values() if entry.name == card.name]
        gpu = known[0] if known else None
    run = make_run(random_sampler(config, hf_config, ranks))
    equal = replace(options, mean_response=options.equal, sigma=0.0)
    plan = {"lognormal": (phases(config), options), "equal": (phases(config), equal)}
    if options.rollouts:
        sizes = options.rollouts.split(",")
        plan = {n: ([Phase("predict", int(n) // count, count, options.cap)], options) for n in sizes}
    for name, (steps, lengths) in plan.items():
        works = {}
        for number, phase in enumerate(steps):
            rng = random.Random(derive_seed(config.seed, phase.name))
            prompts = [[rng.randrange(shape.vocab) for _ in range(options.prompt)] for _ in range(phase.prompts)]
            works[phase.name] = prompts, response_lengths(phase, lengths, number)
        rows[name] = time_row(run, works, shape, gpu, options.repeats)
    gc.unfreeze()
    return {
        "environment": environment().split("\n")[:-1], "gpu": asdict(gpu) if gpu else None, "world": ranks.world,
        "attention": model.describe_attention(run.sampler.replica), "shape": asdict(shape),
        "options": {key: getattr(options, key) for key in WORDS["step"]}, "config": asdict(run.config), "rows": rows,
        "cache_bytes_per_token": cache_bytes(shape, value_bytes(config)),
    }  # fmt: skip


def step_table(result: dict) -> str:
    """The rows as text, a column each; a dash where the device is not known or has no such figure."""
    columns, hidden = [], ("seconds", "repeats", "decode_limit_seconds")
    for row in result["rows"].values():
        figures = {f"{name} seconds": value for name, value in row["seconds"].items()} | row
        figures["warmup_seconds"] = row["warmup_seconds"]["step"]
        columns.append({name.replace("_", " "): value for name, value in figures.items() if name not in hidden})
    # by the last word of a figure's name; others are counts
    formats = {"seconds": ".3f", "share": ".1%", "mfu": ".1%", "gb": ".3f", "second": ",.0f"}
    table = [("", *result["rows"])]
    for name in columns[0]:
        form = formats.get(name.split()[-1], ",")
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
    table = [("rollouts", "step, s", "sampling", "update", "ms a rollout")]
    for number, row in rows.items():
        cells = [row["seconds"][name] for name in ("step", "predict", "update")]
        table.append((number, *(f"{cell:.3f}" for cell in cells), f"{1000 * cells[0] / int(number):.2f}"))
    lines, points = text_table(table, 8, 14), [(int(n), row["seconds"]["step"]) for n, row in rows.items()]
    if len(points) > 1:
        slope, begin = statistics.linear_regression(*zip(*points, strict=True))
        off = max(abs(begin + slope * count - seconds) / seconds for count, seconds in points)
        lines.append(f"{begin:.3f} s + {1000 * slope:.2f} ms a rollout, at most {off:.0%} off")
    return "\n".join(lines)


def time_config(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word, before the start-up."""
    options, config = read_words(words, "step")
    ranks = start_ranks()
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
