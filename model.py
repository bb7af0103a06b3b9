"""Two copies of one model per rank: a sharded trainer and a plain replica that samples, kept equal by `refresh`.

    policy     FSDP2, float32 master weights sharded over the ranks of a node, computes in config.dtype; its forward
               returns per-token log-probs and entropies instead of logits
    replica    the ordinary Hugging Face model in config.dtype, whole on every rank, no gradient; it generates
    reference  where a method needs it, a second sharded copy: frozen (entropy_token, KL penalty) or a moving average of
               the policy (rlp). Build it before a checkpoint is loaded: then it is the start model, also after a resume

Sampling from the sharded model would put FSDP's collectives into the generation loop, where ranks finish at different
times, and hang. The replica costs 2 bytes a parameter and one all-gather a step.
"""

import copy
import os
import types
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from huggingface_hub.utils import enable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from config import Config, ConfigError
from engine.checks import load_whole, usable
from ops import SHARED, apply_liger, choose_attention, policy_forward
from ranks import Ranks, gather

DRIVER = Path("/proc/driver/nvidia/version")
logging.disable_progress_bar()  # of loading and saving weights: a line per rank and checkpoint, in the middle of ours
if os.environ.get("LOCAL_RANK", "0") == "0":
    enable_progress_bars()  # of downloads, which that switch silences, too
# A hub repository without safetensors would be sent to a converter on the hub, and what comes back loaded
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"


def check_device(config: Config, ranks: Ranks) -> None:
    """Raises ConfigError where the run would work, but not as it is meant, or not at all, as with flash-attn that
    is not there. Looks at nothing large."""
    dtype = getattr(torch, config.dtype)
    try:
        choose_attention(config.attention, ranks.device, dtype)
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
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
            "docs/gpu.md, `On a GPU node`. CUDA_VISIBLE_DEVICES= in front of the command runs on the CPU all the same"
        )


def load_tokenizer(config: Config):
    """The model's tokenizer, with the config's chat template. Custom code is refused. Raises ConfigError."""
    with usable(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)  # unset, it asks on stdin
    # Passages are measured before they are cut, which is no reason to warn of sequences longer than the model's
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if config.chat_template == "none":
        tokenizer.chat_template = None
    elif config.chat_template != "auto":
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat_template={config.chat_template!r}: cannot be read ({error})") from None
        if not tokenizer.chat_template.strip("\ufeff \t\r\n"):
            raise ConfigError(f"chat_template={config.chat_template!r}: is empty; chat_template=none for plain text")
    if isinstance(tokenizer.chat_template, str):  # some editors put a byte order mark first
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    return tokenizer


def load_replica(config: Config, ranks: Ranks, architecture=None) -> nn.Module:
    """The Hugging Face model that samples: config.dtype, no gradient, on this rank's device.

    A model is data: safetensors only, no pickle; no custom code; no kernel that its config.json names for fetching.
    architecture: a transformers config; then the weights are random, drawn from config.seed, instead of config.model's.
    Raises ConfigError for a folder that cannot be loaded whole, for weights that are quantised or not finite, and for
    heads that do more than a matrix product, since the chunked log-probs would be wrong. Dropout and router noise are
    switched off: the trainer must compute what the sampler does.
    """
    check_device(config, ranks)  # before gigabytes are read
    dtype = getattr(torch, config.dtype)
    attention = choose_attention(config.attention, ranks.device, dtype)
    # A rank of each node fetches a hub's model first: locks do not hold on some network disks
    hub, first = not (architecture or Path(config.model).expanduser().exists()), not ranks.rank % (ranks.per_node or 1)
    if hub and not first:
        dist.barrier()
    if architecture is None:
        replica = load_whole(config, dtype, ranks.rank)
    else:
        torch.manual_seed(config.seed)
        with ranks.device:
            replica = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    if hub and first:
        dist.barrier()
    use_attention(replica, attention)
    head = replica.get_output_embeddings()
    extras = [key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
              if getattr(replica.config, key, None) not in (None, 1, 1.0)]  # fmt: skip
    if not isinstance(head, nn.Linear) or head.bias is not None or extras:
        raise ConfigError(f"model={config.model!r}: its head is not a plain matrix product: {extras or head}")
    shape = replica.config.get_text_config()
    for key, value in vars(shape).items():  # the policy is built from it
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(shape, key, 0.0)
    replica = replica.to(ranks.device).eval().requires_grad_(False)
    replica.head_chunk = head_chunk(config)
    if config.liger and ranks.device.type == "cuda":
        apply_liger(replica)
    return replica


