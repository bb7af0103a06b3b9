"""quiet_star: a thought before any token, mixed into the prediction of the text that follows (arXiv 2403.09629).

After a position of a text the model writes thoughts c, `max_prediction_tokens` sampled tokens each, between two
learned marks whose embeddings start as that of "---". A small head weighs the hidden state h at a text token without
the thought against h' at the same token behind it:

    w     = sigmoid(head(h, h')),   log p_talk = log softmax(W ((1 - w) h + w h'))        W: the LM head
    r_i   = mean of log p_talk over the next `ahead_tokens` true tokens, nats a token, teacher-forced behind thought i
    L     = - mean_i [ r_i + max(0, r_i - mean r) * sum_t log p(c_it) ]       gradient through the first r_i and log p

W is linear, so this mixes logits. The paper writes a mixture of log-probs, which is the same once normalised. The
second term is REINFORCE. Thoughts below the mean of their position are left out, as in the paper: steadier, and biased.
It goes through grpo.update, with its importance weights, mini-batches and clip.

The paper thinks after all positions of a text in parallel, by an attention mask. Here positions are drawn, as many as
make the responses add up to those of `active`. The thoughts at a position share one pass over the text before it. The
paper gives marks and REINFORCE a scale of their own; here all parameters have the same optimizer, all terms weight 1.

The marks are ids behind the vocabulary that only the embedding knows. So the ordinary sampler samples thoughts behind
the learned mark itself, and the head cannot write a mark. Probe and exported model answer without these thoughts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from config import Config, ConfigError
from data import Passage
from grpo import Group, MicroBatch, Sample, make_micro_batches, update
from ops import pack, token_logprobs
from prompts import leading_ids
from ranks import Ranks, gather
from relatives import rlp
from relatives.rlp import MIN_PREFIX, Position
from rollout import Rollout, derive_seed

if TYPE_CHECKING:
    from methods import Run, Task

MARK = "---"


class Quiet(nn.Module):
    """The method's own parameters: embeddings of the two marks and the mixing head, the same on every rank."""

    def __init__(self, model: nn.Module, tokenizer, config: Config):
        super().__init__()
        table = model.get_input_embeddings().weight
        vocabulary, hidden = table.shape
        self.start_id = vocabulary  # of the opening mark; the closing one is the next
        ids = torch.tensor(tokenizer(MARK, add_special_tokens=False).input_ids, device=table.device)  # mostly one
        noise = torch.Generator().manual_seed(derive_seed(config.seed, "quiet_star"))
        inner = torch.randn(hidden, 2 * hidden, generator=noise) / (2 * hidden) ** 0.5
        self.marks = nn.Parameter(table[ids].float().mean(0).repeat(2, 1))
        self.inner, self.outer = nn.Parameter(inner), nn.Parameter(torch.zeros(hidden))  # w is one half at first
        self.to(table.device, table.dtype).requires_grad_(False)

    def join(self, model: nn.Module) -> None:
        """From here on the model's embedding knows the marks; it looks up all other ids as before."""
        table = model.get_input_embeddings()
        look_up = type(table).forward

        def forward(ids: Tensor) -> Tensor:
            is_mark = ids >= self.start_id
            words = look_up(table, ids.masked_fill(is_mark, 0))
            return torch.where(is_mark[..., None], self.marks[(ids - self.start_id).clamp(min=0)], words)

        table.forward = forward

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Hidden states (N, H) without and with the thought -> weights (N,) of the second, between 0 and 1."""
        return torch.sigmoid(torch.relu(torch.cat([before, after], -1) @ self.inner.t()) @ self.outer)


def check(config: Config) -> None:
    """Raises ConfigError for values that do not go with this method."""
    rlp.check(config)
    if not config.share_prompts:
        raise ConfigError("share_prompts=False: must be true with quiet_star, whose thoughts continue one text")
    if config.max_prompt_tokens < (least := 2 * config.ahead_tokens + 2 * MIN_PREFIX):
        raise ConfigError(f"max_prompt_tokens={config.max_prompt_tokens}: must be at least {least}")


@dataclass
class Thought(Sample):
    """A thought and the text behind it. Its rollout's prompt ends with the opening mark."""

    place: Position | None = None
    number: int = 0  # in the list of the step

    @property
    def tokens(self) -> int:
        return len(self.rollout.completion_ids) + 1 + 2 * (len(self.place.ahead_ids) - 1)  # the text twice

    @property
    def shares(self) -> tuple:
        return *self.rollout.prompt_ids, None, *self.place.ahead_ids  # two passages may begin alike


