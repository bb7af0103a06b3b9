"""Limits: what a GPU can do, what a model costs it, and so the least time of a step, from data sheets and lengths.

A decoded token cannot come before all weights and its response's keys and values were read; training cannot beat its
multiplications. bench.py divides what it measures by these, plan.py adds them up. Arithmetic only: nothing here loads
torch. Of a mixture of experts a token is multiplied with a few; routing is taken to be even. Decimal units (1 GB = 1e9
bytes).
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass
from statistics import fmean

from config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A card, by its data sheet."""

    name: str
    flops: float
    """bfloat16 with float32 accumulation, dense, FLOP/s."""
    bandwidth: float
    """Of its memory, bytes/s."""
    memory: float
    """Bytes."""


# Data sheets print tensor FLOPs with sparsity: halved here. Sources: NVIDIA's data sheets of H100, H200, A100, L40S and
# DGX B200 (its eight GPUs' totals divided by eight); the white papers of the Ada and GA102 architectures for the 4090
# and 3090, rows "BF16 with FP32 accumulate". The names are those that torch.cuda.get_device_name() gives.
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


@dataclass(frozen=True)
class Shape:
    """The numbers of an architecture that cost anything."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """One table serves as embedding and head."""
    qk_norm: bool = False
    """Queries and keys are normalised per head (Qwen3)."""
    experts: int = 0
    """Of each layer's MLP; 0: dense. Then `intermediate` is not used."""
    experts_per_token: int = 0
    expert_width: int = 0
    """`intermediate` of one expert."""

    @property
    def table(self) -> int:
        """Parameters of one vocabulary table."""
        return self.vocab * self.hidden

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: all but an embedding of its own, where rows are looked up, and
        the experts that it is not sent to."""
        return self.read(1)

    def read(self, tokens: int) -> int:
        """Parameters that a step of so many tokens needs. With even routing an expert is idle with probability
        (1 - k / E)^tokens: of 128 experts, 8 for a token, 64 tokens leave two."""
        idle = self.experts * (1 - self.experts_per_token / self.experts) ** tokens if self.experts else 0.0
        unused = self.layers * idle * 3 * self.hidden * self.expert_width
        return self.parameters - (0 if self.tied else self.table) - round(unused)

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return (self.parameters - self.table * (1 if self.tied else 2) - self.hidden) // self.layers


def response_lengths(count: int, mean: float, cap: int, sigma: float = 0.6, seed: int = 0) -> list[int]:
    """`count` response lengths, tokens: lognormal with this sigma, cut at `cap`, scaled so that their mean is `mean`.

    sigma 0: all equal. The scale is found by bisection, because the cut takes from the mean what it cuts off.
    Raises ConfigError if mean is below 1 or above cap.
    """
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


# ---- time: FLOPs and bytes


def attention_flops(shape: Shape) -> int:
    """Of one query with one key-value pair, all layers: 2 for the score and 2 for the sum, per head and dimension."""
    return 4 * shape.layers * shape.heads * shape.head_dim


def forward_flops(shape: Shape, lengths: list[int]) -> float:
    """One causal pass over sequences of these tokens: 2 N T for the weights, half of T^2 pairs for attention."""
    return sum(2.0 * shape.multiplied * tokens + attention_flops(shape) * tokens**2 / 2 for tokens in lengths)


Bundle = tuple[int, list[int]]
"""Tokens of a prompt, and of the responses that are computed with it, the prompt once: grpo.bundle."""


def bundle_tokens(bundles: list[Bundle]) -> int:
    """That the update computes."""
    return sum(prompt + sum(responses) for prompt, responses in bundles)


def train_flops(shape: Shape, bundles: list[Bundle]) -> float:
    """Forward and backward, 6 N T + 6 L H d T^2 where each response has its prompt to itself; what checkpointing
    computes again is not counted. A response's queries meet its prompt's keys, its prompt's queries only once."""
    prompts = [prompt for prompt, _ in bundles]
    beyond = [(prompt, one) for prompt, responses in bundles for one in responses]
    pairs = sum(((prompt + one) ** 2 - prompt**2) / 2 for prompt, one in beyond)
    weights = 2.0 * shape.multiplied * sum(one for _, one in beyond)
    return 3 * (forward_flops(shape, prompts) + weights + attention_flops(shape) * pairs)


def mfu(shape: Shape, bundles: list[Bundle], seconds: float, gpus: int, gpu: Gpu) -> float:
    """Model FLOPs utilisation: the FLOPs of training on these bundles over what the GPUs could do in that time."""
    return train_flops(shape, bundles) / (seconds * gpus * gpu.flops)


def cache_bytes(shape: Shape, width: int = 2) -> int:
    """Of one token in the sampler's cache: a key and a value per layer and key-value head, `width` bytes a number."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width


def decode_seconds(
    shape: Shape, gpu: Gpu, prompt: int, lengths: list[int], slots: int, width: int = 2
) -> float:  # fmt: skip
    """The least time in which one GPU decodes responses of these lengths, `slots` at a time, the next in line as soon
    as one ends.

    Each decode step gives every running response one token and reads all weights once and every running response's
    keys and values, its prompt's included; it takes the longer of that and its multiplications. The first step of a
    response reads `prompt` tokens, the last prompt + length - 1.
    """
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
        multiplying = (2 * shape.multiplied * len(running) + attention_flops(shape) * reads) / gpu.flops
        seconds += steps * max(from_memory, multiplying)
        now += steps
        context += len(running) * steps
        while running and running[0][0] == now:
            context -= prompt + heapq.heappop(running)[1]
    return seconds


def slots_for(room: int, prompt: int, lengths: list[int], at_once: int) -> int:
    """How many responses run together: at most `at_once`, and what a cache of `room` tokens holds of them.

    A running response has on average, over the time that it runs, its prompt and half its length; a long one runs
    longer, so lengths weigh by themselves.
    """
    typical = prompt + sum(length**2 for length in lengths) / (2 * sum(lengths))
    return max(1, min(at_once, int(room / typical)))


def decode_limit(
    shape: Shape, gpu: Gpu, prompt: int, groups: list[list[int]], gpus: int, slots: int, width: int = 2
) -> float:  # fmt: skip
    """Of a phase: the rank with the most to do decides. groups: response lengths per prompt; rank r samples
    groups[r::gpus]."""
    shares = [[length for group in groups[rank::gpus] for length in group] for rank in range(gpus)]
    return max(decode_seconds(shape, gpu, prompt, share, slots, width) for share in shares)
