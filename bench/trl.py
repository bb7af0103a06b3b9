"""The same step through other trainers, beside ours: TRL's GRPOTrainer, and the loop that one writes first.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -r requirements.txt trl==1.16.0
    .venv-trl/bin/python -m bench trl [configs/tiny.yaml] [key=value ...]

    ours        rollout, rewards, update, refresh, as in train.py
    trl         GRPOTrainer with Hugging Face generate, which is its default
    trl_paged   GRPOTrainer with use_transformers_continuous_batching and that setting's defaults; with bfloat16 it
                keeps bfloat16 weights from its first rollout on, so that its update differs
    trl_fitted  the same with a cache and a batch that suit this step (CPU only)
    naive       generate on left-padded prompts, one padded forward with all logits, plain policy gradient

A step is `prompts` x `completions` responses of exactly `tokens` tokens and one optimizer step on all of them. All
peers have the same weights, rewards (half of each group is right), tokens in a micro-batch, and one process. An
end-of-sequence outside the vocabulary makes lengths equal; TRL has no other way. A measurement is a fresh process, a
warm-up step and the median of `repeats`. The processes take turns for `rounds` rounds, so that other load on the
machine hits all alike; CPU seconds are less sensitive to it.
TRL is not a requirement of this project; without it `peers=ours,naive` still runs. On a GPU: model=FOLDER of weights.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from bench.options import Options, Phase, complete, split_words, text_table
from bench.step import Work, make_run, one_step
from config import Config, ConfigError, read_config
from metrics import peak_memory_gb
from model import load_replica, load_tokenizer
from ops import VARLEN
from prompts import PREDICT_PROMPT, fill
from ranks import start_ranks
from rollout import make_sampler

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
PROJECT = Path(__file__).resolve().parent.parent


@dataclass
class Duration:
    """Seconds on the clock, and seconds of the CPU."""

    seconds: float
    cpu: float


def peer_prompts(config: Config, options: Options) -> list[str]:
    """Prediction prompts on articles of the mini-wiki."""
    with gzip.open(PROJECT / "assets/tiny_wiki.jsonl.gz", "rt", encoding="utf-8") as lines:
        articles = [json.loads(next(lines))["text"] for _ in range(options.prompts * options.articles)]
    joined = [" ".join(articles[i :: options.prompts]) for i in range(options.prompts)]
    return [fill(config.predict_prompt or PREDICT_PROMPT, text) for text in joined]


def rows_per_batch(config: Config, options: Options, longest: int) -> int:
    """Padded rows in a micro-batch: as many as its tokens allow and as divide the responses of a step."""
    total, room = options.prompts * options.completions, config.tokens_per_micro_batch // (longest + options.tokens)
    return max(rows for rows in range(1, total + 1) if total % rows == 0 and rows <= max(1, room))


def plain_model(config: Config, attention: str, dtype=torch.float32):
    """The weights as other trainers hold them: float32, computing in config.dtype under autocast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = "sdpa" if attention == VARLEN else attention
    model = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=dtype, attn_implementation=kernel, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device)


def now() -> Duration:
    """The clocks, once the GPU's queue is drained."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Duration(time.perf_counter(), time.process_time())


def between(start: Duration, end: Duration) -> Duration:
    return Duration(end.seconds - start.seconds, end.cpu - start.cpu)


def timed(step: Callable[[], None], repeats: int) -> list[Duration]:
    """Of each of 1 + repeats calls."""
    times = []
    for _ in range(repeats + 1):
        start = now()
        step()
        times.append(between(start, now()))
    return times


# ---- the peers: each returns the durations of a warm-up step and `repeats` more


def ours(config: Config, options: Options) -> list[Duration]:
    """A step of train.py, on one rank."""
    ranks = start_ranks()
    run = make_run(make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks))
    prompts = [run.sampler.tokenizer(text).input_ids for text in peer_prompts(config, options)]
    phase = Phase("predict", options.prompts, options.completions, options.tokens)
    work = Work(phase, prompts, [[options.tokens] * options.completions for _ in prompts])
    number = iter(range(options.repeats + 1))
    times = timed(lambda: one_step(run, [work], next(number)), options.repeats)
    dist.destroy_process_group()
    gc.unfreeze()
    return times


def naive(config: Config, options: Options) -> list[Duration]:
    """What one writes first: pad, generate, a forward with all logits, advantages, backward, step."""
    tokenizer, model = load_tokenizer(config), plain_model(config, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    rows = [tokenizer(text).input_ids for text in peer_prompts(config, options)]
    longest, device = max(map(len, rows)), model.device
    prompts = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": options.completions, "pad_token_id": 0}
    sampling |= {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    rewards = torch.tensor([0.0, 1.0], device=device).repeat(len(rows), (options.completions + 1) // 2)
    rewards = rewards[:, : options.completions]
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten()
    size = rows_per_batch(config, options, longest)
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    def step() -> None:
        with torch.no_grad(), half:
            whole = model.generate(input_ids=prompts, attention_mask=mask, **sampling)
        seen = torch.cat([mask.repeat_interleave(options.completions, 0), torch.ones_like(whole[:, longest:])], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        for begin in range(0, len(whole), size):
            part = slice(begin, begin + size)
            with half:
                logits = model(input_ids=whole[part], attention_mask=seen[part], position_ids=positions[part]).logits
            logprobs = logits[:, longest - 1 : -1].float().log_softmax(-1)
            own = logprobs.gather(-1, whole[part, longest:, None])[..., 0]
            ratio = torch.exp(own - own.detach())
            loss = -(ratio * advantages[part, None]).sum() / (len(whole) * options.tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, options.repeats)


def trl_step(config: Config, options: Options, paged: bool = False, fitted: bool = False) -> list[Duration]:
    """TRL's GRPOTrainer, set to our step: no KL term, no recomputation of old log-probs, one update per batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer, cuda = load_tokenizer(config), torch.cuda.is_available()
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"eos_token": "<never sampled>"})  # its id is beyond the model's vocabulary
    prompts = peer_prompts(config, options)
    longest = max(len(tokenizer(text).input_ids) for text in prompts)
    model = plain_model(config, "sdpa")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    total, rows = options.prompts * options.completions, rows_per_batch(config, options, longest)
    extra = {}
    if paged:
        extra["use_transformers_continuous_batching"] = True
    if fitted:
        if cuda:
            raise ConfigError("peers=trl_fitted: for a CPU; on a GPU trl_paged sizes its cache by free memory")
        extra["transformers_continuous_batching_config"] = fitted_settings(options, longest)
    lengths, starts, ends = [], [], []

    def reward(completion_ids, **_) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(number % 2) for number in range(len(completion_ids))]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            starts.append(now())

        def on_step_end(self, *_, **__):
            ends.append(now())

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, max_steps=options.repeats + 1, per_device_train_batch_size=rows,
            gradient_accumulation_steps=total // rows, num_generations=options.completions,
            max_completion_length=options.tokens, temperature=config.temperature, top_p=1.0, top_k=0, beta=0.0,
            num_iterations=1, epsilon=config.clip_low, epsilon_high=config.clip_high,
            max_grad_norm=config.max_grad_norm, learning_rate=config.learning_rate, lr_scheduler_type="constant",
            weight_decay=config.weight_decay,
            gradient_checkpointing=config.gradient_checkpointing, bf16=config.dtype == "bfloat16", use_cpu=not cuda,
            shuffle_dataset=False, report_to="none", save_strategy="no", disable_tqdm=True, **extra,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, args=arguments, reward_funcs=reward, processing_class=tokenizer, callbacks=[Clock()],
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        )  # fmt: skip
        trainer.train()
    if lengths != [options.tokens] * total * (options.repeats + 1):
        raise RuntimeError(f"TRL made {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens")
    return [between(*pair) for pair in zip(starts, ends, strict=True)]


