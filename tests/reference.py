"""What the tests compare with: GRPO written as plainly as its equations, on tiny random models.

`naive_update` is the whole update without packing, micro-batches, sharding or chunks: one right-padded batch through
the ordinary model, log_softmax over all logits, a Python loop over responses and tokens. Shared by the tests of one
process and by worker.py's two ranks.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from statistics import fmean, stdev

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig, SmolLM3Config

from checkpoint import Saver, make_saver
from config import Config
from data import Corpus, Passage
from grpo import Group, make_optimizer
from methods import METHODS, Run, needs_reference
from model import add_extra, build_policy, build_reference, load_replica, load_tokenizer
from rollout import Rollout, Sampler, make_sampler

ROOT = Path(__file__).resolve().parent.parent
TINY_BASE = ROOT / "assets" / "tiny_base"
EOS = "<|end|>"
FAMILIES = ("smollm3", "qwen3_tied", "qwen3_untied", "qwen3_moe")
DENSE = FAMILIES[:3]


def tiny_config(folder: Path | str = "", **changes) -> Config:
    """A Config for tiny models: float32, short responses, everything small."""
    sizes = {"model": str(folder), "dtype": "float32", "tokens_per_micro_batch": 512, "gradient_checkpointing": False}
    sizes |= {"passages_per_step": 3, "masks_per_passage": 2, "predictions_per_mask": 2, "warmup_steps": 0}
    sizes |= {"min_passage_tokens": 1, "max_passage_tokens": 64, "max_prompt_tokens": 2000}
    sizes |= {"max_mask_tokens": 8, "max_prediction_tokens": 8, "max_mismatch": 0.0}  # made-up samples are far off
    sizes |= {"mask_prompt": "{passage}", "predict_prompt": "{passage}"}
    return Config(**{**sizes, **changes})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, 256 of them, and an end of sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def save_model(family: str, folder: Path) -> Path:
    """A random model of this family with its tokenizer, as the hub lays them out. Its large weights have opinions."""
    tokenizer = byte_tokenizer()
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id, max_position_embeddings=512, tie_word_embeddings=family != "qwen3_untied",
    )  # fmt: skip
    if family == "smollm3":
        config = SmolLM3Config(**sizes, no_rope_layers=[1, 0])  # the second layer has no rotary position (NoPE)
    elif family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        config = Qwen3MoeConfig(**sizes, head_dim=8, **experts)
    else:
        config = Qwen3Config(**sizes, head_dim=8)
    state = torch.get_rng_state()
    torch.manual_seed(FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_plain(folder: Path | str) -> torch.nn.Module:
    """The ordinary model, as anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def wiki_passages(count: int) -> list[Passage]:
    """The first articles of the shipped mini-wiki."""
    with gzip.open(ROOT / "assets" / "tiny_wiki.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    return [Passage(one["id"] + "#0", one["title"], one["url"], one["text"], one["labels"]) for one in records]


def make_run(sampler: Sampler, passages: list[Passage] = ()) -> Run:
    """What train.set_up makes, around this sampler."""
    config, replica = sampler.config, sampler.replica
    if extra := METHODS[config.method].extra:
        add_extra(replica, extra(replica, sampler.tokenizer, config))
    policy = build_policy(replica, config, sampler.ranks)
    reference = build_reference(replica, config, sampler.ranks) if needs_reference(config) else None
    optimizer = make_optimizer(policy, config)
    return Run(config, sampler.ranks, Corpus(list(passages), [], {}), sampler, policy, reference, optimizer)


def fresh_saver(config: Config, ranks) -> Saver:
    """A run before its first step, as the checkpoint's functions see it."""
    replica = load_replica(config, ranks)
    policy = build_policy(replica, config, ranks)
    sampler = make_sampler(replica, load_tokenizer(config), config, ranks)
    return make_saver(policy, make_optimizer(policy, config), sampler)


# ------------------------------------------------------------------------------------------- rollouts without a sampler
@torch.no_grad()
def make_groups(model, rewards: list[list[float]], seed: int = 0) -> list[Group]:
    """Groups with these rewards, of random tokens with uneven lengths. The sampler's log-probs are off the model's by
    noise, so that the importance weights are neither 1 nor always below their cap."""
    rng = random.Random(seed)
    groups = []
    for row in rewards:
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 30))]
        responses = []
        for _ in row:
            completion = [rng.randrange(256) for _ in range(rng.randint(1, 25))]
            sequence = torch.tensor([prompt + completion])
            logprobs = model(input_ids=sequence, use_cache=False).logits[0].log_softmax(-1)
            own = logprobs[range(len(prompt) - 1, len(sequence[0]) - 1), completion].tolist()
            noisy = [logprob + rng.gauss(0, 0.5) for logprob in own]
            responses.append(Rollout(prompt, completion, noisy, "", "length" if len(completion) > 20 else "eos"))
        groups.append(Group("pred", responses, row))
    return groups


REWARDS = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.875, 0.0, 0.5], [1.0, 0.0, 1.0]]
"""Five groups; the third teaches nothing."""


