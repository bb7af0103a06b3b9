"""One step on random weights, without a download: its seconds (`time_config`), and whether each part works
(`print_checks`).

The step is train.step on made-up tasks: random prompts, response lengths drawn by the seed, and right and wrong
responses in each group, so that every one is trained on. Left out: masking, parsing, probe, scoring by a second copy.
"""

import gc
import random
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

import model
from bench.memory import decide_checkpointing, gpu_memory, shape_of
from bench.plan import GPUS, Work, architecture, ideal_seconds, phases, read_words, response_lengths
from checkpoint import finish_save, load_checkpoint, make_saver, newest_checkpoint, save_checkpoint
from config import Config, ConfigError, read_config
from data import Corpus, Passage
from engine.batching import describe_attention
from grpo import make_optimizer, score
from masking import Mask
from methods import Method, Run, Task
from metrics import environment
from ops import logprobs_of
from ranks import Ranks, gather, start_ranks
from rollout import Rollout, Sampler, at_each_token, before_restart, make_sampler, rollout
from train import step

NEVER = "\x00never{"  # an opening that no response contains: each is searched for it, as in a run, and none ends by it
TINY_BASE = Path(__file__).parent.parent / "assets/tiny_base"


def random_sampler(config: Config, ranks: Ranks) -> Sampler:
    """A sampler with random weights. The tiny base's tokenizer stands in for one that may not be on disk."""
    tokenizer = model.load_tokenizer(replace(config, model=str(TINY_BASE)))
    return make_sampler(model.load_replica(config, ranks, architecture(config.model)), tokenizer, config, ranks)


def make_run(sampler: Sampler) -> Run:
    """The trainer for a sampler, whose responses no end-of-sequence ends from here on. Every rank calls it."""
    replica, ranks = sampler.replica, sampler.ranks
    sampler.eos_ids = {replica.config.vocab_size}  # an id that cannot be sampled
    config = replace(sampler.config, kl=0.0, mask_truncated=False)  # no second copy; all responses end at their limit
    config = decide_checkpointing(replica.config, config, ranks)
    policy = model.build_policy(replica, config, ranks)
    unread = Corpus([Passage("", "", "", "words")], [], {})
    return Run(config, ranks, unread, sampler, policy, None, make_optimizer(policy, config))


def stop_at_limits(limits: list[list[int]]):
    """Inside, each response to each of this rank's prompts has its own longest length (bench/). A forked request would
    have that of the one it came from."""
    pairs = ((n, m, most) for n, own in enumerate(limits) for m, most in enumerate(own))
    limit_of = {f"{n}__child#{m - 1}" if m else str(n): most for n, m, most in pairs}

    def update(original, request, token_id, logprob):
        request._new_tokens_limit = limit_of[request.request_id] - len(before_restart(request))
        return original(request, token_id, logprob)

    return at_each_token(update)


def given_work(works: dict[str, tuple]) -> Method:
    """A method whose work is given: {phase: (token prompts, the length of each response to each prompt)}. Its steps
    raise RuntimeError if a response has another length."""

    def sample(run: Run, name: str, number: int) -> list[list[Rollout]]:
        (prompts, limits), noise = works[name], (number, name)
        with stop_at_limits(limits[run.ranks.rank :: run.ranks.world]):
            groups = rollout(run.sampler, prompts, len(limits[0]), max(map(max, limits)), NEVER, noise)
        if [[len(response.completion_ids) for response in group] for group in groups] != limits:
            raise RuntimeError(f"{name}, step {number}: responses did not get their lengths")
        return groups

    def propose(run: Run, passages: list[Passage], number: int) -> list[list[Task]]:
        prompts = works["predict"][0]
        groups = sample(run, "propose", number) if "propose" in works else [[None] * len(prompts)]
        mask, prompt = Mask("words", masked="words", target="words", occurrences=1), iter(prompts)
        return [[Task(passages[0], mask, response, next(prompt)) for response in group] for group in groups]

    def predict(run: Run, tasks: list[Task], number: int) -> None:
        for index, (task, group) in enumerate(zip(tasks, sample(run, "predict", number), strict=True)):
            every = 4 if index % 2 else 2  # a half or a quarter is right: so masks earn different rewards, too
            task.predictions, task.correct = group, [int(number % every == 0) for number in range(len(group))]

    return Method("work of given lengths", propose, predict, grade=None)


