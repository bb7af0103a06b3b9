"""One training step in slow motion, with its real numbers: `python -m play explain configs/tiny.yaml [key=value ...]`

The first step of that run, on one process: the prompts, responses, rewards and update that train.py would make. One
passage and one of its masks are followed to the end. Beside each number of the code stands the same number worked out
here with plain arithmetic, or from the model's ordinary logits. Nothing is written; the changed weights are dropped.
For `method=active` alone, where both roles are at work.
"""

from __future__ import annotations

import math
import tempfile
import textwrap
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from config import Config, ConfigError
from data import build_index, load_corpus, step_passages
from grpo import Group, Sample, clipped_loss, group_advantages, keep_group, make_optimizer, pack_samples, update
from methods import Task, training_samples
from model import build_policy, decide_checkpointing, load_replica, load_tokenizer
from prompts import last_answer
from ranks import Ranks
from rollout import Rollout, Sampler, check_prompts, make_sampler, mask_prompt
from train import predict, propose, reward

COLUMNS = 100


def plain(text: str) -> str:
    """On one line, and harmless to a terminal: a model may write escape sequences."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def wrapped(text: str, indent: int = 2, most: int = 0) -> str:
    """plain text in lines of COLUMNS; most > 0: its middle left out beyond so many characters."""
    text = plain(text)
    if most and len(text) > most:
        text = f"{text[: most // 2]} [...] {text[-most // 2 :]}"
    lines = textwrap.wrap(text, COLUMNS - indent, break_on_hyphens=False) or [""]
    return "\n".join(" " * indent + line for line in lines)


def hand_advantages(rewards: list[float], divide_by_std: bool = True) -> tuple[float, float, list[float]]:
    """(mean, standard deviation with n - 1, advantages), spelled out.

    >>> hand_advantages([1.0, 0.0], False)
    (0.5, 0.7071067811865476, [0.5, -0.5])
    """
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((one - mean) ** 2 for one in rewards) / (len(rewards) - 1))
    return mean, std, [(one - mean) / (std + 1e-6) if divide_by_std else one - mean for one in rewards]


@torch.no_grad()
def hand_logprobs(replica: nn.Module, response: Rollout, temperature: float) -> list[float]:
    """Log-prob of each completion token: the ordinary model, all logits, log-softmax. One sequence, nothing packed."""
    ids = torch.tensor([response.prompt_ids + response.completion_ids], device=replica.device)
    attention = replica.config._attn_implementation
    replica.config._attn_implementation = "eager"
    logits = replica(input_ids=ids, use_cache=False).logits[0, len(response.prompt_ids) - 1 : -1].float()
    replica.config._attn_implementation = attention
    rows = (logits / temperature).log_softmax(-1)
    return [rows[n, token].item() for n, token in enumerate(response.completion_ids)]


@torch.no_grad()
def policy_logprobs(policy: nn.Module, response: Rollout, config: Config, ranks: Ranks) -> list[float]:
    """The same from the trainer: packed, chunked, as the update computes them."""
    batch = pack_samples([[Sample(response, 0.0)]], ranks.device)
    options = {"predicts": batch.predicts, "targets": batch.targets, "temperature": config.temperature}
    return policy(**options, **batch.inputs)[0].tolist()


def token_loss(policy: nn.Module, sample: Sample, place: int, config: Config, ranks: Ranks) -> tuple[float, float]:
    """The code's loss of one token of a sample, and its derivative by that token's log-prob."""
    batch = pack_samples([[sample]], ranks.device)
    batch.weights = torch.where(torch.arange(len(batch.weights), device=ranks.device) == place, batch.weights, 0.0)
    options = {"predicts": batch.predicts, "targets": batch.targets, "temperature": config.temperature}
    with torch.no_grad():
        logprobs = policy(**options, **batch.inputs)[0]
    own = logprobs.clone().requires_grad_()
    loss, _ = clipped_loss(own, logprobs, batch, config)
    (slope,) = torch.autograd.grad(loss, own)
    return loss.item(), slope[place].item()


def first_step(config: Config, ranks: Ranks) -> tuple:
    """(sampler, policy, optimizer, proposals, groups, samples): step 1 up to its update, by train.py's functions."""
    tokenizer = load_tokenizer(config)
    with tempfile.TemporaryDirectory() as folder:
        build_index(config, tokenizer, Path(folder), log=lambda line: None)
        corpus = load_corpus(Path(folder), config)
    replica = load_replica(config, ranks)
    policy = build_policy(replica, decide_checkpointing(replica.config, config, ranks), ranks)
    optimizer = make_optimizer(policy, config)
    sampler = make_sampler(replica, tokenizer, config, ranks)
    check_prompts(sampler)
    proposals = propose(step_passages(corpus, config, 0), sampler, config, 0)
    tasks = [task for group in proposals for task in group if not task.mask.invalid]
    predict(tasks, sampler, config, 0)
    groups = reward("active", tasks, proposals, policy, None, sampler, 0)
    samples = training_samples("active", groups, tasks, [], None, sampler)
    return sampler, policy, optimizer, proposals, groups, samples