def fitted_settings(options: Options, longest: int) -> dict:
    """For a CPU, where the defaults take half of the memory for a cache. 32 requests at once was the fastest of 4, 8,
    16, 32, 64, 128 and 256: attention goes over the caches of all of them."""
    at_once, page = 32, 32
    pages = -(-(longest + options.tokens) // page) + 1
    return {"page_size": page, "num_blocks": at_once * pages + 8, "max_requests_per_batch": at_once} | {
        "max_batch_tokens": at_once * longest
    }


PEERS = {
    "ours": ours,
    "trl": trl_step,
    "trl_paged": lambda *words: trl_step(*words, paged=True),
    "naive": naive,
    "trl_fitted": lambda *words: trl_step(*words, paged=True, fitted=True),
}


# ---- taking turns


def one_process(name: str, words: list[str]) -> dict:
    """The figures of one peer from a process of its own."""
    command = [sys.executable, "-m", "bench", "trl", *words, f"only={name}"]
    # TRL would spread over every GPU that it sees, and refuses to
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_peers(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word."""
    options, rest = split_words(words, "trl")
    if not rest or "=" in rest[0]:
        rest = ["configs/tiny.yaml", *rest]
    config = read_config([*rest, f"max_prediction_tokens={options.tokens}", "kl=0"])
    options = complete(options, config, "trl")
    names = [name for name in PEERS if name != "trl_fitted" or not torch.cuda.is_available()]
    names = options.peers.split(",") if options.peers else names
    if not {*names, options.only or "ours"} <= set(PEERS):
        raise ConfigError(f"peers={options.peers!r}: must be some of {','.join(PEERS)}")
    if options.only:
        warmup, *times = PEERS[options.only](config, options)
        row = {"warmup": warmup.seconds, "seconds": [one.seconds for one in times]}
        print(json.dumps(row | {"cpu_seconds": [one.cpu for one in times], "memory_gb": peak_memory_gb()}))
        return
    runs = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            runs[name].append(one_process(name, words))
            print(f"{name:10} {runs[name][-1]}", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(runs, indent=1) + "\n")
    print("\n" + peer_table(runs, options))


def peer_table(runs: dict[str, list[dict]], options: Options) -> str:
    """Medians of the processes' medians, the range of seconds, and the ratios to the first peer's figures."""
    rows, first = [("", "step, s", "lowest", "highest", "warm-up", "times", "CPU s", "times", "GB")], None
    for name, results in runs.items():
        medians = [statistics.median(one["seconds"]) for one in results]
        cpu = statistics.median(statistics.median(one["cpu_seconds"]) for one in results)
        middle, warm = statistics.median(medians), statistics.median(one["warmup"] for one in results)
        first = first or (middle, cpu)
        cells = [middle, min(medians), max(medians), warm, middle / first[0], cpu, cpu / first[1]]
        rows.append((name, *(f"{cell:.2f}" for cell in [*cells, max(one["memory_gb"] for one in results)])))
    title = f"{options.prompts} x {options.completions} responses of {options.tokens} tokens, one optimizer step"
    return "\n".join([title, *text_table(rows, 10, 9)])