def made_up_work(config: Config, work: Work, vocab: int) -> dict[str, tuple]:
    """What `given_work` takes: the work of a step of the config's method, whose masks are all valid."""
    rng, works = random.Random(config.seed), {}
    for number, (name, *size) in enumerate(phases(config)):
        limits = response_lengths(*size, work, number)
        works[name] = [[rng.randrange(vocab) for _ in range(work.prompt)] for _ in limits], limits
    return works


# ------------------------------------------------------------------------------------------------------------- seconds


def time_config(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word, before the start-up."""
    work, config = read_words(words, Work)
    if not phases(config):
        raise ConfigError(f"method={config.method!r}: samples nothing; time a method that does")
    ranks = start_ranks(config.rank_timeout)
    run = make_run(random_sampler(config, ranks))
    shape = shape_of(run.sampler.replica.config)
    rows = time_steps(run, made_up_work(config, work, shape.vocab))
    if ranks.rank == 0:
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU"
        gpu = next((gpu for gpu in GPUS.values() if gpu.name == device), None)
        print(f"{config.model}, random weights, {shape.parameters:,} parameters, {config.dtype}")
        print(f"{ranks.world} x {device}; {describe_attention(run.sampler.replica)}; prompts of {work.prompt} tokens")
        print(step_table(rows, ideal_seconds(shape, run.config, work, gpu, ranks.world)["seconds"] if gpu else {}))
    dist.destroy_process_group()


def time_steps(run: Run, works: dict[str, tuple], repeats: int = 3) -> list[dict]:
    """Metrics of a warm-up step and of `repeats` more on the same work; peak_memory_gb is the largest of all ranks'.
    Every rank calls it."""
    gc.collect()
    gc.freeze()  # as train.py does
    rows = [step(run, number, given_work(works)).row for number in range(repeats + 1)]
    gc.unfreeze()
    for row in rows:
        row["peak_memory_gb"] = max(gather([row["peak_memory_gb"]]))
    return rows


def step_seconds(row: dict) -> dict[str, float]:
    """Seconds by phase, and of the `step`, their sum."""
    seconds = {key.removeprefix("time/"): value for key, value in row.items() if key.startswith("time/")}
    return seconds | {"step": sum(seconds.values())}


def step_table(rows: list[dict], ideal: dict[str, float]) -> str:
    """Medians of all rows but the first, the warm-up. ideal: seconds by phase (bench/plan.py), empty if not known;
    their share of the measured ones is in the update the MFU, in propose and predict the share of the decode limit."""
    warmup, *timed = map(step_seconds, rows)
    middle = {name: median(times[name] for times in timed) for name in warmup}
    lines = [f"{'seconds':10}{'median':>10}{'ideal':>10}{'share':>10}"]
    for name, value in middle.items():
        least = ideal.get(name)
        lines.append(f"{name:10}{value:10.3f}" + (f"{least:10.3f}{least / value:10.1%}" if least else ""))
    sampled, trained = rows[-1]["response_tokens"], rows[-1]["trained_tokens"]
    lines += [
        f"sampled: {sampled:,} tokens, {sampled / (middle['propose'] + middle['predict']):,.0f} a second",
        f"trained: {trained:,} tokens of responses, {trained / middle['update']:,.0f} a second",
        f"largest memory of a rank in the update: {max(row['peak_memory_gb'] for row in rows):.2f} GB",
        f"the warm-up step, not counted: {warmup['step']:.3f} s",
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- checks


def check_host(config: Config, ranks: Ranks, say=print) -> list[str]:
    """The names of the checks that failed, the same on every rank; every rank calls it."""
    config = replace(config, learning_rate=1e-3, warmup_steps=0)  # an update that shows in bfloat16
    cuda, failed, shape = ranks.device.type == "cuda", [], shape_of(architecture(config.model))
    # nats: in bfloat16 36 random layers differ by 0.03 between two orders of a sum, and by 0.6 if one key is missing
    near, length, tokens = 1e-4 if config.dtype == "float32" else 0.1, 48, 32  # then tokens of a prompt, of a response
    prompts = torch.randint(shape.vocab, (8, length), generator=torch.Generator().manual_seed(config.seed)).tolist()

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
        say(f"{name:12} {verdict} {seconds:6.1f} s  {'; '.join([*notes, *filter(None, [wrong])])}")

    with check("versions") as note:
        note(", ".join(line for line in environment().split("\n")[2:-1] if "not installed" not in line))
    with check("ranks") as note:
        dist.all_reduce(number := torch.ones(1 << 20, device=ranks.device))
        assert number[-1] == ranks.world and gather([ranks.rank]) == list(range(ranks.world))
        note(f"{ranks.world} ranks")
    with check("kernels") as note:  # attention and Liger against plain transformers, which comes first: Liger stays
        replica, ids = random_sampler(replace(config, liger=False), ranks).replica, torch.tensor(prompts)
        model.use_attention(replica, "sdpa")
        with torch.no_grad():
            logprobs = replica(ids.to(ranks.device)).logits.float().log_softmax(-1).cpu()
        sampler = random_sampler(config, ranks)
        scorer = partial(logprobs_of, sampler.replica)
        scores = score(scorer, [(row[:1], row[1:]) for row in prompts], config, ranks)
        packed = torch.tensor([logprobs for logprobs, _ in scores])
        apart = (logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] - packed).abs().mean()
        note(f"{packed.numel()} log-probs, mean difference {apart:.1g} nats")
        assert apart < near, "kernels deviate"
    run, replica = make_run(sampler), sampler.replica
    with check("decoding") as note:
        note(describe_attention(replica))
    count = max(2, config.tokens_per_micro_batch // len(prompts) // (length + tokens))  # a micro-batch on each rank
    method = given_work({"predict": (prompts * ranks.world, [[tokens] * count] * len(prompts) * ranks.world)})

    def one_step(number: int, note) -> dict:
        row = step(run, number, method).row
        note(f"sampler and trainer {row['mismatch_abs']:.1g} nats a token apart")
        assert row["mismatch_abs"] < near, "the sampler has other log-probs than the trainer"
        return row

    with check("update") as note:
        row, parts = one_step(0, note), gpu_memory(shape, run.config, ranks.per_node or ranks.world)["training"]
        planned = sum(parts.values()) / 1e9
        note(f"{row['peak_memory_gb']:.2f} GB, {planned:.2f} by plan for a GPU")
        assert row["replica_changed"] > 0, "no weight changed"
        assert not cuda or row["peak_memory_gb"] <= 1.05 * planned, "more memory than planned"
        assert not run.sampler.lacks, "CUDA graphs cannot be captured"
    with check("refresh") as note:  # the sampler has the new weights, and no key of the old ones
        one_step(1, note)
    with check("checkpoint"), tempfile.TemporaryDirectory(dir=".") as folder:  # as large as a run's
        kept, first = replace(sampler.config, run_dir=gather([folder])[0]), next(run.policy.parameters())
        Path(folder, "environment.txt").write_text(environment())  # which the model card quotes
        saver = make_saver(run.policy, run.optimizer, replace(sampler, config=kept))
        own, before, saver.done = first.detach().to_local(), first.detach().to_local().clone(), 1
        save_checkpoint(saver)
        assert finish_save(saver), "it was not written"
        own.zero_()
        load_checkpoint(saver, *newest_checkpoint(Path(kept.run_dir)))
        assert before.equal(own), "it came back with other weights"
        dist.barrier()
    return failed


def print_checks(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word, SystemExit with status 1 if a check fails."""
    default = "configs/smollm3.yaml" if torch.cuda.is_available() else "configs/tiny.yaml"
    config = read_config(words if words and "=" not in words[0] else [default, *words])
    ranks = start_ranks(config.rank_timeout)
    failed = check_host(config, ranks, print if ranks.rank == 0 else lambda *_: None)
    dist.destroy_process_group()
    raise SystemExit(bool(failed))
