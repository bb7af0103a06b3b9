"""The same step through other trainers, beside ours: TRL's GRPOTrainer, and the loop that one writes first.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -r requirements.txt trl==1.16.0
    .venv-trl/bin/python -m bench trl [configs/tiny.yaml] [key=value ...]

A step is `prompts` x `completions` responses of exactly `tokens` tokens and one optimizer step on them, with the same
weights, rewards (half of each group is right) and micro-batches for all. Each measurement is a process; peers take
turns, so that other load hits all alike. `peers=ours,naive` runs without TRL. On a GPU: model=FOLDER of weights.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from bench.options import Options, read_words, text_table
from bench.step import make_run, one_step
from config import Config, ConfigError, check
from metrics import peak_memory_gb
from model import load_replica, load_tokenizer
from prompts import PREDICT_PROMPT, fill
from ranks import start_ranks
from rollout import make_sampler


def peer_prompts(config: Config, options: Options) -> list[str]:
    """Prediction prompts on articles of the mini-wiki."""
    with gzip.open(Path(__file__).parent.parent / "assets/tiny_wiki.jsonl.gz", "rt", encoding="utf-8") as lines:
        articles = [json.loads(next(lines))["text"] for _ in range(options.prompts * options.articles)]
    template = config.predict_prompt or PREDICT_PROMPT
    return [fill(template, " ".join(articles[n :: options.prompts])) for n in range(options.prompts)]


def make_peer(config: Config, options: Options) -> tuple:
    """What the other trainers begin with: (model in float32, to compute in config.dtype under autocast; tokenizer;
    prompts; tokens of the longest; padded rows in a micro-batch, as many as its tokens allow and as divide a step)."""
    tokenizer, prompts = load_tokenizer(config), peer_prompts(config, options)
    tokenizer.padding_side = "left"
    longest = max(map(len, tokenizer(prompts).input_ids))
    total, room = options.prompts * options.completions, config.tokens_per_micro_batch // (longest + options.tokens)
    rows = max(rows for rows in range(1, total + 1) if total % rows == 0 and rows <= max(1, room))
    model = AutoModelForCausalLM.from_pretrained(
        config.model, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, prompts, longest, rows


def mark(marks: list[tuple[float, float]]) -> None:
    """Adds seconds of the clock and of the CPU, after all that the GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    marks.append((time.perf_counter(), time.process_time()))


def ours(config: Config, options: Options, marks: list) -> None:
    """A step of train.py, on one rank."""
    ranks = start_ranks()
    run = make_run(make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks))
    prompts = [run.sampler.tokenizer(text).input_ids for text in peer_prompts(config, options)]
    works = {"predict": (prompts, [[options.tokens] * options.completions] * options.prompts)}
    for number in range(options.repeats + 1):
        mark(marks)
        one_step(run, works, number)
        mark(marks)
    dist.destroy_process_group()


