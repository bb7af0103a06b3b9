"""One step on random weights, without a download: its seconds (`time_config`), a check of each part (`print_checks`).

The timed step is train.step on made-up tasks: random prompts, response lengths drawn by the seed, and rewards of 0
and 1 in each group, so that every response is trained on. Left out: masking, parsing, probe, scoring by a second copy.
"""

import gc
import json
import random
import statistics
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers.generation.continuous_batching import PagedAttentionCache

import model
from bench.memory import decide_checkpointing, gpu_memory, shape_of, value_bytes
from bench.options import WORDS, Options, phases, read_words, response_lengths, text_table
from bench.plan import GPUS, Gpu, architecture, cache_bytes, decode_limit, train_flops
from checkpoint import find_checkpoint, finish_save, load_checkpoint, make_saver, save_checkpoint
from config import Config, read_config
from data import Corpus, Passage
from engine.batching import describe_attention
from engine.cache import table_reader
from grpo import Group, Sample, bundle, make_optimizer, make_samples, score, update
from masking import Mask
from methods import Method, Run, Task
from metrics import environment, largest_memory, peak_memory_gb, write_whole
from ranks import Ranks, gather, start_ranks
from rollout import Rollout, Sampler, as_arrays, from_arrays, generate, make_sampler, rollout, sequence_logprobs
from train import step

NEVER = "\x00never{"  # an opening that no response contains: each is searched for it, as in a run, and none ends by it
PROMPT, COUNT, TOKENS = 48, 4, 32  # of the checks: tokens of a prompt, responses to it, tokens of a response
TINY_BASE = Path(__file__).parent.parent / "assets/tiny_base"


def random_sampler(config: Config, hf_config, ranks: Ranks) -> Sampler:
    """A sampler with random weights. The tiny base's tokenizer stands in for one that is not on disk."""
    local = (Path(config.model).expanduser() / "tokenizer.json").is_file()
    tokenizer = model.load_tokenizer(config if local else replace(config, model=str(TINY_BASE)))
    return make_sampler(model.load_replica(config, ranks, hf_config), tokenizer, config, ranks)


def make_run(sampler: Sampler) -> Run:
    """The trainer for a sampler, whose responses no end-of-sequence ends from here on. Every rank calls it."""
    replica, ranks = sampler.replica, sampler.ranks
    sampler.eos_ids = {replica.config.vocab_size}  # an id that cannot be sampled
    config = decide_checkpointing(replica.config, sampler.config, ranks)
    policy = model.build_policy(replica, config, ranks)
    unread = Corpus([Passage("", "", "", "words")], [], {})
    run = Run(config, ranks, unread, sampler, policy, None, make_optimizer(policy, config))
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
    """train.step on given work, by every rank. Raises RuntimeError if a response has another length. Returns "seconds"
    by phase and of the `step`, their sum; "trained", [(tokens of a prompt, [tokens of its responses])]; and "memory" of
    this rank: largest GB in the update, None on a CPU; tokens of the largest cache; GB of it."""
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


