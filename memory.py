"""What a run holds on each GPU, part by part and moment by moment; and whether activations are stored or recomputed.

Arithmetic from the architecture (limits.Shape) and the config, checked on a CPU against what autograd and the optimizer
allocate (tests/test_plan.py). plan.py prints it; a run with `gradient_checkpointing: auto` decides by it. Leaves out
what the allocator loses in fragments. Bytes; decimal units (1 GB = 1e9 bytes).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from config import Config
from limits import Gpu, Shape, cache_bytes
from model import Ranks, gather
from reference_model import needs_reference
from shapes import shape_of


def layer_activation_bytes(shape: Shape, width: int = 2, liger: bool = False) -> int:
    """What one layer keeps of one token for its backward pass, flash attention.

    Plain transformers: each of two norms keeps its input as float32, the normalised and the scaled result; attention
    keeps q, k, v, its output and a float32 log-sum-exp per head; the MLP keeps gate, activated gate, up and their
    product. Liger's norms keep input and result, its MLP gate, up and product. Experts keep for each that a token is
    sent to its copy of it, the same four, the result and how it got there; once, the router's probabilities and their
    sum. Checked on the CPU, tests/test_plan.py.
    """
    h, i, q, kv = shape.hidden, shape.intermediate, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = width if liger else 4 + width  # of a norm, per number, without the result that the next product keeps
    norms = 2 * (h * (kept + width) + 4)
    if shape.qk_norm:  # the result is rotated, and attention keeps that
        norms += (q + kv) * kept + 4 * (shape.heads + shape.kv_heads)
    attention = width * (2 * q + 2 * kv) + 4 * shape.heads
    if not shape.experts:
        return norms + attention + width * i * (3 if liger else 4)
    each = width * (2 * h + 4 * shape.expert_width + 1) + 4 + 4 * 8  # its weight, also in float32; four indices
    return norms + attention + 4 * (shape.experts + 1) + shape.experts_per_token * each


def activation_bytes(shape: Shape, tokens: int, checkpointing: bool, width: int = 2, liger: bool = False) -> int:
    """Of a micro-batch of `tokens`, at the worst moment of its backward pass, the head aside.

    With checkpointing each layer keeps its input and one layer at a time is computed again. On top: the gradients that
    one layer passes back, taken as three of the MLP's width and two of the hidden width (of experts: both for each that
    a token is sent to), and the last norm.
    """
    h, k = shape.hidden, shape.experts_per_token
    layer = layer_activation_bytes(shape, width, liger)
    kept = shape.layers * width * h + layer if checkpointing else shape.layers * layer
    inner = k * (3 * shape.expert_width + 2 * h) if shape.experts else 3 * shape.intermediate
    moving = width * (inner + 2 * h) + h * (4 + 3 * width)
    return tokens * (kept + moving)


def head_bytes(shape: Shape, width: int = 2, chunk: int = 1024) -> int:
    """ops.token_logprobs: four float32 logits of a chunk and one in `width` in the forward pass (entropy); in the
    backward pass one float32, two in `width`, and two float32 sums and one in `width` of the head's gradient."""
    forward = chunk * shape.vocab * (4 * 4 + width)
    backward = chunk * shape.vocab * (4 + 2 * width) + shape.table * (2 * 4 + width)
    return max(forward, backward)


def gathered_bytes(shape: Shape, width: int = 2) -> int:
    """What FSDP holds whole at once: tables and two layers, the gradients of tables and one layer, and float32 copies
    of these on their way into the reduction."""
    root = shape.table * (1 if shape.tied else 2) + shape.hidden
    return root * (2 * width + 4) + shape.layer * (3 * width + 4)


CONTEXT = 1_000_000_000
"""CUDA context, library workspaces, NCCL: assumed, bytes."""
_CONTEXT = "CUDA context, NCCL (assumed)"


def value_bytes(config: Config) -> int:
    """Of one number in config.dtype."""
    return 4 if config.dtype == "float32" else 2


def standing_bytes(shape: Shape, config: Config, gpus: int) -> dict[str, float]:
    """What stays on each GPU through the whole run, by part; with offload these take turns."""
    n = shape.parameters
    parts = {"replica": value_bytes(config) * n, "float32 masters": 4 * n / gpus, "Adam": 8 * n / gpus}
    if needs_reference(config):
        parts["second copy"] = 4 * n / gpus
    return parts | {_CONTEXT: CONTEXT}


def training_bytes(shape: Shape, config: Config, gpus: int) -> dict[str, float]:
    """What an update adds to it, by part. gradient_checkpointing must be decided."""
    width, tokens = value_bytes(config), config.tokens_per_micro_batch
    return {
        "gradients": 4 * shape.parameters / gpus,
        "gathered weights": gathered_bytes(shape, width),
        "activations": activation_bytes(shape, tokens, config.gradient_checkpointing, width, config.liger),
        "log-prob head": head_bytes(shape, width),
    }


