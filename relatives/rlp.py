"""rlp: reinforcement learning pretraining (arXiv 2510.01265).

A thought c before token x_t earns log p_policy(x_t | x_<t, c) - log p_average(x_t | x_<t), teacher-forced; the average
follows the policy (model.py:ema_update).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from config import Config, ConfigError
from data import Passage
from grpo import Group, Sample, score
from masking import MASK, Mask
from prompts import leading_ids
from relatives.next_token import draw_distinct
from rollout import Rollout, Sampler, derive_seed

if TYPE_CHECKING:
    from methods import Run, Task

THOUGHT_PROMPT = """The text below breaks off. Think briefly about what it has said and what has to come next, inside <think> and </think>. Then continue the text with its very next word.

Text:
{passage}

"""  # noqa: E501 (a line break inside a sentence would be part of the prompt)
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
MIN_PREFIX = 8  # tokens of text before the first position that may be drawn: less says nothing of what follows


@dataclass(frozen=True)
class Frame:
    """The token ids around texts and thoughts, fixed for a run."""

    start_ids: list[int]  # what the tokenizer puts in front of any text (a beginning-of-sequence token, or nothing)
    head_ids: list[int]  # the sampling prompt before the text
    tail_ids: list[int]  # the sampling prompt after the text; its end is open_ids
    open_ids: list[int]
    close_ids: list[int]
    longest_prefix: int  # tokens of text for which neither prompt nor context with an empty thought exceeds the limit


@dataclass
class Position:
    """One place in a text, and what `quiet_star` learns about it."""

    prefix_ids: list[int]  # the tokens before it, without special ones
    ahead_ids: list[int]  # the true tokens from there on: one, or `ahead_tokens`, fewer at the end of the text
    # Of each thought: its reward minus the mean log-prob of the same tokens without a thought, nats a token
    gains: list[float] = field(default_factory=list)
    mixes: list[float] = field(default_factory=list)  # of each thought: its mean weight in the mixture


def make_frame(sampler: Sampler) -> Frame:
    """Tokenizes everything but the texts. With a chat template the request is one user turn and the thought opens the
    answer. Raises ConfigError if there is no room for MIN_PREFIX tokens of text."""
    tokenizer, chat, longest = sampler.tokenizer, sampler.frame, sampler.config.max_prompt_tokens
    template = sampler.config.rlp_prompt or THOUGHT_PROMPT
    head, tail = (template.join(chat) if chat else template).split("{passage}")
    # The template writes its own special tokens; plain text gets those that the tokenizer puts in front
    start_ids = leading_ids(tokenizer)
    head_ids, open_ids, close_ids, tail_ids = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (head, THINK_OPEN, THINK_CLOSE, tail)
    )
    head_ids = head_ids if chat else start_ids + head_ids
    used = max(len(head_ids + tail_ids + open_ids), len(start_ids + open_ids + close_ids) + 1)
    if longest < used + MIN_PREFIX:
        raise ConfigError(
            f"max_prompt_tokens={longest}: must be at least {used + MIN_PREFIX}, {MIN_PREFIX} tokens of text "
            "and the frame of rlp_prompt"
        )
    return Frame(start_ids, head_ids, tail_ids + open_ids, open_ids, close_ids, longest - used)


def check(config: Config) -> None:
    """Raises ConfigError where passages may be too short to hold a position."""
    if config.min_passage_tokens <= MIN_PREFIX:
        least = f"must be {MIN_PREFIX + 1} or more with {config.method}"
        raise ConfigError(f"min_passage_tokens={config.min_passage_tokens}: {least}")


def draw_positions(
    run: Run, passages: list[Passage], step: int, counts: list[int], ahead: int, longest: int, prompt: Callable,
) -> list[list[Task]]:  # fmt: skip
    """Tasks at `counts` random positions t >= MIN_PREFIX of each text, distinct while there are enough; their
    predictions will be thoughts before the next `ahead` tokens, for which the mask stands. Tokens more than `longest`
    before t are cut off; prompt(the others) -> what a thought is sampled from, token ids."""
    from methods import Task  # here: methods.py imports this file

    tokenizer, proposals = run.sampler.tokenizer, []
    for number, (passage, count) in enumerate(zip(passages, counts, strict=True)):
        rng, tasks = random.Random(derive_seed(run.config.seed, step, "draw", number)), []
        ids = tokenizer(passage.text, add_special_tokens=False).input_ids
        for t in draw_distinct(range(MIN_PREFIX, len(ids)), count, rng):
            position = Position(ids[max(0, t - longest) : t], ids[t : t + ahead])
            target, text = tokenizer.decode(position.ahead_ids), tokenizer.decode(position.prefix_ids)
            mask = Mask(target, masked=text + MASK, target=target, occurrences=1)
            tasks.append(Task(passage, mask, prompt_ids=prompt(position.prefix_ids), position=position))
        proposals.append(tasks)
    return proposals


def propose_positions(run: Run, passages: list[Passage], step: int) -> list[list[Task]]:
    """`rlp`: one random position of each text; the target is the next token."""
    frame = make_frame(run.sampler)
    around = [frame.longest_prefix, lambda ids: frame.head_ids + ids + frame.tail_ids]
    return draw_positions(run, passages, step, [1] * len(passages), 1, *around)


def close_thought(rollout: Rollout, frame: Frame) -> list[int]:
    """A thought as it is scored, token ids: opening tag, sampled tokens, closing tag.

    A thought cut at the limit is closed here, and so is one that ended the sequence, whose EOS would part the text from
    x_t and is left out. The rollout keeps its sampled tokens, so what is added or left out here moves no gradient.
    With <think> = 7, </think> = 8, EOS = 0: [5, 6, 8] "answer" -> [7, 5, 6, 8]; [5, 6] "length" -> [7, 5, 6, 8];
    [5, 0] "eos" -> [7, 5, 8].
    """
    if rollout.finish == "answer":
        return frame.open_ids + rollout.completion_ids
    thought = rollout.completion_ids[:-1] if rollout.finish == "eos" else rollout.completion_ids
    return frame.open_ids + thought + frame.close_ids


def information_gain(
    run: Run, positions: list[Position], thoughts: list[list[list[int]]], frame: Frame
) -> list[list[float]]:  # fmt: skip
    """Reward of each thought of each position: log p_policy(x_t | text, thought) - log p_reference(x_t | text), nats.

    thoughts[i]: of positions[i], as close_thought leaves them; [] is no thought and no tags. At temperature 1, which is
    what the models believe, whatever the thoughts were sampled at. Same lists in and out on every rank. p(x_t) of 0.2
    by the text alone and 0.6 after the thought: a reward of ln 3 = 1.099.
    """
    plain = [(frame.start_ids + position.prefix_ids, position.ahead_ids) for position in positions]
    pairs = zip(plain, thoughts, strict=True)
    informed = [(text + thought, target) for (text, target), group in pairs for thought in group]
    with_thought = iter(score(run.policy, informed, run.config, run.ranks))
    baselines = score(run.reference, plain, run.config, run.ranks)
    return [
        [next(with_thought)[0][0] - baseline for _ in group]
        for ((baseline,), _), group in zip(baselines, thoughts, strict=True)
    ]


def grade_thoughts(run: Run, tasks: list[Task]) -> None:
    """`rlp`: each thought earns its information gain, nats; nothing is right or wrong."""
    frame = make_frame(run.sampler)
    thoughts = [[close_thought(thought, frame) for thought in task.predictions] for task in tasks]
    gains = information_gain(run, [task.position for task in tasks], thoughts, frame)
    for task, group in zip(tasks, gains, strict=True):
        task.rewards = group


def gains_without_thought(run: Run, passages: list[Passage]) -> dict:
    """What `rlp` pays before any thought, mean nats: for nothing at all (0 while policy and average are equal) and for
    an empty pair of think tags (not 0: the tags alone move the next token; a thought first earns that back)."""
    frame = make_frame(run.sampler)
    positions = [task.position for tasks in propose_positions(run, passages, 0) for task in tasks]
    means = {}
    for name, thought in (("no_thought", []), ("empty_thought", frame.open_ids + frame.close_ids)):
        gains = information_gain(run, positions, [[thought]] * len(positions), frame)
        means[f"rlp/{name}_gain"] = fmean(gain for (gain,) in gains)
    return means


def rlp_advantages(rewards: list[float]) -> list[float]:
    """A_i = G / (G - 1) (r_i - mean r): each thought against the mean of the others; G >= 2.

    >>> [round(advantage, 3) for advantage in rlp_advantages([0.9, 0.1, -0.3, 0.1])]
    [0.933, -0.133, -0.667, -0.133]
    """
    scale, mean = len(rewards) / (len(rewards) - 1), fmean(rewards)
    return [scale * (reward - mean) for reward in rewards]


def thought_samples(run: Run, groups: list[Group], tasks: list[Task], passages: list[Passage]) -> list[Sample]:
    """`rlp`: every thought weighs the same, spread evenly over its tokens: weight = 1 / (thoughts * own tokens). No
    group is dropped: rewards are continuous, and a group of equal ones has advantage 0."""
    thoughts, samples = sum(len(group.rollouts) for group in groups), []
    for number, group in enumerate(groups):
        for rollout, advantage in zip(group.rollouts, rlp_advantages(group.rewards), strict=True):
            weight = 1 / (thoughts * len(rollout.completion_ids))
            samples.append(Sample(rollout, advantage, weight, group=number))
    return samples