def propose_places(run: Run, passages: list[Passage], step: int) -> list[list[Task]]:
    """Random positions of each text, as many as make the responses add up to those of `active`."""
    from methods import tasks_per_passage  # here: methods.py imports this file

    config, start_ids, mark = run.config, leading_ids(run.sampler.tokenizer), run.sampler.replica.extra.start_id
    room = config.max_prompt_tokens - 2 * config.ahead_tokens - len(start_ids)  # so that a thought fits a micro-batch
    counts = tasks_per_passage(config, "quiet_star")
    around = [config.ahead_tokens, room, lambda ids: [*start_ids, *ids, mark]]
    return rlp.draw_positions(run, passages, step, counts, *around)


def think(run: Run, tasks: list[Task], step: int) -> None:
    """Thoughts of exactly `max_prediction_tokens` tokens: neither an answer nor the end of a sequence ends them."""
    from methods import predict

    sampler = replace(run.sampler, eos_ids={-1}, config=replace(run.config, stop_at_answer=False))
    predict(replace(run, sampler=sampler), tasks, step)


@dataclass
class TalkBatch(MicroBatch):
    """Of each text token behind each thought (N of them), beside what the thoughts' own tokens need."""

    thoughts: list[Thought]
    before: Tensor  # (N,) where the row predicts it without the thought
    after: Tensor  # (N,) where the row predicts it behind the thought
    ahead: Tensor  # (N,) the true tokens
    ahead_weights: Tensor  # (N,)


def pack_thoughts(bundles: list[list[Thought]], device: torch.device) -> TalkBatch:
    """Thoughts, bundled by position -> one packed row. The text before a position stands in it once; the tokens ahead
    continue it, and so does each thought: opening mark, sampled tokens, closing mark, and those tokens again."""
    thoughts = [thought for bundle in bundles for thought in bundle]
    if not bundles:  # nothing to do here, but every rank must run the same collectives: a dummy of weight zero
        bundles = [[Thought(Rollout([0, 0], [0], [0.0], "", "length"), 0.0, place=Position([0], [0]))]]
    rows, prefixes, begins = [], [], [0]

    def add(tokens: list[int], prefix: int | None) -> int:
        """A sequence behind that of number `prefix`; returns where it begins in the row."""
        rows.append(tokens)
        prefixes.append(prefix)
        begins.append(begins[-1] + len(tokens))
        return begins[-2]

    predicts, targets, before, after, ahead, per_token, per_ahead = ([] for _ in range(7))
    for bundle in bundles:
        (*prefix, mark), text = bundle[0].rollout.prompt_ids, bundle[0].place.ahead_ids
        own, rest = len(rows), text[:-1]
        last = add(prefix, None) + len(prefix) - 1
        begin = add(rest, own) if rest else 0
        plain = [last, *range(begin, begin + len(rest))]
        for thought in bundle:
            completion, weight = thought.rollout.completion_ids, thought.weight
            begin = add([mark, *completion, mark + 1, *rest], own)
            end = begin + len(completion)
            predicts += range(begin, end)
            targets += completion
            before += plain
            after += range(end + 1, end + 1 + len(text))
            ahead += text
            per_token += [(one, thought.advantage, weight, 0.0) for one in thought.rollout.sampler_logprobs]
            per_ahead += [weight * len(completion) / len(text)] * len(text)
    values, ahead_weights = (torch.tensor(one, dtype=torch.float32, device=device) for one in (per_token, per_ahead))
    numbers = [torch.tensor(one, device=device) for one in (predicts, targets, before, after, ahead)]
    packed = MicroBatch(pack(rows, device, prefixes), *numbers[:2], *values.unbind(1))
    return TalkBatch(*vars(packed).values(), thoughts, *numbers[2:], ahead_weights)


