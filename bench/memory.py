"""Memory in bytes, calculated: `gradient_checkpointing: auto` decides by it at set-up, `bench plan` prints it."""

import copy
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from config import Config, ConfigError
from methods import needs_reference
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
    tied: bool  # one table serves as embedding and head
    qk_norm: bool = False  # queries and keys are normalised per head (Qwen3)
    experts: int = 0  # of each layer's MLP; 0: dense. Then `intermediate` is not used
    experts_per_token: int = 0
    expert_width: int = 0  # `intermediate` of one expert

    def read(self, tokens: int) -> int:
        """Parameters in the matrix products of a pass over so many tokens: all except an untied embedding table and
        idle experts. With even routing, 64 tokens leave 128 * (1 - 8 / 128)^64 = 2 of 128 experts idle."""
        idle = self.experts * (1 - self.experts_per_token / self.experts) ** tokens if self.experts else 0.0
        unused = self.layers * idle * 3 * self.hidden * self.expert_width
        return self.parameters - (0 if self.tied else self.vocab * self.hidden) - round(unused)


def shape_of(hf_config) -> Shape:
    """The numbers of a transformers config; parameters are counted on the meta device, where they take no memory.
    Raises ConfigError for a mixture of experts other than Qwen3's."""
    c, experts, heads = hf_config, getattr(hf_config, "num_experts", 0), hf_config.num_attention_heads
    if experts and (c.model_type != "qwen3_moe" or c.mlp_only_layers or c.decoder_sparse_step > 1):
        raise ConfigError(f"model: {c.model_type} mixes experts in a way of its own; of these only Qwen3's are known")
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(copy.deepcopy(c), attn_implementation="sdpa", trust_remote_code=False)
    return Shape(
        parameters=net.num_parameters(), layers=c.num_hidden_layers, hidden=c.hidden_size, heads=heads,
        intermediate=c.intermediate_size, kv_heads=c.num_key_value_heads, vocab=c.vocab_size,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads, tied=c.tie_word_embeddings, experts=experts,
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in net.named_parameters()),
        experts_per_token=getattr(c, "num_experts_per_tok", 0), expert_width=getattr(c, "moe_intermediate_size", 0),
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
    """Peak activation memory of a micro-batch in the backward pass, without the LM head. With checkpointing each layer
    keeps its input, and one at a time is computed again. Added are the last norm and the gradients inside a layer:
    three widths of the MLP and two hidden widths; per expert, both."""
    h, k = shape.hidden, shape.experts_per_token
    layer = layer_activation_bytes(shape, width, liger)
    kept = shape.layers * width * h + layer if checkpointing else shape.layers * layer
    inner = k * (3 * shape.expert_width + 2 * h) if shape.experts else 3 * shape.intermediate
    return tokens * (kept + width * (inner + 2 * h) + h * (4 + 3 * width))


def value_bytes(config: Config) -> int:
    """Bytes of one number in config.dtype."""
    return 4 if config.dtype == "float32" else 2


def gpu_memory(shape: Shape, config: Config, gpus: int) -> dict[str, dict[str, float]]:
    """Bytes on each GPU by part, `rollouts` without the sampler's cache and `training`, whose parts are not all live at
    once. gpus: those of a node. config must have its gradient_checkpointing decided."""
    n, table, width = shape.parameters, shape.vocab * shape.hidden, value_bytes(config)
    rollouts = {"replica": width * n}
    if not config.offload:  # else these and the gradients are in host memory
        rollouts |= {"float32 masters": 4 * n / gpus, "Adam": 8 * n / gpus}
    if needs_reference(config):
        rollouts["second copy"] = 4 * n / gpus
    rollouts["CUDA context, NCCL (assumed)"] = 1e9
    training = rollouts | ({} if config.offload else {"gradients": 4 * n / gpus})
    # FSDP holds unsharded: tables and two layers, the gradients of tables and one layer, these gradients in float32
    root = table * (1 if shape.tied else 2) + shape.hidden
    training["gathered weights"] = root * (2 * width + 4) + (n - root) // shape.layers * (3 * width + 4)
    recompute, tokens = config.gradient_checkpointing, config.tokens_per_micro_batch
    training["activations"] = activation_bytes(shape, tokens, recompute, width, config.liger)
    # ops.token_logprobs backward: two float32 logits and one of `width` per entry of a chunk; the head's gradient twice
    training["log-prob head"] = head_chunk(config) * shape.vocab * (2 * 4 + width) + table * (4 + width)
    return {"rollouts": rollouts, "training": training}


def decided(shape: Shape, config: Config, gpus: int, memory: float) -> Config:
    """The config with gradient_checkpointing=auto decided: layers are recomputed only if stored activations would not
    fit nine tenths of `memory` bytes. The last tenth is for the allocator's fragments."""
    if config.gradient_checkpointing != "auto":
        return config
    stored = replace(config, gradient_checkpointing=False)
    need = sum(gpu_memory(shape, stored, gpus)["training"].values())
    return stored if need <= 0.9 * memory else replace(config, gradient_checkpointing=True)


def decide_checkpointing(hf_config, config: Config, ranks: Ranks) -> Config:
    """The config with `auto` decided for the smallest GPU, or for a rank's share of free memory on a CPU; every rank
    calls it before the model is wrapped."""
    if config.gradient_checkpointing != "auto":
        return config
    smallest = min(gather([memory_of(ranks)]))
    asked = replace(config, liger=config.liger and ranks.device.type == "cuda")
    known = decided(shape_of(hf_config), asked, ranks.per_node or ranks.world, smallest)
    return replace(config, gradient_checkpointing=known.gradient_checkpointing)


def memory_of(ranks: Ranks) -> float:
    """Bytes of this rank's GPU; on a CPU its share of what is free, infinite where the system does not say."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    source = Path("/proc/meminfo")
    free = re.search(r"MemAvailable: *(\d+) kB", source.read_text()) if source.exists() else None
    return int(free[1]) * 1024 / (ranks.per_node or ranks.world) if free else math.inf


def memory_warnings(hf_config, config: Config, ranks: Ranks) -> list[str]:
    """A line for rollouts and for training if by calculation they need more memory than this rank's GPU has."""
    if ranks.device.type != "cuda":  # any model will do then, also one whose shape is not known
        return []
    memory = memory_of(ranks)
    needs = gpu_memory(shape_of(hf_config), config, ranks.per_node or ranks.world)
    return [
        f"WARNING: this GPU has {memory / 1e9:.0f} GB; {moment} would take {sum(parts.values()) / 1e9:.0f} by "
        "calculation, the cache aside. `python -m bench plan` says for what, and which key to change"
        for moment, parts in needs.items() if sum(parts.values()) > memory
    ]  # fmt: skip