TURNS = {
    "rollouts": ("replica",),
    "backward": ("float32 masters", "gradients", "gathered weights", "activations", "log-prob head"),
    "optimizer": ("float32 masters", "gradients", "Adam"),
    "set-up": ("replica", "float32 masters"),
}
"""With offload: what is on the GPU in the moments of a run that may be its largest."""


def moments(shape: Shape, config: Config, gpus: int) -> dict[str, dict[str, float]]:
    """Of the moments that may be a run's largest: bytes on each GPU by part, the sampler's cache aside.

    Without offload there are two, and in `training` all parts are added up, some of which are not live together.
    """
    standing = standing_bytes(shape, config, gpus)
    every = standing | training_bytes(shape, config, gpus)
    if not config.offload:
        return {"rollouts": standing, "training": every}
    return {moment: {part: every[part] for part in (*parts, _CONTEXT)} for moment, parts in TURNS.items()}


def checkpoint_bytes(shape: Shape, config: Config) -> float:
    """On disk: float32 masters, Adam's two moments, rlp's moving average, the model as Hugging Face reads it."""
    return shape.parameters * (12 + 4 * (config.method == "rlp") + value_bytes(config))


def host_bytes(shape: Shape, config: Config) -> float:
    """Of the memory of a node with these GPUs: what waits there with offload, and what a checkpoint is written from."""
    return shape.parameters * 12 * config.offload + (config.save_every > 0) * checkpoint_bytes(shape, config)


def loading_bytes(shape: Shape, config: Config, gpus: int) -> float:
    """Of a node's memory while its ranks load the model."""
    return gpus * value_bytes(config) * shape.parameters


SAFE = 0.9
"""Share of a GPU's memory that `auto` fills by its own calculation; the rest is for the allocator's fragments."""


def checkpointing(shape: Shape, config: Config, gpus: int, memory: float) -> bool:
    """config.gradient_checkpointing, with `auto` decided: recompute only where storing would not fit `memory` bytes."""
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing
    stored = moments(shape, replace(config, gradient_checkpointing=False), gpus)
    return max(sum(parts.values()) for parts in stored.values()) > SAFE * memory


def decide_checkpointing(hf_config, config: Config, ranks: Ranks) -> Config:
    """The config with `auto` decided for the GPUs at hand, before the model is wrapped; every rank calls it, and the
    smallest GPU decides for all. On a CPU layers are stored: time is short there, not memory."""
    if config.gradient_checkpointing != "auto":
        return config
    smallest = min(gather([memory_of(ranks)]))
    recompute = checkpointing(shape_of(hf_config), config, ranks.per_node or ranks.world, smallest)
    return replace(config, gradient_checkpointing=recompute)


def memory_of(ranks: Ranks) -> float:
    """Bytes of this rank's GPU; without one no bound."""
    cuda = ranks.device.type == "cuda"
    return torch.cuda.get_device_properties(ranks.device).total_memory if cuda else math.inf


def memory_warnings(hf_config, config: Config, ranks: Ranks) -> list[str]:
    """A line for each moment of the run that by calculation needs more than this rank's GPU has. config must have its
    gradient_checkpointing decided."""
    memory = memory_of(ranks)
    if memory == math.inf:  # then any model will do, also one whose shape nobody knows
        return []
    needs = moments(shape_of(hf_config), config, ranks.per_node or ranks.world)
    return [
        f"WARNING: this GPU has {memory / 1e9:.0f} GB; {moment} would take {sum(parts.values()) / 1e9:.0f} by "
        "calculation, the cache aside. `python bench.py plan` says for what, and which key to change"
        for moment, parts in needs.items() if sum(parts.values()) > memory
    ]  # fmt: skip


def requests_at_once(config: Config, cuda: bool = True) -> int:
    """How many responses rollout.py lets run together."""
    return config.max_requests or (512 if cuda else 256)


def cache_room(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> int:
    """Tokens in the sampler's cache on each GPU: its share of what is free in rollouts, less the logits of one decode
    step. The sampler sets aside one more layer's worth per token to read from, and 16 bytes of indices."""
    width = value_bytes(config)
    taken = sum(moments(shape, config, gpus)["rollouts"].values())
    free = config.cache_memory * (gpu.memory - taken)
    free -= requests_at_once(config) * (4 * shape.vocab + width * shape.hidden)
    each = cache_bytes(shape, width)
    return max(0, int(free / (each + each / shape.layers + 16)))