def use_attention(model: nn.Module, name: str) -> None:
    """Set by hand: the constructor would take a name with "flash" for a kernel to fetch."""
    model.config._attn_implementation = name


def add_extra(model: nn.Module, extra: nn.Module) -> None:
    """Gives the model a method's own few parameters, as `model.extra`. They are sharded, trained, saved and refreshed
    with its own, and exported beside it. `extra.join(model)` may change how the model computes."""
    model.extra = extra
    extra.join(model)


def head_chunk(config: Config) -> int:
    """Tokens whose logits exist at a time, by the keys with which a user fits a GPU. Large chunks move fewer bytes."""
    return 4096 if config.tokens_per_micro_batch >= 8192 and not config.offload else 1024


def empty_policy(shape, config: Config, mesh: DeviceMesh, attention: str, extra: nn.Module | None = None) -> nn.Module:
    """An empty policy on the meta device, sharded by layer: no memory is taken before `load_masters`."""
    with torch.device("meta"):
        own = copy.deepcopy(shape)
        policy = AutoModelForCausalLM.from_config(
            own, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    if extra is not None:
        add_extra(policy, copy.deepcopy(extra).to("meta", torch.float32).requires_grad_())
    use_attention(policy, SHARED[attention] if config.share_prompts else attention)
    if config.liger and mesh.device_type == "cuda":
        apply_liger(policy)
    policy.forward, policy.head_chunk = types.MethodType(policy_forward, policy), head_chunk(config)
    assert isinstance(config.gradient_checkpointing, bool), "auto: bench/memory.py:decide_checkpointing comes first"
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32)
    # Also set on the root module, because FSDP2 keeps the root unsharded after a forward without gradient by default
    options = {"mesh": mesh, "mp_policy": precision, "reshard_after_forward": True}
    if config.offload:  # page-locked host memory exists beside a GPU only
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    layers = [m for m in policy.modules() if type(m).__name__ in set(policy._no_split_modules or ())]
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)
    return policy


@torch.no_grad()
def load_masters(policy: nn.Module, replica: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Give the policy its float32 masters: each rank cuts its own shards out of its replica; nothing is sent.

    With offload the shards are on the host, the buffers on `device`.
    """
    policy.to_empty(device="cpu" if config.offload else device)
    whole = dict(replica.named_parameters())
    for name, shard in policy.named_parameters():
        cut = distribute_tensor(whole[name], shard.device_mesh, shard.placements, src_data_rank=None)
        shard.to_local().copy_(cut.to_local())  # to float32 as it is cut: a whole layer of experts would take gigabytes
    buffers = dict(replica.named_buffers())  # rotary frequencies: to_empty left garbage, and no loader would complain
    for name, _ in list(policy.named_buffers()):
        owner, _, key = name.rpartition(".")
        policy.get_submodule(owner)._buffers[key] = buffers[name].clone()
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
    for group in mesh.get_all_groups():  # those inside and between nodes would have NCCL's ten minutes
        _set_pg_timeout(timedelta(seconds=config.rank_timeout), group)
    extra = getattr(replica, "extra", None)
    policy = empty_policy(replica.config, config, mesh, replica.config._attn_implementation, extra)
    return load_masters(policy, replica, config, ranks.device)


@torch.no_grad()
def refresh(policy: nn.Module, replica: nn.Module) -> float:
    """Copy the masters into the replica, in place, parameter by parameter. Every rank, same order: all-gathers.

    Shards are rounded, moved to the device if they are on the host, and gathered. Returns the share of values that
    changed: in bfloat16 one stays as it was until its master has moved by half a step of that format.
    """
    sampled, changed = dict(replica.named_parameters()), 0
    for name, master in policy.named_parameters():
        own = sampled[name]
        new = master.to(own.dtype).to(own.device).full_tensor()
        changed += (new != own).sum()
        own.copy_(new)
    return int(changed) / sum(own.numel() for own in sampled.values())


def build_reference(replica: nn.Module, config: Config, ranks: Ranks) -> nn.Module:
    """A copy of the replica, sharded like the policy and called like it, without gradients. Every rank calls it."""
    reference = build_policy(replica, replace(config, gradient_checkpointing=False), ranks)
    return reference.eval().requires_grad_(False)


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