# ------------------------------------------------------------------------------------------------ GRPO, written plainly
def naive_update(model, optimizer, groups: list[Group], config: Config) -> dict:
    """One step of GRPO on whole groups, as the equations of grpo.py say. Returns metrics that grpo.update has too."""
    kept = []  # (mini-batch, response, advantage)
    for number, group in enumerate(group for group in groups if len(set(group.rewards)) > 1):
        scale = stdev(group.rewards) + 1e-6 if config.advantage_std else 1.0
        for response, reward in zip(group.rollouts, group.rewards, strict=True):
            if not (config.mask_truncated and response.finish == "length"):
                advantage = (reward - fmean(group.rewards)) / scale
                kept.append((number % config.mini_batches, response, advantage))
    longest = max(len(response.prompt_ids + response.completion_ids) for _, response, _ in kept)
    rows = torch.zeros(len(kept), longest, dtype=torch.long)  # right-padded: causal attention never sees the padding
    for row, (_, response, _) in zip(rows, kept, strict=True):
        sequence = response.prompt_ids + response.completion_ids
        row[: len(sequence)] = torch.tensor(sequence)

    def forward() -> torch.Tensor:
        return (model(input_ids=rows, use_cache=False).logits / config.temperature).log_softmax(-1)

    with torch.no_grad():
        old = forward()  # of the policy before the first optimizer step
    steps, loss_sum, clip_sum, entropies, drift = config.updates_per_batch * config.mini_batches, 0.0, 0.0, [], []
    for step in range(steps):
        logprobs = forward()
        part = [(n, *one[1:]) for n, one in enumerate(kept) if one[0] == step % config.mini_batches]
        tokens = sum(len(response.completion_ids) for _, response, _ in part)
        loss, clipped_tokens = 0.0, 0
        for number, response, advantage in part:
            own_tokens = len(response.completion_ids)
            weight = 1 / tokens if config.loss_mean == "token" else 1 / len(part) / own_tokens
            for t, token in enumerate(response.completion_ids):
                position = len(response.prompt_ids) + t - 1  # which predicts the token after it
                new_logprob, old_logprob = logprobs[number, position, token], old[number, position, token]
                ratio = torch.exp(new_logprob - old_logprob)
                inside = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                gap = (old_logprob - response.sampler_logprobs[t]).item()
                importance = min(torch.tensor(gap).exp().item(), config.max_importance)
                loss = loss - weight * importance * min(ratio * advantage, inside * advantage)
                clipped_tokens += bool(inside * advantage < ratio * advantage)
                if step < config.mini_batches:
                    entropies.append(-(logprobs[number, position].exp() * logprobs[number, position]).sum().item())
                    drift.append(abs(gap))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item()
        clip_sum += clipped_tokens / tokens
    metrics = {"loss": loss_sum / steps, "clip_fraction": clip_sum / steps}
    return metrics | {"entropy": fmean(entropies), "mismatch_abs": fmean(drift)}


SEQUENCES = [([7], [1, 2, 3]), (list(range(40)), [9]), ([5, 6], list(range(100, 125))), ([9, 9, 9, 200], [1, 1]),
             (list(range(30)), list(range(30)))]  # fmt: skip
"""(prefix, continuation) pairs of uneven lengths, an odd number of them."""


@torch.no_grad()
def naive_score(model, sequences, temperature=1.0) -> list[tuple[list[float], list[float]]]:
    """What `score` returns, one sequence at a time through the ordinary model's whole logits."""
    scores = []
    for prefix, continuation in sequences:
        logits = model(input_ids=torch.tensor([prefix + continuation]), use_cache=False).logits[0] / temperature
        logprobs = logits.log_softmax(-1)[len(prefix) - 1 : -1]
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        scores.append((logprobs[range(len(continuation)), continuation].tolist(), entropies.tolist()))
    return scores


def score_error(found, expected) -> float:
    """Largest absolute difference over all tokens; the lengths must be the same."""
    assert [list(map(len, one)) for one in found] == [list(map(len, one)) for one in expected]
    flat = ([value for one in scores for values in one for value in values] for scores in (found, expected))
    return max((abs(a - b) for a, b in zip(*flat, strict=True)), default=0.0)


class CaptureGradients:
    """Stands in for an optimizer: its step keeps the whole gradients and changes nothing. Every rank calls it."""

    def __init__(self, model):
        self.model, self.param_groups, self.gradients = model, [{"lr": 0.0}], {}

    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            self.gradients[name] = whole(parameter.grad).clone()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor put together again (a collective); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(model) -> dict[str, torch.Tensor]:
    """Copies of all parameters, whole."""
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def largest_error(found: dict, expected: dict) -> float:
    """Over tensors of these names: the largest absolute difference, in units of the largest expected entry."""
    assert found.keys() == expected.keys() and found
    return max(((found[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


def same_bits(found: dict, expected: dict) -> bool:
    """Whether two sets of tensors are equal in every bit and in dtype."""
    assert found.keys() == expected.keys() and found
    return all(found[n].dtype == expected[n].dtype and torch.equal(found[n], expected[n]) for n in expected)