def choose(proposals: list[list[Task]]) -> tuple[list[Task], Task]:
    """The passage and the mask to follow: right and wrong answers as evenly as can be, if possible where the masks of
    the passage earn unequally too; of equals the harder. Raises ConfigError if no mask of the step has both."""

    def worth(pair: tuple[list[Task], Task]) -> tuple:
        accuracy = pair[1].accuracy
        return len({one.proposal_reward() for one in pair[0]}) > 1, -abs(accuracy - 0.5), -accuracy

    pairs = [(tasks, one) for tasks in proposals for one in tasks if one.rewards and 0 < one.accuracy < 1]
    if not pairs:
        raise ConfigError("seed: in this step every mask was solved by all or by none, nothing to learn; try another")
    return max(pairs, key=worth)


def explain(config: Config, ranks: Ranks, say=print) -> dict:
    """Tells the step through `say`; returns the pairs (by hand, the code's) of every number that was worked out."""
    for key, allowed in (
        ("method", "active"),
        ("kl", 0.0),
        ("shuffle_rewards", False),
        ("mask_truncated", False),
        ("train_generator", True),
    ):
        if getattr(config, key) != allowed:
            raise ConfigError(f"{key}={getattr(config, key)!r}: must be {allowed!r} to be explained")
    sampler, policy, optimizer, proposals, groups, samples = first_step(config, ranks)
    tasks, task = choose(proposals)
    tell_masks(tasks, task, sampler, say)
    pairs = tell_rewards(tasks, task, groups, config, say)
    pairs |= tell_token(task, samples, groups, policy, sampler, say)
    pairs |= tell_update(task, samples, policy, optimizer, sampler, say)
    return pairs


def a_right_one(task: Task, samples: list[Sample]) -> Sample:
    """The first response to this mask that the update makes likelier."""
    mine = {id(response) for response in task.predictions}
    return next(one for one in samples if id(one.rollout) in mine and one.advantage > 0)


def tell_masks(tasks: list[Task], task: Task, sampler: Sampler, say) -> None:
    """Passage, both prompts, masks and why they are valid or not, predictions with their verdicts."""
    passage, decode = task.passage, sampler.tokenizer.decode
    say(f"1. PASSAGE  {plain(passage.title)} {plain(passage.url)}\n{wrapped(passage.text)}")
    prompt = decode(mask_prompt(sampler, passage.text))
    say(f"\n2. PROPOSE  the generator reads this, {len(tasks)} times over\n{wrapped(prompt, most=600)}\n")
    for number, one in enumerate(tasks, 1):
        state = f"INVALID: {one.mask.invalid}" if one.mask.invalid else f"valid, occurs {one.mask.occurrences} x"
        label = f", {one.mask.label}" if one.mask.label else ""
        say(f"   mask {number}: {plain(one.mask.words) or '(none)'}   [{state}{label}]")
        say(wrapped(f"it wrote: {one.proposal.text}", 11, 300))
    number = next(n for n, one in enumerate(tasks, 1) if one is task)
    say(
        f"\n   From here on we follow mask {number}. With its words hidden the passage is:\n{wrapped(task.mask.masked)}"
    )
    say(f"\n3. PREDICT  the predictor reads this, {len(task.predictions)} times over")
    say(f"{wrapped(decode(task.prompt_ids), most=600)}\n")
    for number, (response, earned) in enumerate(zip(task.predictions, task.rewards, strict=True), 1):
        answer = last_answer(response.text, "boxed")
        shown = "no answer" if answer is None else plain(answer) or "(empty)"
        say(f"   {number}: {'right' if earned else 'wrong'}, reward {earned:g}: {shown}")
        say(wrapped(f"it wrote: {response.text}", 6, 300))


def tell_rewards(tasks: list[Task], task: Task, groups: list[Group], config: Config, say) -> dict:
    """Rewards of both roles and the advantages inside both groups."""
    right, size = sum(task.rewards), len(task.rewards)
    pred = next(group for group in groups if group.rollouts is task.predictions)
    gen = next(group for group in groups if group.role == "gen" and group.rollouts[0] is tasks[0].proposal)
    at = next(n for n, one in enumerate(tasks) if one is task)
    mask_reward = 1 - right / size if config.generator_reward != "variance" else right / size * (1 - right / size)
    say(f"\n4. REWARD  {right:g} of {size} are right: accuracy {right / size:.4f}")
    say(f"   The mask earns {mask_reward:.4f} by hand, {gen.rewards[at]:.4f} in the code: {config.generator_reward},")
    say("   and 0 where none is right or the mask is invalid.")
    pairs = {"mask reward": (mask_reward, gen.rewards[at])}
    for name, group in (("predictions of this mask", pred), ("masks of this passage", gen)):
        mean, std, hand = hand_advantages(group.rewards, config.advantage_std)
        code = group_advantages(group.rewards, config.advantage_std)
        rule = "(reward - mean) / (std + 1e-6)" if config.advantage_std else "reward - mean"
        say(f"\n   Group: the {len(hand)} {name}. mean {mean:.4f}, std {std:.4f}")
        say(f"   advantage = {rule}\n      reward   by hand  the code")
        for row in zip(group.rewards, hand, code, strict=True):
            say("   " + "".join(f"{value:9.4f} " for value in row).rstrip())
        if not keep_group(group):
            say("   All earned the same: the group is dropped.")
        pairs |= {f"advantage {group.role} {n}": pair for n, pair in enumerate(zip(hand, code, strict=True))}
    return pairs


