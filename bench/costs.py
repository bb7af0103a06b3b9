"""What a GPU can do and what a model costs it: the least time that decoding and training can take.

The benchmark divides these limits by what it measures; the plan adds them up. In a mixture of experts a token is
multiplied with a few experts; routing is taken to be even. Decimal units (1 GB = 1e9 bytes).
"""

from __future__ import annotations

import heapq
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from bench.memory import Shape, free_memory, gpu_memory, value_bytes
from config import Config, ConfigError


@dataclass(frozen=True)
class Gpu:
    """The data sheet of a card."""

    name: str  # as torch.cuda.get_device_name() gives it
    flops: float  # FLOP/s: bfloat16 with float32 accumulation, dense
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes


# NVIDIA's data sheets of H100, H200, A100, L40S and DGX B200 (an eighth of it); they print tensor FLOPs with sparsity,
# halved here. RTX: the white papers of the Ada and GA102 architectures, rows "BF16 with FP32 accumulate".
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989.5e12, 3.35e12, 80e9),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 756.5e12, 2.0e12, 80e9),
    "h200": Gpu("NVIDIA H200", 989.5e12, 4.8e12, 141e9),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12, 40e9),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12, 80e9),
    "a100-80-pcie": Gpu("NVIDIA A100 80GB PCIe", 312e12, 1.935e12, 80e9),
    "l40s": Gpu("NVIDIA L40S", 362e12, 864e9, 48e9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165.2e12, 1.008e12, 24e9),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 71e12, 936e9, 24e9),
    "b200": Gpu("NVIDIA B200", 2250e12, 8.0e12, 180e9),
}


def measure_cpu(ranks: int) -> Gpu:
    """What each of `ranks` ranks has of this machine's CPU, measured in a second with all cores: float32 products of
    matrices of 1,024 rows, copies of 256 MB; memory that is free, infinite where the system does not say."""

    def fastest(work: Callable) -> float:
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    one, values = torch.ones(1024, 1024), torch.ones(64 * 2**20)
    other = torch.empty_like(values)
    flops, rate = 2 * 1024**3 / fastest(lambda: one @ one), 8 * values.numel() / fastest(lambda: other.copy_(values))
    return Gpu("rank on this CPU", flops / ranks, rate / ranks, free_memory() / ranks)


REQUESTS = 512  # that rollout.py lets run together on a GPU, unless config.max_requests says otherwise


@dataclass(frozen=True)
class Bundle:
    """Lengths in tokens of a prompt and of the responses that are trained with it; the prompt is computed once."""

    prompt: int
    responses: list[int]


def bundle_tokens(bundles: list[Bundle]) -> int:
    """Tokens that the update computes."""
    return sum(one.prompt + sum(one.responses) for one in bundles)


def response_lengths(count: int, mean: float, cap: int, sigma: float = 0.6, seed: int = 0) -> list[int]:
    """`count` lengths in tokens: lognormal with this sigma (0: all equal), cut at `cap`, scaled by bisection so that
    their mean is `mean`. Raises ConfigError if mean is below 1 or above cap."""
    if not 1 <= mean <= cap:
        raise ConfigError(f"mean_response={mean}: must be between 1 and the longest response, {cap} tokens")
    rng = random.Random(seed)
    draws = [rng.lognormvariate(0.0, sigma) for _ in range(count)]

    def cut(scale: float) -> list[int]:
        return [min(cap, max(1, round(scale * draw))) for draw in draws]

    low, high = 0.0, cap / min(draws)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fmean(cut(middle)) < mean else (low, middle)
    return cut(high)


# ---- FLOPs of training


def forward_flops(shape: Shape, lengths: list[int]) -> float:
    """One causal pass over sequences of these lengths: 2 N T for the weights, half of T^2 pairs for attention."""
    return sum(2.0 * shape.multiplied * tokens + pair_flops(shape) * tokens**2 / 2 for tokens in lengths)


def pair_flops(shape: Shape) -> int:
    """Attention of one query to one key, all layers: 2 FLOPs for the score and 2 for the sum per head and dimension."""
    return 4 * shape.layers * shape.heads * shape.head_dim


def train_flops(shape: Shape, bundles: list[Bundle]) -> float:
    """Forward and backward, without recomputation: 6 N T + 6 L H d T^2 where each response has a prompt of its own.
    A prompt with several responses is computed once, and each response attends to it."""
    alone = [(one.prompt, response) for one in bundles for response in one.responses]
    pairs = sum(((prompt + response) ** 2 - prompt**2) / 2 for prompt, response in alone)
    weights = 2.0 * shape.multiplied * sum(response for _, response in alone)
    return 3 * (forward_flops(shape, [one.prompt for one in bundles]) + weights + pair_flops(shape) * pairs)


