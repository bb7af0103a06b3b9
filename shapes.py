"""Architectures without weights: what bench.py builds at random and plan.py calculates with.

A model's own config.json is used where it is at hand; for the models of our configs a table stands in, so that neither
weights nor a network are needed. Of mixtures of experts it knows Qwen3's, whose layers are all alike.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM

from config import ConfigError
from limits import Shape

# What transformers needs to build each model of our configs without its config.json: that of the model's hub page.
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
_QWEN3 |= {"bos_token_id": 151643, "eos_token_id": 151643, "max_position_embeddings": 32768}
_QWEN3 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
ARCHITECTURES = {
    "HuggingFaceTB/SmolLM3-3B-Base": {
        "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-0.6B-Base": _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B-Base": _QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B-Base": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-30B-A3B-Base": _QWEN3 | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
}  # fmt: skip


def architecture(name: str):
    """The transformers config of a model: its own config.json if that is at hand, else from the table above.

    Raises ConfigError for a model in neither.
    """
    folder = Path(name).expanduser()
    cached = folder / "config.json"
    if not cached.is_file():  # a folder without one is no hub name
        cached = None if folder.exists() else try_to_load_from_cache(name, "config.json")
    if isinstance(cached, (str, Path)):
        return AutoConfig.from_pretrained(Path(cached).parent, trust_remote_code=False)
    if name not in ARCHITECTURES:
        raise ConfigError(f"model={name!r}: no config.json at hand, and not one of {', '.join(ARCHITECTURES)}")
    return AutoConfig.for_model(**ARCHITECTURES[name])


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
