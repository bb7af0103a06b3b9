"""The first minutes on a new host: a line per check, exit status 1 if one fails. Random weights, no download."""

import gc
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

import model
from bench import costs
from bench.memory import gpu_memory, shape_of
from bench.step import NEVER, make_run, random_sampler
from checkpoint import find_checkpoint, finish_save, load_checkpoint, make_saver, save_checkpoint
from config import Config, read_config
from grpo import Group, make_samples, score, update
from metrics import environment, largest_memory
from engine.batching import describe_attention
from engine.cache import table_reader
from ranks import Ranks, gather, start_ranks
from rollout import Rollout, as_arrays, from_arrays, generate, rollout, sequence_logprobs

PROMPT, COUNT, TOKENS = 48, 4, 32


def check_host(config: Config, ranks: Ranks, say=print) -> list[str]:
    """The names of the checks that failed, the same on every rank; every rank calls it."""
    config = replace(config, learning_rate=1e-3, warmup_steps=0)  # an update that shows in bfloat16
    cuda, failed, architecture = ranks.device.type == "cuda", [], costs.architecture(config.model)
    shape, near = shape_of(architecture), 1e-4 if config.dtype == "float32" else 0.02
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
        begin, packed = time.perf_counter(), gather([as_arrays(own)])
        every = [from_arrays(one, [[1]] * 36) for one in packed]
        assert every == [own] * ranks.world
        note(f"{(time.perf_counter() - begin) / ranks.world:.2f} s for each rank's 288 responses")
    with check("Liger") as note:  # before any other model: it changes modules for good
        plain = random_sampler(replace(config, liger=False), architecture, ranks)
        expected, sampler = sequence_logprobs(plain, prompts), random_sampler(config, architecture, ranks)
        note(close(expected, sequence_logprobs(sampler, prompts)) if cuda and config.liger else "off")
        del plain
    run, replica = make_run(sampler), sampler.replica
    with check("attention") as note:
        heads = replica.device, replica.dtype, shape.heads, shape.kv_heads, shape.head_dim
        reader = table_reader(*heads)[0]
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
        own, saver.done = first.detach().to_local(), 1
        before = own.clone()
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