def time_rows(config: Config, options: Options, ranks: Ranks, gpu: Gpu | None) -> dict:
    """All rows of the table, each a warm-up step and `repeats` more, and what they were measured on. gpu: None if this
    device's rates are not known. Every rank calls it and gets the same."""
    hf_config, rows, world, count = architecture(config.model), {}, ranks.world, config.predictions_per_mask
    shape, run = shape_of(hf_config), make_run(random_sampler(config, hf_config, ranks))
    plan = {n: [("predict", int(n) // count, count, options.cap)] for n in options.rollouts.split(",") if n}
    for title, calls in (plan or dict.fromkeys(("lognormal", "equal"), phases(config))).items():
        drawn = replace(options, mean_response=options.equal, sigma=0.0) if title == "equal" else options
        works = {}
        for number, (name, *size) in enumerate(calls):
            rng, limits = random.Random(f"{config.seed} {name}"), response_lengths(*size, drawn, number)
            works[name] = [[rng.randrange(shape.vocab) for _ in range(options.prompt)] for _ in limits], limits
        steps = [one_step(run, works, number) for number in range(options.repeats + 1)]
        times, trained = [one["seconds"] for one in steps], steps[-1]["trained"]
        seconds = {key: statistics.median(one[key] for one in times[1:]) for key in times[0]}
        lengths = [length for _, limits in works.values() for group in limits for length in group]
        sampling, updated = sum(seconds[name] for name in works), sum(prompt + sum(own) for prompt, own in trained)
        # the rank with the largest memory counts, and the one with the smallest cache
        peaks, rooms, sizes = zip(*gather([one["memory"] for one in steps]), strict=True)
        least = {name: decode_limit(shape, run.config, gpu, world, min(rooms), options.prompt, limits)
                 for name, (_, limits) in works.items() if gpu}  # fmt: skip
        rows[title] = {
            "responses": len(lengths), "response_tokens": sum(lengths), "trained_tokens": updated,
            "warmup_seconds": times[0], "seconds": seconds, "repeats": times[1:],
            "response_tokens_per_second": sum(lengths) / sampling,
            "decode_limit_seconds": least or None, "decode_share": sum(least.values()) / sampling if gpu else None,
            "training_tokens_per_second": updated / seconds["update"],
            "mfu": train_flops(shape, trained) / (seconds["update"] * world * gpu.flops) if gpu else None,
            "cache_tokens": min(rooms), "cache_gb": max(sizes), "training_gb": max(filter(None, peaks), default=None),
            "process_gb": max(gather([peak_memory_gb()])),
        }  # fmt: skip
    gc.unfreeze()
    return {
        "environment": environment().split("\n")[:-1], "gpu": gpu._asdict() if gpu else None, "world": world,
        "attention": describe_attention(run.sampler.replica), "shape": asdict(shape),
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
    title = f"{result['config']['model']}, random weights, {result['shape']['parameters']:,} parameters, "
    title += f"{result['config']['dtype']}, {result['world']} x {device}, {result['attention']}"
    work = f"prompts of {result['options']['prompt']} tokens; median of {result['options']['repeats']}"
    lines, table, points = [title, work, "", *text_table(table, 28, 13)], [], []
    if not result["options"]["rollouts"]:
        return "\n".join(lines)
    # seconds of a step against its rollouts, and the straight line through them by least squares
    for count, seconds in ((int(name), row["seconds"]) for name, row in result["rows"].items()):
        points.append((count, seconds["step"]))
        cells = [f"{seconds[name]:.3f}" for name in ("step", "predict", "update")]
        table.append((str(count), *cells, f"{1000 * seconds['step'] / count:.2f}"))
    lines += ["", *text_table([("rollouts", "step, s", "sampling", "update", "ms a rollout"), *table], 8, 14)]
    if len(points) > 1:
        slope, begin = statistics.linear_regression(*zip(*points, strict=True))
        off = max(abs(begin + slope * count - step) / step for count, step in points)
        lines.append(f"{begin:.3f} s + {1000 * slope:.2f} ms a rollout, at most {off:.0%} off")
    return "\n".join(lines)


def time_config(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word, before the start-up."""
    options, config = read_words(words, "step")
    ranks, gpu = start_ranks(), None
    if torch.cuda.is_available():  # the entry with this card's exact name; its memory comes from the driver
        card = torch.cuda.get_device_properties(ranks.device)
        gpu = next((one._replace(memory=card.total_memory) for one in GPUS.values() if one.name == card.name), None)
    result = time_rows(config, options, ranks, gpu)
    if ranks.rank == 0:
        print(step_table(result))
        out = Path(options.out or f"runs/bench/{Path(config.run_dir).name}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(result, indent=1) + "\n")
        print(f"\n{out}")
    dist.destroy_process_group()


def check_host(config: Config, ranks: Ranks, say=print) -> list[str]:
    """The names of the checks that failed, the same on every rank; every rank calls it."""
    config = replace(config, learning_rate=1e-3, warmup_steps=0)  # an update that shows in bfloat16
    cuda, failed, hf_config = ranks.device.type == "cuda", [], architecture(config.model)
    shape, near = shape_of(hf_config), 1e-4 if config.dtype == "float32" else 0.02
    prompts = torch.randint(shape.vocab, (8, PROMPT), generator=torch.Generator().manual_seed(config.seed)).tolist()

    @contextmanager
    def check(name: str):
        begin, notes, wrong = time.perf_counter(), [], ""
        try:
            yield notes.append
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        if wrong := next(filter(None, gather([wrong])), ""):
            failed.append(name)
        verdict, seconds = "FAIL" if wrong else "pass", time.perf_counter() - begin
        say(f"{name:12} {verdict} {seconds:6.1f} s  {wrong or '; '.join(notes)}")

    def close(one: list[list[float]], other: list[list[float]]) -> str:
        apart = [abs(a - b) for a, b in zip(sum(one, []), sum(other, []), strict=True)]
        text = f"{len(apart)} log-probs, mean difference {sum(apart) / len(apart):.1g} nats"
        assert sum(apart) / len(apart) < near, text
        return text

    def sample_and_score(number: int, note) -> list:
        groups = rollout(sampler, prompts * ranks.world, COUNT, TOKENS, NEVER, (number, "predict"))
        drawn = [(one.prompt_ids, one.completion_ids) for group in groups for one in group]
        own = [values for values, _ in score(run.policy, drawn, config, ranks, config.temperature)]
        note(close(own, [one.sampler_logprobs for group in groups for one in group]))
        return groups

    with check("versions") as note:
        note(", ".join(line for line in environment().split("\n")[2:-1] if "not installed" not in line))
    with check("ranks") as note:
        dist.all_reduce(number := torch.ones(1 << 20, device=ranks.device))
        assert number[-1] == ranks.world and gather([ranks.rank]) == list(range(ranks.world))
        note(f"{ranks.world} ranks")
    with check("gather") as note:  # 288 responses of 1,024 tokens from each rank, as after a phase of the paper's size
        own = [[Rollout([1], list(range(1024)), [-1.0] * 1024, "", "length") for _ in range(8)] for _ in range(36)]
        begin, parts = time.perf_counter(), gather([as_arrays(own)])
        assert [from_arrays(part, [[1]] * 36) for part in parts] == [own] * ranks.world
        note(f"{(time.perf_counter() - begin) / ranks.world:.2f} s for each rank's 288 responses")
    with check("Liger") as note:  # before any other model: it changes modules for good
        expected = sequence_logprobs(random_sampler(replace(config, liger=False), hf_config, ranks), prompts)
        sampler = random_sampler(config, hf_config, ranks)
        note(close(expected, sequence_logprobs(sampler, prompts)) if cuda and config.liger else "off")
    run, replica = make_run(sampler), sampler.replica
    with check("attention") as note:
        reader = table_reader(replica.device, replica.dtype, shape.heads, shape.kv_heads, shape.head_dim)[0]
        splits = getattr(reader, "keywords", {}).get("splits")  # {number of rows: parts}
        note(f"{describe_attention(replica)}, by {getattr(reader, 'func', reader).__name__}")
        note(f"splits by rows {splits}" if splits else "no splits")
    with check("greedy") as note:  # the same tokens as the ordinary generate, or two that are level where they part
        ids, name = torch.tensor(prompts, device=ranks.device), replica.config._attn_implementation
        sampling = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        model.use_attention(replica, "sdpa")  # which needs no borders of packed rows
        plain = replica.generate(ids, attention_mask=torch.ones_like(ids), **sampling)
        model.use_attention(replica, name)
        for graphs in (True, False) if cuda and config.use_cuda_graph else (False,):
            own = replace(sampler, config=replace(config, use_cuda_graph=graphs))
            for (one,), other in zip(generate(own, prompts, 1, TOKENS, NEVER, 0, True), plain.tolist(), strict=True):
                row = one.prompt_ids + one.completion_ids
                n = next((n for n in range(PROMPT, len(row)) if row[n] != other[n]), len(row))
                a, b = sequence_logprobs(sampler, [row[: n + 1], other[: n + 1]])
                assert abs(a[-1] - b[-1]) < 5 * near, f"graphs={graphs}: parts from generate at token {n - PROMPT}"
            assert own.config.use_cuda_graph == graphs, "CUDA graphs cannot be captured"
            note(f"{len(prompts) * TOKENS} tokens with graphs={graphs}")
    with check("log-probs") as note:
        groups = sample_and_score(0, note)
    with check("update") as note:  # of a full micro-batch on each rank
        tokens, (first, *_) = len(prompts) * COUNT * (PROMPT + TOKENS), run.policy.parameters()
        graded = [Group("pred", group, [1.0, 0.0] * (COUNT // 2)) for group in groups]
        samples = make_samples(graded * max(1, config.tokens_per_micro_batch // tokens), config)
        row, before = {}, first.to_local().clone()
        with largest_memory(row):
            row |= update(run.policy, run.optimizer, samples, run.config, ranks, 0)
        planned = sum(gpu_memory(shape, run.config, ranks.per_node or ranks.world)["training"].values()) / 1e9
        note(f"{row['trained_tokens']} tokens; {row['peak_memory_gb']:.2f} GB, {planned:.2f} by plan for a GPU")
        assert not before.equal(first.to_local()) and not (cuda and row["peak_memory_gb"] > 1.05 * planned), "see there"
    with check("refresh") as note:  # the sampler has the new weights, and no key of the old ones
        model.refresh(run.policy, replica)
        sample_and_score(1, note)
    with check("checkpoint"), tempfile.TemporaryDirectory() as folder:
        kept = replace(sampler.config, run_dir=gather([folder])[0])
        saver = make_saver(run.policy, run.optimizer, replace(sampler, config=kept))
        own, before, saver.done = first.detach().to_local(), first.detach().to_local().clone(), 1
        save_checkpoint(saver)
        assert finish_save(saver), "it was not written"
        own.zero_()
        load_checkpoint(saver, *find_checkpoint(kept))
        assert before.equal(own), "it came back with other weights"
        dist.barrier()
    gc.unfreeze()
    return failed


def print_checks(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word, SystemExit with status 1 if a check fails."""
    default = "configs/smollm3.yaml" if torch.cuda.is_available() else "configs/tiny.yaml"
    config = read_config(words if words and "=" not in words[0] else [default, *words])
    ranks = start_ranks(config.rank_timeout)
    failed = check_host(config, ranks, print if ranks.rank == 0 else lambda *_: None)
    dist.destroy_process_group()
    raise SystemExit(bool(failed))
