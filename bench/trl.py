"""The same step through TRL's GRPOTrainer, beside ours.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -r requirements.txt trl==1.16.0
    .venv-trl/bin/python -m bench trl configs/tiny.yaml max_prediction_tokens=24 [key=value ...]

A step is the config's prediction phase, every response of exactly max_prediction_tokens, and one optimizer step on it,
with the same weights and micro-batches for all. On a GPU: model=FOLDER.
"""

import gzip
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from bench.plan import phases
from bench.step import make_run, step_seconds, time_steps
from config import Config, read_config
from metrics import peak_memory_gb
from model import load_replica, load_tokenizer
from prompts import PREDICT_PROMPT
from ranks import start_ranks
from rollout import make_sampler


STEPS = 4  # the first is the warm-up


def peer_prompts(config: Config) -> list[str]:
    """The prompts of a step, each on an article of the mini-wiki, about 30 words."""
    template, (_, count, *_) = config.predict_prompt or PREDICT_PROMPT, phases(config)[-1]
    with gzip.open(Path(__file__).parent.parent / "assets/tiny_wiki.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [template.replace("{passage}", json.loads(next(lines))["text"]) for _ in range(count)]


def our_steps(config: Config) -> list[float]:
    """Seconds of each step of train.py, on one rank."""
    ranks = start_ranks()
    run = make_run(make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks))
    prompts = [run.sampler.tokenizer(text).input_ids for text in peer_prompts(config)]
    lengths = [[config.max_prediction_tokens] * config.predictions_per_mask] * len(prompts)
    return [step_seconds(row)["step"] for row in time_steps(run, {"predict": (prompts, lengths)}, STEPS - 1)]


def trl_steps(config: Config, paged: bool) -> list[float]:
    """Seconds of each step of GRPOTrainer, set to ours: no KL term, no recomputation of old log-probs, one update per
    batch. paged: continuous batching (with bfloat16 its weights then stay bfloat16); else `generate`, the default."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, prompts = load_tokenizer(config), peer_prompts(config)
    tokens, count = config.max_prediction_tokens, config.predictions_per_mask
    # padded rows in a micro-batch: as many as its tokens allow and as divide a step
    longest, total = max(map(len, tokenizer(prompts).input_ids)), len(prompts) * count
    room = max(1, config.tokens_per_micro_batch // (longest + tokens))
    rows = max(rows for rows in range(1, total + 1) if total % rows == 0 and rows <= room)
    model = AutoModelForCausalLM.from_pretrained(
        config.model, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer.padding_side = "left"
    # TRL has no other way to equal lengths: the id of this end-of-sequence is beyond the model's vocabulary
    tokenizer.add_special_tokens({"eos_token": "<never sampled>"})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    lengths, marks = [], []

    def reward(completion_ids, **_) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(number % 2) for number in range(len(completion_ids))]

    def mark(*_, **__) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    class Timer(TrainerCallback):
        on_step_begin = on_step_end = staticmethod(mark)

    arguments = GRPOConfig(
        output_dir="runs/bench/trl", max_steps=STEPS, per_device_train_batch_size=rows,
        gradient_accumulation_steps=total // rows, num_generations=count, max_completion_length=tokens,
        temperature=config.temperature, top_p=1.0, top_k=0, beta=0.0,
        num_iterations=1, epsilon=config.clip_low, epsilon_high=config.clip_high, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm, learning_rate=config.learning_rate, lr_scheduler_type="constant",
        gradient_checkpointing=config.gradient_checkpointing, bf16=config.dtype == "bfloat16", report_to="none",
        use_cpu=not torch.cuda.is_available(), shuffle_dataset=False, save_strategy="no", disable_tqdm=True,
        use_transformers_continuous_batching=paged,
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": text} for text in prompts])
    GRPOTrainer(model, reward, arguments, dataset, processing_class=tokenizer, callbacks=[Timer()]).train()
    if lengths != [tokens] * total * STEPS:
        raise RuntimeError(f"TRL made {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens")
    return [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]


TRAINERS = {
    "ours": our_steps,
    "TRL, generate": partial(trl_steps, paged=False),
    "TRL, paged": partial(trl_steps, paged=True),
}


def measure(name: str, config: Config) -> tuple[list[float], float]:
    """(seconds of each step, the warm-up first; largest memory in GB) of a trainer, on one GPU or CPU thread."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # TRL would use all
    torch.set_num_threads(1)
    return TRAINERS[name](config), peak_memory_gb()


def compare_trainers(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word."""
    config = read_config(words)
    print(f"{'':14}{'step, s':>9}{'lowest':>9}{'highest':>9}{'warm-up':>9}{'times':>9}{'GB':>9}")
    first = None
    for name in TRAINERS:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            (warmup, *seconds), memory = process.submit(measure, name, config).result()
        step = median(seconds)
        first = first or step
        cells = (step, min(seconds), max(seconds), warmup, step / first, memory)
        print(f"{name:14}" + "".join(f"{cell:9.2f}" for cell in cells), flush=True)
