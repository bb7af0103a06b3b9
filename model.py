"""Two copies of one model per rank: a sharded trainer and a plain replica that samples, kept equal by `refresh`.

    policy     FSDP2, float32 master weights sharded over the ranks of a node, computes in config.dtype; its forward
               returns per-token log-probs and entropies instead of logits
    replica    the ordinary Hugging Face model in config.dtype, whole on every rank, no gradient; it generates
    reference  where a method needs it, a second sharded copy: frozen (entropy_token, KL penalty) or a moving average of
               the policy (rlp). Build it before a checkpoint is loaded: then it is the start model, also after a resume

Sampling from the sharded model would put FSDP's collectives into the generation loop, where ranks finish at different
times, and hang. The replica costs 2 bytes a parameter and one all-gather a step.

The last part estimates memory from the architecture, by which `gradient_checkpointing: auto` decides; `python -m bench
plan` prints the same numbers. Bytes; 1 GB = 1e9 bytes.
"""

from __future__ import annotations

import copy
import math
import mmap
import os
import types
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from config import Config, ConfigError
from ops import SHARED, VARLEN, apply_liger, block_table_trouble, choose_attention, token_logprobs
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


DRIVER = Path("/proc/driver/nvidia/version")
disable_progress_bar()  # of loading and saving weights: a line per rank and checkpoint, in the middle of ours
# A hub repository without safetensors would be sent to a converter on the hub, and what comes back loaded
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"


def check_device(config: Config, ranks: Ranks) -> None:
    """Raises ConfigError where the run would work, but not as it is meant, or not at all; RuntimeError for flash-attn
    asked for in vain. Looks at nothing large."""
    dtype = getattr(torch, config.dtype)
    choose_attention(config.attention, ranks.device, dtype)
    if config.dtype == "float32":
        return
    if ranks.device.type == "cuda":
        name, capability = torch.cuda.get_device_name(ranks.device), torch.cuda.get_device_capability(ranks.device)
        if capability < (8, 0):
            raise ConfigError(f"dtype={config.dtype!r}: not on a {name}; it needs an A100, an RTX 30 or newer")
    elif DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        wants = "no CUDA"
        if torch.version.cuda:
            wants = f"CUDA {torch.version.cuda}: an older driver, or a container without it?"
        raise ConfigError(
            f"dtype={config.dtype!r}: there is a GPU, but torch {torch.__version__} cannot use it (built for {wants}); "
            "README, `On a GPU node`. CUDA_VISIBLE_DEVICES= in front of the command runs on the CPU all the same"
        )


def load_tokenizer(config: Config):
    """The model's tokenizer; with a chat template from a file if the config names one. Custom code is refused."""
    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)  # unset, it asks on stdin
    # Passages are measured before they are cut, which is no reason to warn of sequences longer than the model's
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if config.chat_template == "none":
        tokenizer.chat_template = None
    elif config.chat_template != "auto":
        with open(config.chat_template, encoding="utf-8-sig") as file:
            tokenizer.chat_template = file.read()
    return tokenizer


def load_replica(config: Config, ranks: Ranks, architecture=None) -> nn.Module:
    """The Hugging Face model that samples: config.dtype, no gradient, on this rank's device.

    A model is data: safetensors only, no pickle; no custom code; no kernel that its config.json names for fetching.
    architecture: a transformers config; then the weights are random, drawn from config.seed, instead of config.model's.
    Raises RuntimeError for heads that do more than a matrix product, since the chunked log-probs would be wrong.
    """
    check_device(config, ranks)  # before gigabytes are read
    dtype = getattr(torch, config.dtype)
    attention = choose_attention(config.attention, ranks.device, dtype)
    if architecture is None:
        hf_config = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
        hf_config._attn_implementation = "sdpa"
        replica = AutoModelForCausalLM.from_pretrained(
            config.model, config=hf_config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    else:
        torch.manual_seed(config.seed)
        with ranks.device:
            replica = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    use_attention(replica, attention)
    head = replica.get_output_embeddings()
    extras = [key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
              if getattr(replica.config, key, None) not in (None, 1, 1.0)]  # fmt: skip
    if not isinstance(head, nn.Linear) or head.bias is not None or extras:
        raise RuntimeError(f"model={config.model}: its head is not a plain matrix product: {extras or head}")
    replica = replica.to(ranks.device).eval().requires_grad_(False)
    if config.liger and ranks.device.type == "cuda":
        apply_liger(replica)
    return replica


def use_attention(model: nn.Module, name: str) -> None:
    """Set by hand: the constructor would take a name with "flash" for a kernel to fetch."""
    model.config._attn_implementation = name


def decoding(replica: nn.Module) -> str:
    """How a decoding step reads the paged cache: `flash-attn`, `block table`, or `gathered: ` and why not in place."""
    shape = replica.config.get_text_config()
    if shape._attn_implementation != VARLEN:
        return "flash-attn"
    heads = shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    dim = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    trouble = block_table_trouble(replica.device, replica.dtype, heads, kv_heads, dim)
    return f"gathered: {trouble}" if trouble else "block table"


def describe_attention(replica: nn.Module) -> str:
    """What a user is told: the kernels, and how a decoding step reads the cache."""
    return f"attention {replica.config._attn_implementation}, decoding: {decoding(replica)}"


def _policy_forward(
    self, input_ids: Tensor, position_ids: Tensor, predicts: Tensor, targets: Tensor, temperature: float, **attention
):
    """Replaces the causal model's forward, so that FSDP gathers the head's weight around it and logits never exist.

    input_ids, position_ids (1, N) packed; predicts (M,) the positions whose next token is trained, targets (M,) those
    tokens. Returns log-probs (M,) with gradient and entropies (M,), float32.
    """
    decoder = getattr(self, self.base_model_prefix)
    hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention).last_hidden_state[0]
    return token_logprobs(hidden[predicts], self.get_output_embeddings().weight, targets, temperature)


