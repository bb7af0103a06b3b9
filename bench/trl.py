"""The same step through other trainers, beside ours: TRL's GRPOTrainer, and the loop that one writes first.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -r requirements.txt trl==1.16.0
    .venv-trl/bin/python -m bench.trl [configs/tiny.yaml] [key=value ...]

    ours        rollout, rewards, update, refresh, as in train.py
    trl         GRPOTrainer with Hugging Face generate, which is its default
    trl_paged   GRPOTrainer with use_transformers_continuous_batching and that setting's defaults; with bfloat16 it
                casts its weights down at the first rollout and for good, so that its update is another one
    trl_fitted  the same with a cache and a batch that suit this step (CPU only)
    naive       generate on left-padded prompts, one padded forward with all logits, plain policy gradient

One step is `prompts` x `completions` responses of exactly `tokens` tokens, and one optimizer step on all of them, from
the same weights, with the same rewards (half of each group), micro-batches of as many tokens, one process. An
end-of-sequence that is in no vocabulary makes lengths equal: TRL has no other way. A measurement is a fresh process, a
warm-up step and the median of `repeats`; the processes take turns, `rounds` times, so that a busy minute hits all
alike. Beside seconds stand the CPU's own, which a busy machine distorts less.
TRL is no requirement of this project; without it `peers=ours,naive` still runs. On a GPU: model=FOLDER of weights.
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

from bench.plan import Phase
from bench.step import Work, one_step, split_words
from config import Config, ConfigError, read_config
from grpo import make_optimizer
from metrics import peak_memory_gb
from model import build_policy, decide_checkpointing, load_replica, load_tokenizer
from ops import VARLEN
from prompts import PREDICT_PROMPT, fill
from ranks import start_ranks
from rollout import make_sampler

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class PeerOptions:
    """Words of the command that are no keys of the config."""

    prompts: int = 32
    completions: int = 8
    tokens: int = 24
    """Of every response."""
    articles: int = 1
    """Of the mini-wiki in a prompt: some 30 words each."""
    repeats: int = 3
    """Timed steps of a process, after one that warms up."""
    rounds: int = 3
    """Processes of each peer, in turns."""
    peers: str = "ours,trl,trl_paged,naive" + ("" if torch.cuda.is_available() else ",trl_fitted")
    out: str = ""
    """Where the JSON goes; empty: nowhere."""


def texts(config: Config, options: PeerOptions) -> list[str]:
    """Prediction prompts on articles of the mini-wiki."""
    with gzip.open(ROOT / "assets/tiny_wiki.jsonl.gz", "rt", encoding="utf-8") as lines:
        articles = [json.loads(next(lines))["text"] for _ in range(options.prompts * options.articles)]
    joined = [" ".join(articles[i :: options.prompts]) for i in range(options.prompts)]
    return [fill(config.predict_prompt or PREDICT_PROMPT, text) for text in joined]


def rows_per_batch(config: Config, options: PeerOptions, longest: int) -> int:
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


def now() -> tuple[float, float]:
    """(seconds, seconds of the CPU), the GPU's queue drained."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def timed(step: Callable[[], None], repeats: int) -> list[tuple]:
    """Before and after each of 1 + repeats calls."""
    times = []
    for _ in range(repeats + 1):
        start = now()
        step()
        times.append((start, now()))
    return times


# ---- the peers: each returns the times before and after a warm-up step and `repeats` more


def ours(config: Config, options: PeerOptions) -> list[tuple]:
    """A step of train.py, on one rank."""
    ranks = start_ranks()
    sampler = make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks)
    sampler.eos_ids = {sampler.replica.config.vocab_size}
    config = decide_checkpointing(sampler.replica.config, config, ranks)
    policy = build_policy(sampler.replica, config, ranks)
    optimizer = make_optimizer(policy, config)
    prompts = [sampler.tokenizer(text).input_ids for text in texts(config, options)]
    phase = Phase("predict", options.prompts, options.completions, options.tokens)
    work = Work(phase, prompts, [[options.tokens] * options.completions for _ in prompts])
    gc.collect()
    gc.freeze()  # as train.py does
    number = iter(range(options.repeats + 1))
    times = timed(lambda: one_step([work], policy, optimizer, sampler, next(number)), options.repeats)
    dist.destroy_process_group()
    gc.unfreeze()
    return times


