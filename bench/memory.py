"""Memory by calculation from the architecture: `gradient_checkpointing: auto` decides by it, `bench plan` prints it.

Bytes; 1 GB = 1e9 bytes. train.py asks once, at set-up.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from config import Config, ConfigError
from model import head_chunk
from ranks import Ranks, gather


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
        """Parameters in one token's matrix products: all except an untied embedding table, which is only looked up, and
        its unused experts."""
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


def shape_of(hf_config) -> Shape:
    """The numbers of an architecture; parameters are counted on the meta device, where they take no memory."""
    experts = getattr(hf_config, "num_experts", 0)
    kind = hf_config.model_type
    if experts and (kind != "qwen3_moe" or hf_config.mlp_only_layers or hf_config.decoder_sparse_step > 1):
        raise ConfigError(f"model: {kind} mixes experts in a way of its own; of these models only Qwen3's are known")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(hf_config), attn_implementation="sdpa", trust_remote_code=False
        )
    heads = hf_config.num_attention_heads
    return Shape(
        parameters=model.num_parameters(), layers=hf_config.num_hidden_layers, hidden=hf_config.hidden_size,
        intermediate=hf_config.intermediate_size, heads=heads, kv_heads=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads, vocab=hf_config.vocab_size,
        tied=hf_config.tie_word_embeddings,
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        experts=experts, experts_per_token=hf_config.num_experts_per_tok if experts else 0,
        expert_width=hf_config.moe_intermediate_size if experts else 0,
    )  # fmt: skip


def layer_activation_bytes(shape: Shape, width: int = 2, liger: bool = False) -> int:
    """Bytes that one layer keeps of one token for its backward pass, with flash attention (tests/test_plan.py)."""
    h, i, q, kv = shape.hidden, shape.intermediate, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = width if liger else 4 + width  # of a norm: its input, without Liger in float32, and the normalised input
    norms = 2 * (h * (kept + width) + 4)
    if shape.qk_norm:  # the result of these norms is rotated, and attention keeps that
        norms += (q + kv) * kept + 4 * (shape.heads + shape.kv_heads)
    attention = width * (2 * q + 2 * kv) + 4 * shape.heads  # q, k, v, the output; a float32 log-sum-exp per head
    if not shape.experts:
        return norms + attention + width * i * (3 if liger else 4)  # gate, activated gate without Liger, up, product
    # for each expert: the token and the result, the four widths of an MLP, its weight (also in float32), four indices
    each = width * (2 * h + 4 * shape.expert_width + 1) + 4 + 4 * 8
    return norms + attention + 4 * (shape.experts + 1) + shape.experts_per_token * each  # the router's probabilities


def activation_bytes(shape: Shape, tokens: int, checkpointing: bool, width: int = 2, liger: bool = False) -> int:
    """Peak activation memory of a micro-batch in the backward pass, without the LM head.

    With checkpointing each layer keeps its input, and one layer at a time is computed again. Added are the gradients
    that one layer passes back (three widths of the MLP and two hidden widths; per expert, both) and the last norm.
    """
    h, k = shape.hidden, shape.experts_per_token
    layer = layer_activation_bytes(shape, width, liger)
    kept = shape.layers * width * h + layer if checkpointing else shape.layers * layer
    inner = k * (3 * shape.expert_width + 2 * h) if shape.experts else 3 * shape.intermediate
    return tokens * (kept + width * (inner + 2 * h) + h * (4 + 3 * width))


def head_bytes(shape: Shape, width: int = 2, chunk: int = 1024) -> int:
    """Peak of ops.token_logprobs, in its backward pass: two float32 logits and one in `width` per entry of a chunk, and
    the head's gradient in float32 and in `width`."""
    return chunk * shape.vocab * (2 * 4 + width) + shape.table * (4 + width)