def wrap(hf_config, config: Config, mesh: DeviceMesh, attention: str) -> nn.Module:
    """An empty policy on the meta device, sharded by layer: no memory is taken before `fill`."""
    with torch.device("meta"):
        own = copy.deepcopy(hf_config)
        policy = AutoModelForCausalLM.from_config(
            own, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    use_attention(policy, SHARED[attention] if config.share_prompts else attention)
    if config.liger and mesh.device_type == "cuda":
        apply_liger(policy)
    policy.forward = types.MethodType(_policy_forward, policy)
    assert isinstance(config.gradient_checkpointing, bool), "auto: memory.decide_checkpointing comes first"
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32)
    # Said for the root too: by default it would stay whole after a forward without gradient
    options = {"mesh": mesh, "mp_policy": precision, "reshard_after_forward": True}
    layers = [m for m in policy.modules() if type(m).__name__ in set(policy._no_split_modules or ())]
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)
    return policy


@torch.no_grad()
def fill(policy: nn.Module, replica: nn.Module, device: torch.device) -> nn.Module:
    """Give the policy its float32 masters: each rank cuts its own shards out of its replica; nothing is sent."""
    policy.to_empty(device=device)
    whole = dict(replica.named_parameters())
    for name, shard in policy.named_parameters():
        cut = distribute_tensor(whole[name], shard.device_mesh, shard.placements, src_data_rank=None)
        shard.copy_(cut)  # to float32 as it is cut: a layer of experts made float32 whole would take gigabytes
    buffers = dict(replica.named_buffers())  # rotary frequencies: to_empty left garbage, and no loader would complain
    for name, buffer in policy.named_buffers():
        buffer.copy_(buffers[name])
    return policy.train()


def build_policy(replica: nn.Module, config: Config, ranks: Ranks) -> nn.Module:
    """The trainer's copy of the replica, cut over the ranks of a node; every node holds all of it.

    So a layer is gathered inside a node, and only gradients, cut to a shard, go between nodes (HSDP). Raises
    RuntimeError if nodes differ in their number of ranks.
    """
    per_node = ranks.per_node or ranks.world
    if gather([per_node]) != [per_node] * ranks.world or ranks.world % per_node:
        raise RuntimeError(f"{ranks.world} ranks, {per_node} on this node: every node must have as many")
    nodes, names = ranks.world // per_node, ("replicate", "shard")
    shape = (nodes, per_node) if nodes > 1 else (per_node,)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names[-len(shape) :])
    policy = wrap(replica.config, config, mesh, replica.config._attn_implementation)
    return fill(policy, replica, ranks.device)


@torch.no_grad()
def refresh(policy: nn.Module, replica: nn.Module) -> None:
    """Copy the masters into the replica, in place, parameter by parameter. Every rank, same order: all-gathers."""
    sampled = dict(replica.named_parameters())
    for name, master in policy.named_parameters():
        copy_master(master, sampled[name])


def copy_master(master: Tensor, own: Tensor) -> None:
    """One parameter of `refresh`: the shards are rounded, then gathered."""
    own.copy_(master.to(own.dtype).full_tensor())


def build_reference(replica: nn.Module, config: Config, ranks: Ranks) -> nn.Module:
    """A copy of the replica, sharded like the policy and called like it, without gradients. Every rank calls it."""
    reference = build_policy(replica, replace(config, gradient_checkpointing=False), ranks)
    return reference.eval().requires_grad_(False)


def needs_reference(config: Config) -> bool:
    """Whether the run keeps a second copy."""
    return {"rlp", "entropy_token"} & {config.method, config.warmup_method} != set() or config.kl > 0