def naive(config: Config, options: PeerOptions) -> list[tuple]:
    """What one writes first: pad, generate, a forward with all logits, advantages, backward, step."""
    tokenizer, model = load_tokenizer(config), plain_model(config, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    rows = [tokenizer(text).input_ids for text in texts(config, options)]
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


def trl(config: Config, options: PeerOptions, paged: bool = False, fitted: bool = False) -> list[tuple]:
    """TRL's GRPOTrainer, set to our step: no KL term, no recomputation of old log-probs, one update per batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer, cuda = load_tokenizer(config), torch.cuda.is_available()
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"eos_token": "<never sampled>"})  # its id is beyond the model's vocabulary
    prompts = texts(config, options)
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
    return list(zip(starts, ends, strict=True))


def fitted_settings(options: PeerOptions, longest: int) -> dict:
    """For a CPU, where the defaults take half of the memory for a cache. 32 requests at once was the fastest of 4, 8,
    16, 32, 64, 128 and 256: attention goes over the caches of all of them."""
    at_once, page = 32, 32
    pages = -(-(longest + options.tokens) // page) + 1
    return {"page_size": page, "num_blocks": at_once * pages + 8, "max_requests_per_batch": at_once} | {
        "max_batch_tokens": at_once * longest
    }


PEERS = {
    "ours": ours,
    "trl": trl,
    "trl_paged": lambda *words: trl(*words, paged=True),
    "trl_fitted": lambda *words: trl(*words, paged=True, fitted=True),
    "naive": naive,
}


# ---- taking turns


def one_process(name: str, words: list[str]) -> dict:
    """The figures of one peer from a process of its own."""
    command = [sys.executable, __file__, f"--only={name}", *words]
    # TRL would spread over every GPU that it sees, and refuses to
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str]) -> None:
    only = words[0].removeprefix("--only=") if words and words[0].startswith("--only=") else ""
    words = words[1:] if only else words
    options, rest = split_words(words, PeerOptions)
    if not rest or "=" in rest[0]:
        rest = ["configs/tiny.yaml", *rest]
    config = read_config([*rest, f"max_prediction_tokens={options.tokens}", "kl=0"])
    names = options.peers.split(",")
    if not set(names) <= set(PEERS):
        raise ConfigError(f"peers={options.peers!r}: must be some of {','.join(PEERS)}")
    if only:
        times = PEERS[only](config, options)
        seconds, cpu = ([after[kind] - before[kind] for before, after in times] for kind in (0, 1))
        row = {"warmup": seconds[0], "seconds": seconds[1:], "cpu_seconds": cpu[1:], "memory_gb": peak_memory_gb()}
        print(json.dumps(row))
        return
    runs = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            runs[name].append(one_process(name, words))
            print(f"{name:10} {runs[name][-1]}", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(runs, indent=1) + "\n")
    print("\n" + table(runs, options))


def table(runs: dict[str, list[dict]], options: PeerOptions) -> str:
    """Medians of the processes' medians, the range of seconds, and how many times the first peer's seconds that is."""
    heads = ("step, s", "lowest", "highest", "warm-up", "times", "CPU s", "times", "GB")
    lines = [f"{options.prompts} x {options.completions} responses of {options.tokens} tokens, one optimizer step"]
    lines.append(f"{'':10}" + "".join(f"{head:>9}" for head in heads))
    first = None
    for name, results in runs.items():
        medians = [statistics.median(one["seconds"]) for one in results]
        cpu = statistics.median(statistics.median(one["cpu_seconds"]) for one in results)
        middle, warm = statistics.median(medians), statistics.median(one["warmup"] for one in results)
        first = first or (middle, cpu)
        cells = [middle, min(medians), max(medians), warm, middle / first[0], cpu, cpu / first[1]]
        cells.append(max(one["memory_gb"] for one in results))
        lines.append(f"{name:10}" + "".join(f"{cell:9.2f}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__.strip())
        raise SystemExit(0)
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