def tell_token(task: Task, samples: list[Sample], groups: list[Group], policy, sampler: Sampler, say) -> dict:
    """Token weights, then one token of one response: its log-prob three times, its loss twice."""
    config, ranks = sampler.config, sampler.ranks
    kept = [group for group in groups if keep_group(group)]
    lengths = [len(one.completion_ids) for group in kept for one in group.rollouts]
    sample = a_right_one(task, samples)
    response = sample.rollout
    own = len(response.completion_ids)
    weight = 1 / sum(lengths) if config.loss_mean == "token" else 1 / (len(lengths) * own)
    say(f"\n5. WEIGHTS  {len(kept)} of {len(groups)} groups are kept: {len(lengths)} responses, {sum(lengths)} tokens.")
    rule = "1 / all kept tokens" if config.loss_mean == "token" else "1 / (kept responses x own tokens)"
    say(f"   Each token of ours weighs {rule} = {weight:.8f} by hand, {sample.weight:.8f} in the code.")
    place = max(range(own), key=lambda n: -response.sampler_logprobs[n])  # the least expected: most to see
    hand = hand_logprobs(sampler.replica, response, config.temperature)[place]
    code = policy_logprobs(policy, response, config, ranks)[place]
    drawn = response.sampler_logprobs[place]
    correction = min(math.exp(code - drawn), config.max_importance)
    loss, slope = token_loss(policy, sample, place, config, ranks)
    by_hand = -weight * correction * sample.advantage
    piece = sampler.piece(response.completion_ids[place])
    say(f"\n6. ONE TOKEN  {piece!r}, number {place + 1} of {own} in: {plain(response.text)[:60]}")
    say(f"   log p  {hand:.6f} from the plain model's logits, {code:.6f} in the trainer, {drawn:.6f} when sampled")
    say("   ratio  exp(log p - old log p) = 1: the first update of a batch, so the clip does nothing")
    say(f"   c      min(exp(trainer - sampler), {config.max_importance:g}) = {correction:.6f}")
    say(f"   loss   - weight x c x ratio x advantage = -{weight:.8f} x {correction:.6f} x 1 x {sample.advantage:.4f}")
    say(f"          = {by_hand:.10f} by hand, {loss:.10f} in the code")
    say(f"   slope  d loss / d log p = {by_hand:.10f} by hand, {slope:.10f} in the code: up with this log p")
    return {
        "weight": (weight, sample.weight),
        "log p": (hand, code),
        "loss": (by_hand, loss),
        "slope": (by_hand, slope),
    }


def tell_update(task: Task, samples: list[Sample], policy, optimizer, sampler: Sampler, say) -> dict:
    """The real update on the whole batch, and what it did to the responses to this mask."""
    config, ranks = sampler.config, sampler.ranks
    before = [policy_logprobs(policy, one, config, ranks) for one in task.predictions]
    total = -sum(one.weight * one.advantage * len(one.rollout.completion_ids) for one in samples)
    done = update(policy, optimizer, samples, config, ranks, 0)
    after = [policy_logprobs(policy, one, config, ranks) for one in task.predictions]
    say(f"\n7. UPDATE  AdamW on all {len(samples)} kept responses of both roles, learning rate {done['lr']:g}")
    say(f"   loss of the step: {total:.8f} by hand with c = 1, {done['loss']:.8f} in the code")
    say(f"   norm of the gradient {done['grad_norm']:.4f}; trainer - sampler {done['mismatch_abs']:.1e} nats a token")
    say("\n   The responses to our mask, log p of the whole response:")
    say("      verdict   before    after   change")
    changes = []
    for earned, old, new in zip(task.rewards, before, after, strict=True):
        changes.append(sum(new) - sum(old))
        say(f"      {'right' if earned else 'wrong'}  {sum(old):9.4f}{sum(new):9.4f}{changes[-1]:+9.4f}")
    for verdict, name in ((1, "right"), (0, "wrong")):
        mean = fmean(change for change, earned in zip(changes, task.rewards, strict=True) if bool(earned) == verdict)
        say(f"   {name} answers: {mean:+.4f} on average")
    sample = a_right_one(task, samples)
    number = next(n for n, one in enumerate(task.predictions) if one is sample.rollout)
    say("\n   Token by token in the response of point 6:")
    for token, old, new in zip(sample.rollout.completion_ids, before[number], after[number], strict=True):
        say(f"      {sampler.piece(token)!r:16} {old:9.4f} -> {new:9.4f}  {new - old:+.4f}")
    return {"loss of the step": (total, done["loss"]), "changes": (changes, task.rewards)}
