"""A model's files and a run directory, loaded or claimed and tried before the first rollout: each failure one line."""

import fcntl
import os
import sys
from contextlib import contextmanager
from itertools import chain
from logging import getLogger
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from config import Config, ConfigError
from ops import logprobs_of, pack
from prompts import BOXED_OPENING, MASK_OPENING, mask_prompt
from rollout import Sampler, generate


@contextmanager
def usable(config: Config, what: str):
    """Inside, whatever transformers raises over a model becomes a ConfigError of one line; it prints nothing more."""
    verbosity, batching = logging.get_verbosity(), getLogger("ContinuousBatchingLogger")
    try:
        logging.set_verbosity_error()
        batching.disabled = True
        yield
    except Exception as error:
        lost = "" if os.path.exists(config.model) else "no such folder here, and "
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"model={config.model!r}: {lost}no usable {what} ({reason})") from None
    finally:
        logging.set_verbosity(verbosity)
        batching.disabled = False


def load_whole(config: Config, dtype: torch.dtype, rank: int) -> nn.Module:
    """The model of config.model as transformers loads it. Raises ConfigError if a weight is missing, of another shape,
    quantised or not finite; says which are left unread."""
    with usable(config, "weights"):
        hf_config = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
        if getattr(hf_config, "quantization_config", None):
            raise ValueError("quantization_config in its config.json: quantised weights cannot be trained")
        hf_config._attn_implementation = "sdpa"
        replica, found = AutoModelForCausalLM.from_pretrained(
            config.model, config=hf_config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        if lost := sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]):
            raise ValueError(f"{len(lost)} are missing or of another shape than config.json says: {lost[0]}")
        if lost := [name for name, weight in replica.named_parameters() if not weight.sum().isfinite()]:
            raise ValueError(f"{len(lost)} are not finite numbers: {lost[0]}")
    if (unread := sorted(found["unexpected_keys"])) and rank == 0:
        what = f"its config.json leaves {len(unread)} of its weights unread, as {unread[0]}"
        print(f"WARNING: model={config.model!r}: {what}", file=sys.stderr)
    return replica


@torch.no_grad()
def try_sampler(sampler: Sampler, passages: list) -> None:
    """Raises ConfigError where a run could only fail, or learn nothing, before its first rollout: if the tokenizer has
    tokens that the model has not, or changes a command or most of the first passages; if the model cannot be sampled;
    if the same tokens twice in one packed row get other log-probs than the sampler gave, because the packing does not
    keep its attention, positions or states apart."""
    config, tokenizer, prompt = sampler.config, sampler.tokenizer, mask_prompt(sampler, "The moon")
    size, added = sampler.replica.get_input_embeddings().num_embeddings, tokenizer.added_tokens_decoder
    used = {id for id in tokenizer.get_vocab().values() if id not in added or not added[id].special}
    if beyond := {*used, *prompt} - {*range(size)}:
        token = f"{tokenizer.convert_ids_to_tokens(min(beyond))!r}, number {min(beyond)}"
        raise ConfigError(f"model={config.model!r}: its tokenizer has {token}, but it has {size} embeddings")
    texts = [MASK_OPENING + "a}", BOXED_OPENING + "a}", *(passage.text for passage in passages[:100])]
    back = [tokenizer.decode(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    lost = [(text, other) for text, other in zip(texts, back, strict=True) if text.strip() != other.strip()]
    if lost and (lost[0][0] in texts[:2] or 2 * len(lost) >= len(passages[:100])):
        begin = max(0, len(os.path.commonprefix(lost[0])) - 10)
        shown = " becomes ".join(repr(text[begin : begin + 30]) for text in lost[0])
        raise ConfigError(f"model={config.model!r}: its tokenizer changes text, so no answer could match: {shown}")
    with usable(config, f"sampler with attention={sampler.replica.config._attn_implementation}"):
        groups = generate(sampler, [prompt], 1, 2, MASK_OPENING, 0, greedy=True)
        for response in chain(*groups):  # none after a signal to stop
            row, limit = prompt + response.completion_ids, 1e-3 if config.dtype == "float32" else 0.5
            places = [begin + place - 1 for begin in (0, len(row)) for place in range(len(prompt), len(row))]
            inputs = pack([row, row], sampler.ranks.device)
            inputs |= {"predicts": places, "targets": inputs["input_ids"][0, 1:][places], "temperature": 1.0}
            packed = logprobs_of(sampler.replica, **inputs)[0].tolist()
            for sampled, score in zip(response.sampler_logprobs * 2, packed, strict=True):
                if not abs(sampled - score) < limit:
                    raise ValueError(f"a packed row has log-prob {score:.4f}, the sampler {sampled:.4f}")


_held: object = None
"""The open file by which this process holds its run directory as long as it lives."""


def claim(run: Path) -> object:
    """Locks the run directory for this process; returns its environment.txt, open. Raises ConfigError if another one
    holds it."""
    global _held
    if _held:  # of an earlier run of this process
        _held.close()
    _held = (run / "environment.txt").open("a", encoding="utf-8")
    try:
        fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"run_dir={str(run)!r}: another process is writing to it; give this run another") from None
    except OSError:
        pass  # a disk without locks
    return _held