def gathered_bytes(shape: Shape, width: int = 2) -> int:
    """What FSDP holds unsharded at once: tables and two layers, the gradients of tables and one layer, and the float32
    copies of these gradients that the reduction reads."""
    root = shape.table * (1 if shape.tied else 2) + shape.hidden
    return root * (2 * width + 4) + shape.layer * (3 * width + 4)


def value_bytes(config: Config) -> int:
    """Bytes of one number in config.dtype."""
    return 4 if config.dtype == "float32" else 2


def gpu_memory(shape: Shape, config: Config, gpus: int) -> dict[str, dict[str, float]]:
    """Bytes on each GPU by part, `rollouts` without the sampler's cache and `training`. gpus: those of a node.

    Training adds all parts up, and some of them are never live together. With offload, masters, gradients and Adam are
    in host memory. config must have its gradient_checkpointing decided.
    """
    n, width, tokens = shape.parameters, value_bytes(config), config.tokens_per_micro_batch
    rollouts = {"replica": width * n}
    if not config.offload:
        rollouts |= {"float32 masters": 4 * n / gpus, "Adam": 8 * n / gpus}
    from methods import needs_reference  # here: methods.py imports this file

    if needs_reference(config):
        rollouts["second copy"] = 4 * n / gpus
    rollouts["CUDA context, NCCL (assumed)"] = 1e9
    training = rollouts | ({} if config.offload else {"gradients": 4 * n / gpus})
    training |= {
        "gathered weights": gathered_bytes(shape, width),
        "activations": activation_bytes(shape, tokens, config.gradient_checkpointing, width, config.liger),
        "log-prob head": head_bytes(shape, width, head_chunk(config)),
    }
    return {"rollouts": rollouts, "training": training}


def must_recompute(shape: Shape, config: Config, gpus: int, memory: float) -> bool:
    """config.gradient_checkpointing, where `auto` recomputes only if stored activations would not fit nine tenths of
    `memory` bytes; the last tenth is for the allocator's fragments."""
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing
    stored = gpu_memory(shape, replace(config, gradient_checkpointing=False), gpus)
    return sum(stored["training"].values()) > 0.9 * memory


def decide_checkpointing(hf_config, config: Config, ranks: Ranks) -> Config:
    """The config with `auto` decided for the smallest GPU, or for a rank's share of free memory on a CPU; every rank
    calls it before the model is wrapped."""
    if config.gradient_checkpointing != "auto":
        return config
    smallest, cuda = min(gather([memory_of(ranks)])), ranks.device.type == "cuda"
    asked = replace(config, liger=config.liger and cuda)
    per_node = ranks.per_node or ranks.world
    recompute = smallest < math.inf and must_recompute(shape_of(hf_config), asked, per_node, smallest)
    return replace(config, gradient_checkpointing=recompute)


def memory_of(ranks: Ranks) -> float:
    """Bytes of this rank's GPU; on a CPU its share of what is free, infinite where the system does not say."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    return free_memory() / (ranks.per_node or ranks.world)


def free_memory() -> float:
    """Bytes of host memory that are free; infinite where the system does not say."""
    told = Path("/proc/meminfo")
    free = re.search(r"MemAvailable: *(\d+) kB", told.read_text()) if told.exists() else None
    return int(free[1]) * 1024 if free else math.inf


def memory_warnings(hf_config, config: Config, ranks: Ranks) -> list[str]:
    """A line for rollouts and for training if by calculation they need more memory than this rank's GPU has. config
    must have its gradient_checkpointing decided."""
    if ranks.device.type != "cuda":  # any model will do then, also one whose shape is not known
        return []
    memory = memory_of(ranks)
    needs = gpu_memory(shape_of(hf_config), config, ranks.per_node or ranks.world)
    return [
        f"WARNING: this GPU has {memory / 1e9:.0f} GB; {moment} would take {sum(parts.values()) / 1e9:.0f} by "
        "calculation, the cache aside. `python -m bench plan` says for what, and which key to change"
        for moment, parts in needs.items() if sum(parts.values()) > memory
    ]  # fmt: skip