@torch.no_grad()
def ema_update(reference: nn.Module, policy: nn.Module, tau: float) -> None:
    """r <- tau r + (1 - tau) p for every parameter, in place; call it once a step of the loop.

    Both copies are cut over the ranks in the same way, so each rank averages its own shards and nothing is sent. tau 1
    leaves the copy as it is, tau 0 makes it the policy; RLP (arXiv 2510.01265) takes 0.999. Started equal, the copy
    after n steps holds a share tau^n of the start. Raises ValueError if tau is not between 0 and 1.

    With tau 0.5 and a parameter of the policy at 1, 2, 4 after three steps, a copy that began at 0 goes 0.5, 1.25,
    2.625.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}: must be between 0 and 1")
    for (name, average), (other, current) in zip(reference.named_parameters(), policy.named_parameters(), strict=True):
        assert name == other and average.placements == current.placements, f"{name} and {other} are cut differently"
        average.to_local().lerp_(current.to_local(), 1 - tau)


@dataclass
class Lender:
    """Who shares the GPU, whose turn it is, and where the absent one waits."""

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    replica: nn.Module
    on: bool
    """config.offload. Without it the two functions below only refresh."""
    training: bool = False
    """Whose turn it is: the trainer's, or the sampler's."""
    saving: bool = False
    """Inside `at_hand`: the moments stay where they are."""
    host: dict[str, Tensor] = field(default_factory=dict)
    """Copies of whole storages as bytes, by name; taken once, because pinning gigabytes takes seconds."""


def make_lender(policy: nn.Module, optimizer: torch.optim.Optimizer, replica: nn.Module, config: Config) -> Lender:
    """After set-up, when both are whole; the sampler has the first turn."""
    lender = Lender(policy, optimizer, replica, config.offload)
    if not lender.on:
        return lender
    for parameter in replica.parameters():
        storage = parameter.untyped_storage()
        if not storage.resizable() or storage.nbytes() != parameter.nbytes:  # on a CPU: mapped from a file
            parameter.data = parameter.data.clone()
    optimizer.register_step_pre_hook(lambda *_: _fetch(_moments(lender), lender.host))
    optimizer.register_step_post_hook(lambda *_: None if lender.saving else _park(_moments(lender), lender.host))
    _park(_masters(lender), lender.host)
    return lender


def to_trainer(lender: Lender) -> None:
    """Before the update: the replica's memory goes, and its values with it; the masters come."""
    if not lender.on or lender.training:
        return
    for parameter in lender.replica.parameters():
        parameter.untyped_storage().resize_(0)
    _give_back()
    _fetch(_masters(lender), lender.host)
    lender.training = True


@torch.no_grad()
def to_sampler(lender: Lender) -> None:
    """After the update: the replica equals the masters again. Every rank calls it: all-gathers, as in `refresh`."""
    if not lender.on:
        refresh(lender.policy, lender.replica)
    elif lender.training:
        _park(_moments(lender), lender.host)
        _give_back()
        copies = dict(lender.replica.named_parameters())
        for name, master in lender.policy.named_parameters():
            copy = copies[name]
            copy.untyped_storage().resize_(copy.nbytes)
            copy_master(master, copy)
            _park({f"master {name}": _local(master)}, lender.host)
        _give_back()
        lender.training = False


@contextmanager
def at_hand(lender: Lender):
    """Inside, a checkpoint can read and write masters and moments; afterwards the sampler has its turn.

    Whose turn it was does not matter: a stop inside the update, before its first optimizer step, saves from here too.
    """
    if not lender.on:
        yield
        return
    to_trainer(lender)
    _fetch(_moments(lender), lender.host)
    lender.saving = True  # a checkpoint that is loaded makes an optimizer step up, to learn the form of the moments
    yield
    lender.saving = False
    to_sampler(lender)


def _masters(lender: Lender) -> dict[str, Tensor]:
    return {f"master {name}": _local(parameter) for name, parameter in lender.policy.named_parameters()}


def _moments(lender: Lender) -> dict[str, Tensor]:
    """Adam's, which exist from the first step on; its step counters are single numbers and stay."""
    states = {name: lender.optimizer.state.get(parameter, {}) for name, parameter in lender.policy.named_parameters()}
    return {
        f"{key} {name}": _local(value)
        for name, state in states.items()
        for key, value in state.items()
        if key.startswith("exp_avg")
    }


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _park(tensors: dict[str, Tensor], host: dict[str, Tensor]) -> None:
    """Copy each storage to the host and empty it. One that is empty already waits there."""
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if size := storage.nbytes():
            if name not in host:
                host[name] = _host_bytes(size, tensor.is_cuda)
            host[name].copy_(_bytes(tensor))
            storage.resize_(0)


def _fetch(tensors: dict[str, Tensor], host: dict[str, Tensor]) -> None:
    """The way back. What is not empty is there already."""
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if name in host and not storage.nbytes():
            storage.resize_(host[name].nbytes)
            _bytes(tensor).copy_(host[name])


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, padding included, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _host_bytes(size: int, pinned: bool) -> Tensor:
    """Host memory, for a GPU page-locked in place: torch's own pinned memory comes in powers of two. In pages of its
    own, since a page must not be locked twice."""
    buffer = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]
    if pinned:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
    return buffer


def _give_back() -> None:
    """To the driver: what comes next has other sizes, and the sampler's cache counts what is free there."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        "calculation, the cache aside. `python -m bench plan` says for what, and which key to change"
        for moment, parts in needs.items() if sum(parts.values()) > memory
    ]  # fmt: skip