def talk(model: nn.Module, batch: TalkBatch, temperature: float, input_ids: Tensor, position_ids: Tensor, **attention):
    """A forward of the policy in place of its own. Returns log-probs (M,) and entropies (M,) of the thoughts' tokens;
    log-probs (N,) of the text under the mixture, the thought's weights (N,) in it, and log-probs (N,) of the text
    without a thought (None where gradients are wanted); nats."""
    decoder, table = getattr(model, model.base_model_prefix), model.get_output_embeddings().weight
    hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention).last_hidden_state[0]
    logprobs, entropies = token_logprobs(hidden[batch.predicts], table, batch.targets, temperature)
    before, after = hidden[batch.before], hidden[batch.after]
    mix = model.extra(before, after)
    mixed, _ = token_logprobs(torch.lerp(before, after, mix[:, None]), table, batch.ahead, 1.0)
    plain = None if torch.is_grad_enabled() else token_logprobs(before, table, batch.ahead, 1.0)[0]
    return logprobs, entropies, mixed, mix, plain


@torch.no_grad()
def grade_thoughts(run: Run, tasks: list[Task]) -> None:
    """Each thought earns the mean log-prob of the text behind it under the mixture, nats a token; a collective."""
    pairs = [(one, task.position) for task in tasks for one in task.predictions]
    thoughts, mine = [Thought(one, 0.0, place=place, number=n) for n, (one, place) in enumerate(pairs)], []
    for batch in make_micro_batches(thoughts, run.config, run.ranks, pack_thoughts):
        _, _, mixed, mix, plain = run.policy(forward=talk, batch=batch, temperature=1.0, **batch.inputs)
        lengths = [len(thought.place.ahead_ids) for thought in batch.thoughts]
        means = ([part.mean().item() for part in one[: sum(lengths)].split(lengths)] for one in (mixed, plain, mix))
        mine += zip((thought.number for thought in batch.thoughts), *means, strict=True)
    scores = iter(sorted(gather(mine)))
    for task in tasks:
        own = [next(scores) for _ in task.predictions]
        task.rewards = [mixed for _, mixed, _, _ in own]
        task.position.gains = [mixed - plain for _, mixed, plain, _ in own]
        task.position.mixes = [mix for *_, mix in own]


def thought_samples(run: Run, groups: list[Group], tasks: list[Task], passages: list[Passage]) -> list[Sample]:
    """Every thought with max(0, reward - mean of its position) for its log-prob, a sum over its tokens."""
    total = sum(len(group.rollouts) for group in groups)
    samples = []
    for number, (group, task) in enumerate(zip(groups, tasks, strict=True)):
        mean = fmean(group.rewards)
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
            length = len(rollout.completion_ids)  # all tokens' weights add up to 1: grpo.mini_batches wants it
            advantage = length * max(0.0, reward - mean)
            samples.append(Thought(rollout, advantage, 1 / (total * length), group=number, place=task.position))
    return samples


def mixture_loss(policy: nn.Module, batch: TalkBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies of the thoughts' tokens, and the mixture's negative log-likelihood (grpo.update)."""
    logprobs, entropies, mixed, *_ = policy(forward=talk, batch=batch, temperature=temperature, **batch.inputs)
    return logprobs, entropies, -(batch.ahead_weights * mixed).sum()


def update_mixture(policy, optimizer, samples: list[Thought], config: Config, ranks: Ranks, step: int) -> dict:
    """grpo.update with this method's loss. `quiet/gain`: what the mixture gained over no thought, nats a token;
    `quiet/mix`: the thought's weight in it; both means, before the update."""
    metrics = update(policy, optimizer, samples, config, ranks, step, pack_thoughts, mixture_loss)
    places = list({id(thought.place): thought.place for thought in samples}.values())
    metrics["quiet/gain"] = fmean(gain for place in places for gain in place.gains)
    metrics["quiet/mix"] = fmean(mix for place in places for mix in place.mixes)
    return metrics