def naive(config: Config, options: Options, marks: list) -> None:
    """What one writes first: pad, generate, a forward with all logits, advantages, backward, step."""
    (model, tokenizer, prompts, longest, size), count = make_peer(config, options), options.completions
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": count, "pad_token_id": 0}
    sampling |= {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    rewards = (torch.arange(count, device=model.device) % 2).float().repeat(len(prompts), 1)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).view(-1, 1)
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    for _ in range(options.repeats + 1):
        mark(marks)
        with torch.no_grad(), half:
            whole = model.generate(input_ids=padded.input_ids, attention_mask=padded.attention_mask, **sampling)
        seen = torch.cat([padded.attention_mask.repeat_interleave(count, 0), torch.ones_like(whole[:, longest:])], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        for begin in range(0, len(whole), size):
            part = slice(begin, begin + size)
            with half:
                logits = model(input_ids=whole[part], attention_mask=seen[part], position_ids=positions[part]).logits
            logprobs = logits[:, longest - 1 : -1].float().log_softmax(-1)
            chosen = logprobs.gather(-1, whole[part, longest:, None])[..., 0]
            ratio = torch.exp(chosen - chosen.detach())
            (-(ratio * advantages[part]).sum() / (len(whole) * options.tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        mark(marks)


def trl_step(config: Config, options: Options, marks: list, paged=False, fitted=False) -> None:
    """TRL's GRPOTrainer, set to our step: no KL term, no recomputation of old log-probs, one update per batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tokenizer, prompts, longest, rows = make_peer(config, options)
    # TRL has no other way to equal lengths: the id of this end-of-sequence is beyond the model's vocabulary
    tokenizer.add_special_tokens({"eos_token": "<never sampled>"})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    total, lengths = options.prompts * options.completions, []
    extra = {"use_transformers_continuous_batching": True} if paged else {}
    if fitted:  # a cache for 32 requests at once, the fastest of 4 to 256 on a CPU; the default takes half the memory
        pages = -(-(longest + options.tokens) // 32) + 1  # of one request
        cache = {"page_size": 32, "num_blocks": 32 * pages + 8, "max_requests_per_batch": 32}
        extra["transformers_continuous_batching_config"] = cache | {"max_batch_tokens": 32 * longest}

    def reward(completion_ids, **_) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(number % 2) for number in range(len(completion_ids))]

    class Timer(TrainerCallback):
        on_step_begin = on_step_end = lambda *_, **__: mark(marks)

    arguments = GRPOConfig(
        output_dir="runs/bench/trl", max_steps=options.repeats + 1, per_device_train_batch_size=rows,
        gradient_accumulation_steps=total // rows, num_generations=options.completions,
        max_completion_length=options.tokens, temperature=config.temperature, top_p=1.0, top_k=0, beta=0.0,
        num_iterations=1, epsilon=config.clip_low, epsilon_high=config.clip_high, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm, learning_rate=config.learning_rate, lr_scheduler_type="constant",
        gradient_checkpointing=config.gradient_checkpointing, bf16=config.dtype == "bfloat16", report_to="none",
        use_cpu=model.device.type == "cpu", shuffle_dataset=False, save_strategy="no", disable_tqdm=True, **extra,
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": text} for text in prompts])
    GRPOTrainer(model, reward, arguments, dataset, processing_class=tokenizer, callbacks=[Timer()]).train()
    if lengths != [options.tokens] * total * (options.repeats + 1):
        raise RuntimeError(f"TRL made {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens")


PEERS = {
    "ours": ours,
    "trl": trl_step,  # generates by Hugging Face generate, its default
    "trl_paged": partial(trl_step, paged=True),  # with bfloat16 its weights stay bfloat16 after a rollout
    "naive": naive,
    "trl_fitted": partial(trl_step, paged=True, fitted=True),  # for a CPU only
}


def one_process(name: str, words: list[str]) -> dict:
    """The figures of one peer from a process of its own."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one: TRL would use all, and refuses to
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    command = [sys.executable, "-m", "bench", "trl", *words, f"only={name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_peers(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word."""
    options, config = read_words(words, "trl", "configs/tiny.yaml")
    config = replace(config, max_prediction_tokens=options.tokens, kl=0.0)
    check(config)
    able = [name for name in PEERS if name != "trl_fitted" or not torch.cuda.is_available()]
    names = options.peers.split(",") if options.peers else able
    if not {*names, options.only or "ours"} <= set(able):
        raise ConfigError(f"peers={options.peers!r}: must be some of {','.join(able)}")
    if options.only:
        marks = []
        PEERS[options.only](config, options, marks)
        wall, cpu = ([end[n] - begin[n] for begin, end in zip(marks[::2], marks[1::2], strict=True)] for n in (0, 1))
        row = {"warmup": wall[0], "seconds": wall[1:], "cpu_seconds": cpu[1:], "memory_gb": peak_memory_gb()}
        return print(json.dumps(row))
    runs = {name: [] for name in names}
    for name in names * options.rounds:
        runs[name].append(one_process(name, words))
        print(f"{name:10} {runs[name][-1]}", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(runs, indent=1) + "\n")
    title = f"\n{options.prompts} x {options.completions} responses of {options.tokens} tokens, one optimizer step"
    print(title, *peer_table(runs), sep="\n")


def peer_table(runs: dict[str, list[dict]]) -> list[str]:
    """Lines: medians of the processes' medians, the range of seconds, and the ratios to the first peer's figures."""
    rows, first = [("", "step, s", "lowest", "highest", "warm-up", "times", "CPU s", "times", "GB")], None
    for name, results in runs.items():
        seconds = [median(one["seconds"]) for one in results]
        step, cpu = median(seconds), median(median(one["cpu_seconds"]) for one in results)
        first = first or (step, cpu)
        warm, memory = median(one["warmup"] for one in results), max(one["memory_gb"] for one in results)
        cells = (step, min(seconds), max(seconds), warm, step / first[0], cpu, cpu / first[1], memory)
        rows.append((name, *(f"{cell:.2f}" for cell in cells)))
    return text_table(rows, 10, 9)