def mfu(shape: Shape, bundles: list[Bundle], seconds: float, gpus: int, gpu: Gpu) -> float:
    """Model FLOPs utilisation: the FLOPs of training over those that the GPUs could do in that time."""
    return train_flops(shape, bundles) / (seconds * gpus * gpu.flops)


# ---- decoding and its cache


def cache_bytes(shape: Shape, width: int = 2) -> int:
    """Bytes of one token in the sampler's cache: a key and a value per layer and key-value head."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width


def decode_seconds(shape: Shape, gpu: Gpu, prompt: int, lengths: list[int], slots: int, width: int = 2) -> float:
    """Least time in which one GPU decodes responses of these lengths, `slots` at a time, each followed by the next. A
    decode step gives every running response one token. It takes as long as its reads (all weights once; keys and values
    of the running responses and their prompts) or its multiplications, whichever is longer."""
    waiting, running = deque(lengths), []  # running: a heap of (decode step at which it ends, length)
    now, context, seconds = 0, 0, 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            length = waiting.popleft()
            heapq.heappush(running, (now + length, length))
            context += prompt
        steps = running[0][0] - now  # nothing changes until the first of them ends
        reads = context + len(running) * (steps - 1) / 2  # mean over these steps
        from_memory = (width * shape.read(len(running)) + reads * cache_bytes(shape, width)) / gpu.bandwidth
        multiplying = (2 * shape.multiplied * len(running) + pair_flops(shape) * reads) / gpu.flops
        seconds += steps * max(from_memory, multiplying)
        now += steps
        context += len(running) * steps
        while running and running[0][0] == now:
            context -= prompt + heapq.heappop(running)[1]
    return seconds


def decode_limit(
    shape: Shape, gpu: Gpu, prompt: int, groups: list[list[int]], gpus: int, slots: int, width: int = 2
) -> float:  # fmt: skip
    """Least time of a phase: that of the slowest rank. groups: lengths per prompt; rank r samples groups[r::gpus]."""
    shares = [[length for group in groups[rank::gpus] for length in group] for rank in range(gpus)]
    return max(decode_seconds(shape, gpu, prompt, share, slots, width) for share in shares)


def slots_for(room: int, prompt: int, lengths: list[int], at_once: int) -> int:
    """How many responses run together: what a cache of `room` tokens holds, but at most `at_once`. A response has on
    average its prompt and half its length in the cache; a long one runs longer, so lengths are weighted by length."""
    typical = prompt + sum(length**2 for length in lengths) / (2 * sum(lengths))
    return max(1, min(at_once, int(room / typical)))


def cache_room(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> int:
    """Tokens in the sampler's cache on each GPU: its share of the free memory, less the logits of one decode step. The
    sampler also sets aside one layer's worth per token to read from, and 16 bytes of indices."""
    width = value_bytes(config)
    free = config.cache_memory * (gpu.memory - sum(gpu_memory(shape, config, gpus)["rollouts"].values()))
    free -= (config.max_requests or REQUESTS) * (4 * shape.vocab + width * shape.hidden)
    each = cache_bytes(shape, width)
    return max(0, int(free / (each + each / shape.layers + 16)))


# ---- architectures

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "bos_token_id": 151643, "eos_token_id": 151643}
_QWEN3 |= {"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_LLAMA = {"vocab_size": 49152, "max_position_embeddings": 8192}
_FAMILIES = {"llama": _LLAMA, "smollm3": {"vocab_size": 128256}, "qwen3": _QWEN3, "qwen3_moe": _QWEN3 | _EXPERTS}
_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
# The sizes of each model of our configs, from the config.json of its hub page
ARCHITECTURES = {
    "HuggingFaceTB/SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, True),
    "HuggingFaceTB/SmolLM3-3B-Base": ("smollm3", 2048, 11008, 36, 16, 4, True),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", 1024, 3072, 28, 16, 8, True),
    "Qwen/Qwen3-4B-Base": ("qwen3", 2560, 9728, 36, 32, 8, True),
    "Qwen/Qwen3-8B-Base": ("qwen3", 4096, 12288, 36, 32, 8, False),
    "Qwen/Qwen3-30B-A3B-Base": ("qwen3_moe", 2048, 6144, 48, 32, 4, False),
}


def architecture(name: str):
    """The transformers config of a model: from its own config.json if that is on disk, else from ARCHITECTURES. Raises
    ConfigError for a model in neither."""
    folder = Path(name).expanduser()
    cached = folder / "config.json"
    if not cached.is_file():  # a folder without one is no hub name
        cached = None if folder.exists() else try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str | Path):
        return AutoConfig.from_pretrained(Path(cached).parent, trust_remote_code=False)
    if name not in ARCHITECTURES:
        raise ConfigError(f"model={name!r}: no config.json at hand, and not one of {', '.join(ARCHITECTURES)}")
    sizes = dict(zip(_SIZES, ARCHITECTURES[name], strict=True))
    return AutoConfig.for_model(**_FAMILIES[sizes["model_type"]], **sizes)
