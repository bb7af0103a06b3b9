"""Methods: where a step's tasks come from, what their predictions earn, and what is trained on.

`METHODS` at the end of this file has one entry for each method; everything that differs between methods stands in its
entry or in a function that the entry names. The mask methods, `sft` and `quiet_star` spend as many responses a
step as `active`: passages x masks x (1 + predictions); `rlvr` and `rlp` spend passages x predictions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from torch import nn

from config import Config, ConfigError
from data import Corpus, Passage
from grpo import Group, Sample, add_ref_logprobs, make_samples
from masking import Mask, make_mask, random_span
from prompts import (
    BOXED_OPENING, MASK_OPENING, PREDICT_PROMPT, QUESTION_PROMPT, last_answer, mask_prompt, predict_prompt,
    question_prompt,
)  # fmt: skip
from ranks import Ranks
from relatives import next_token, quiet_star, rlp, rlvr
from rewards import INVALID_MASK_REWARD, is_right, mask_rewards, prediction_reward
from rollout import Rollout, Sampler, derive_seed, rollout


@dataclass
class Run:
    """What set-up makes and every phase of a step may need."""

    config: Config
    ranks: Ranks
    corpus: Corpus
    sampler: Sampler
    policy: nn.Module
    reference: nn.Module | None
    """A second copy of the model: frozen, or for `rlp` the moving average; None where the method needs none."""
    optimizer: object
    probe: object = None
    saver: object = None


@dataclass
class Task:
    """A passage, a mask on it and, if the mask is valid, its predictions and rewards. Each is computed once."""

    passage: Passage
    mask: Mask
    proposal: Rollout | None = None
    """The generator's response that named the mask; None where a rule drew it."""
    prompt_ids: list[int] = field(default_factory=list)
    """The prediction prompt; empty if the mask is invalid."""
    predictions: list[Rollout] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    """Of each prediction: 1 right, 0 wrong. Empty for `rlp`, whose thoughts are neither."""
    rewards: list[float] = field(default_factory=list)
    """What each prediction earns in the update: any finite number."""
    proposal_reward: float | None = None
    """What the generator earns for this mask; None where a rule drew it, or before it is known."""
    position: rlp.Position | None = None
    """`rlp`, `quiet_star`: where in the text the thought is taken."""

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return fmean(self.correct)


def make_task(passage: Passage, mask: Mask, sampler: Sampler, proposal: Rollout | None = None) -> Task:
    """With its prediction prompt; a prompt over max_prompt_tokens makes the mask invalid."""
    task = Task(passage, mask, proposal)
    if not mask.invalid:
        task.prompt_ids = (question_prompt if passage.answer else predict_prompt)(sampler, mask.masked)
        if len(task.prompt_ids) > sampler.config.max_prompt_tokens:
            mask.invalid, task.prompt_ids = "prompt_too_long", []
    if mask.invalid and proposal:  # for the probe, which rewards nothing; in a step `reward` sets it again
        task.proposal_reward = INVALID_MASK_REWARD
    return task


# --------------------------------------------------------------------------------------------------- propose: the masks


def propose_masks(run: Run, passages: list[Passage], step: int) -> list[list[Task]]:
    """`active`: the generator reads each passage `masks_per_passage` times and names the words to mask.

    Returns the tasks of each passage; `random_masks` spans, drawn by rule, stand after the generator's."""
    config = run.config
    rngs = [random.Random(derive_seed(config.seed, step, "mask", number)) for number in range(len(passages))]
    proposals = named_masks(run.sampler, passages, (step, "propose"), rngs)
    for passage, tasks, rng in zip(passages, proposals, rngs, strict=True):
        spans = [random_span(passage, config, rng) for _ in range(config.random_masks)]
        tasks += [make_task(passage, span, run.sampler) for span in spans]
    return proposals


def named_masks(sampler: Sampler, passages: list[Passage], noise: tuple, rngs: list[random.Random]) -> list[list[Task]]:
    """The generator's responses to each passage, and the masks that they name. rngs: one for each passage's masks."""
    config = sampler.config
    prompts = [mask_prompt(sampler, passage.text) for passage in passages]
    groups = rollout(sampler, prompts, config.masks_per_passage, config.max_mask_tokens, MASK_OPENING, noise)
    return [
        [make_task(passage, make_mask(last_answer(response.text, "mask"), passage, config, rng), sampler, response)
         for response in group]
        for passage, group, rng in zip(passages, groups, rngs, strict=True)
    ]  # fmt: skip


def masks_by_rule(draw: Callable) -> Callable:
    """A method's `propose` from a rule: draw(run, passage, count, rng) -> `count` masks of the passage, of which
    Mask("", invalid=CAUSE) stands for one that the passage has no words for: the log counts the causes."""

    def propose(run: Run, passages: list[Passage], step: int) -> list[list[Task]]:
        counts = tasks_per_passage(run.config, method_at(run.config, step))
        rngs = (random.Random(derive_seed(run.config.seed, step, "draw", number)) for number in range(len(passages)))
        return [
            [make_task(passage, mask, run.sampler) for mask in draw(run, passage, count, rng)]
            for passage, count, rng in zip(passages, counts, rngs, strict=True)
        ]

    return propose


def span_masks(run: Run, passage: Passage, count: int, rng: random.Random) -> list[Mask]:
    """`random_span`, `sft`: spans by SpanBERT's law."""
    return [random_span(passage, run.config, rng) for _ in range(count)]


def tasks_per_passage(config: Config, method: str) -> list[int]:
    """How many masks each passage of a step gets, so that responses add up to those of `active`.

    active spends passages x masks x (1 + predictions) responses, its masks included; a rule's masks cost none, so it
    draws 1 / predictions more of them. `sft` has one response per mask. 2 passages, 4 masks, 8 predictions:

    >>> from config import Config
    >>> small = Config(passages_per_step=2, masks_per_passage=4, predictions_per_mask=8)
    >>> tasks_per_passage(small, "random_span"), tasks_per_passage(small, "sft")
    ([5, 4], [36, 36])
    """
    passages, predictions = config.passages_per_step, config.predictions_per_mask
    responses = passages * config.masks_per_passage * (1 + predictions)
    total = responses // predictions if METHODS[method].predict else responses
    return [total // passages + (number < total % passages) for number in range(passages)]


# --------------------------------------------------------------------------------------------------- predict and reward


def predict(run: Run, tasks: list[Task], step: int, ends: str = BOXED_OPENING) -> None:
    """The predictor answers each masked passage `predictions_per_mask` times, by chain of thought."""
    prompts, config = [task.prompt_ids for task in tasks], run.config
    noise = (step, "predict")
    groups = rollout(run.sampler, prompts, config.predictions_per_mask, config.max_prediction_tokens, ends, noise)
    for task, group in zip(tasks, groups, strict=True):
        task.predictions = group


def grade_by_match(run: Run, tasks: list[Task]) -> None:
    """Right or wrong by the words of the mask (rewards.is_right)."""
    for task in tasks:
        task.correct = [int(is_right(task, response, run.config)) for response in task.predictions]


def reward(run: Run, method: Method, proposals: list[list[Task]], tasks: list[Task], step: int) -> list[Group]:
    """Sets `correct`, `rewards` and `proposal_reward` of the tasks. Returns the GRPO groups: one per mask, with its
    predictions, then one per passage, with its masks. tasks: the valid ones of proposals, answered."""
    if method.grade:
        method.grade(run, tasks)
    for task in tasks:
        if task.correct:
            pairs = zip(task.predictions, task.correct, strict=True)
            task.rewards = [prediction_reward(task, response, right, run.config) for response, right in pairs]
    groups = [Group("pred", task.predictions, task.rewards) for task in tasks if task.predictions]
    proposed = [[task for task in made if task.proposal] for made in proposals]
    proposed = [made for made in proposed if made]  # masks by rule have no author to reward
    groups += [Group("gen", [one.proposal for one in made], mask_rewards(made, run.config)) for made in proposed]
    if run.config.shuffle_rewards:  # control: the same rewards without connection to the responses
        rng = random.Random(derive_seed(run.config.seed, step, "shuffle"))
        for group in groups:
            group.rewards[:] = rng.sample(group.rewards, len(group.rewards))  # in place: a task holds the same list
    for made, group in zip(proposed, groups[len(groups) - len(proposed) :], strict=True):
        for task, earned in zip(made, group.rewards, strict=True):
            task.proposal_reward = earned
    return groups


# -------------------------------------------------------------------------------------------- what a step is trained on


def grpo_samples(run: Run, groups: list[Group], tasks: list[Task], passages: list[Passage]) -> list[Sample]:
    """Responses with group advantages and token weights; the generator's unless it is frozen. Every rank calls it: with
    a KL penalty the frozen copy scores them."""
    config = run.config
    samples = make_samples([group for group in groups if group.role == "pred" or config.train_generator], config)
    if config.kl:
        add_ref_logprobs(samples, run.reference, run.sampler)
    return samples


def right_samples(run: Run, groups: list[Group], tasks: list[Task], passages: list[Passage]) -> list[Sample]:
    """`star`: the responses that earned something, right ones by default, and cross-entropy on what the model wrote
    (STaR, arXiv 2203.14465, without its rationalisation): no advantage, nothing learnt from the others."""
    pairs = [pair for task in tasks for pair in zip(task.predictions, task.rewards, strict=True)]
    return given_samples([response for response, earned in pairs if earned > 0])


def answer_samples(run: Run, groups: list[Group], tasks: list[Task], passages: list[Passage]) -> list[Sample]:
    """`sft`: the masked words as the answer to the prediction prompt; with `sft_mask` also to the generator's."""
    tokenizer, rollouts = run.sampler.tokenizer, []
    end = min(run.sampler.eos_ids) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    for task in tasks:
        pairs = [(task.prompt_ids, run.config.sft_answer)]
        if run.config.sft_mask:
            pairs.append((mask_prompt(run.sampler, task.passage.text), run.config.sft_mask))
        for prompt_ids, completion in pairs:
            text = completion.replace("{answer}", task.mask.target)
            ids = tokenizer(text, add_special_tokens=False).input_ids + [end]
            rollouts.append(given_rollout(prompt_ids, ids))
    return given_samples(rollouts)


def text_samples(run: Run, groups: list[Group], tasks: list[Task], passages: list[Passage]) -> list[Sample]:
    """`cpt`: each passage after its first token."""
    texts = [run.sampler.tokenizer(passage.text).input_ids for passage in passages]
    return given_samples([given_rollout(ids[:1], ids[1:]) for ids in texts])


def given_samples(rollouts: list[Rollout]) -> list[Sample]:
    """Plain mean cross-entropy: advantage 1, and a weight of one over all trained tokens."""
    tokens = max(1, sum(len(rollout.completion_ids) for rollout in rollouts))
    return [Sample(rollout, 1.0, 1 / tokens, group=number, likelihood=True) for number, rollout in enumerate(rollouts)]


def given_rollout(prompt_ids: list[int], completion_ids: list[int]) -> Rollout:
    """A completion that nobody sampled, so that no sampler log-probs exist."""
    return Rollout(prompt_ids, completion_ids, [], "", "given")


# ------------------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Method:
    """What is special about a method. train.step calls these in order."""

    help: str
    """What happened, in one line, for the model card and the documentation."""
    propose: Callable[[Run, list[Passage], int], list[list[Task]]]
    """(run, passages, step) -> tasks of each passage; invalid masks among them."""
    predict: Callable[[Run, list[Task], int], None] | None = predict
    """(run, tasks, step) fills task.predictions. None: completions are given, nothing is sampled or rewarded."""
    grade: Callable[[Run, list[Task]], None] | None = grade_by_match
    """(run, tasks) fills task.correct, or task.rewards where nothing is right or wrong."""
    samples: Callable[[Run, list[Group], list[Task], list[Passage]], list[Sample]] = grpo_samples
    """(run, groups, tasks, passages) -> what the update trains on."""
    update: Callable[..., dict] | None = None
    """Called like grpo.update and in its place: a loss of the method's own."""
    extra: Callable[[nn.Module, object, Config], nn.Module] | None = None
    """(replica, tokenizer, config) -> the method's own few parameters, see model.add_extra."""
    check: Callable[[Config], None] | None = None
    """Raises ConfigError for what the method must refuse."""
    generator: bool = False
    """The model proposes the masks itself and is trained on that, too."""
    one_task: bool = False
    """One task for each passage; else as many as make the responses add up to those of `active`."""
    at_start: Callable[[Run, list[Passage]], dict] | None = None
    """(run, passages of step 0) -> metrics of the row before training."""
    reference: str = ""
    """`frozen` or `average`: the second copy of the model that the method needs."""
    template: Callable[[Config], str] = lambda config: config.predict_prompt or PREDICT_PROMPT
    """The prompt that a reader of the model card should use, with {passage}; `{passage}` alone: plain text."""
    opening: str = ""
    """What opens the response, behind the prompt."""
    example: str = "The [mask] rises in the Alps and flows into the North Sea at Rotterdam."
    questions: bool = False
    """The data are questions with gold answers, not passages."""
    next_token: bool = False
    """`reward: prefix` makes sense."""
    warmup: bool = True
    """May follow another method, or be followed by one, in a run (`warmup_method`)."""


METHODS = {
    "active": Method(
        "the model chose words to mask in raw text and recovered them by chain of thought; GRPO",
        propose_masks, predict, grade_by_match, grpo_samples, generator=True,
    ),
    "random_span": Method(
        "spans drawn by SpanBERT's law were masked; the model recovered them by chain of thought and was trained by "
        "GRPO on exact matches",
        masks_by_rule(span_masks),
    ),
    "star": Method(
        "spans drawn by SpanBERT's law were masked; the model recovered them by chain of thought and was trained by "
        "cross-entropy on its right responses (STaR, [arXiv:2203.14465](https://arxiv.org/abs/2203.14465))",
        masks_by_rule(span_masks), samples=right_samples,
    ),
    "random_token": Method(
        "texts were cut at random tokens; the model found the next one by chain of thought and was trained by GRPO",
        masks_by_rule(next_token.token_masks), next_token=True,
    ),
    "entropy_token": Method(
        "texts were cut where the start model was least sure of the next token; the model found it by chain of "
        "thought and was trained by GRPO",
        next_token.propose_entropy_tokens, next_token=True, reference="frozen",
    ),
    "rlvr": Method(
        "questions with known answers, checked by math-verify; GRPO",
        masks_by_rule(rlvr.question_masks), grade=rlvr.grade_by_maths, one_task=True, questions=True, warmup=False,
        template=lambda config: config.question_prompt or QUESTION_PROMPT, example="What is 7 times 8?",
    ),
    "rlp": Method(
        "thoughts before a random position of a text, rewarded by the information that they gave about the next token "
        "(RLP, [arXiv:2510.01265](https://arxiv.org/abs/2510.01265))",
        rlp.propose_positions, lambda *given: predict(*given, rlp.THINK_CLOSE), rlp.grade_thoughts, rlp.thought_samples,
        at_start=rlp.gains_without_thought, check=rlp.check, one_task=True, reference="average", warmup=False,
        opening=rlp.THINK_OPEN,
        template=lambda config: config.rlp_prompt or rlp.THOUGHT_PROMPT, example="The Rhine rises in the Alps and",
    ),
    "quiet_star": Method(
        "thoughts after random positions of a text, mixed into the prediction of the next tokens; trained on the "
        "mixture's likelihood, and the better thoughts of a position by REINFORCE (Quiet-STaR, "
        "[arXiv:2403.09629](https://arxiv.org/abs/2403.09629))",
        quiet_star.propose_places, quiet_star.think, quiet_star.grade_thoughts, quiet_star.thought_samples,
        update=quiet_star.update_mixture, extra=quiet_star.Quiet, check=quiet_star.check, warmup=False,
        template=lambda config: "{passage}", example="The Rhine rises in the",
    ),
    "sft": Method(
        "masked words as a question, answered without a thought; cross-entropy on the answers",
        masks_by_rule(span_masks), None, None, answer_samples,
    ),
    "cpt": Method(
        "plain next-token loss on the same text (continued pretraining)",
        lambda run, passages, step: [[] for _ in passages], None, None, text_samples,
        template=lambda config: "{passage}", example="The Rhine rises in the",
    ),
}  # fmt: skip


def method_at(config: Config, step: int) -> str:
    """The method of a step (from 0): warmup_method first, if there is one."""
    return config.warmup_method if config.warmup_method and step < config.warmup_method_steps else config.method


def methods_of(config: Config) -> list[Method]:
    """The methods of a run, the warm-up's too."""
    return [METHODS[name] for name in (config.method, config.warmup_method) if name]


def needs_reference(config: Config) -> bool:
    """Whether the run keeps a second copy of the model."""
    return config.kl > 0 or any(method.reference for method in methods_of(config))


def check_methods(config: Config) -> None:
    """Raises ConfigError for methods that do not exist or do not go with other keys."""
    for key in ("method", "warmup_method"):
        name = getattr(config, key)
        if name not in METHODS and (name or key == "method"):
            raise ConfigError(f"{key}={name!r}: must be one of {', '.join(METHODS)}")
    methods, names = methods_of(config), ", ".join(sorted({config.method, config.warmup_method} - {""}))
    if config.reward == "prefix" and not all(method.next_token for method in methods):
        known = " and ".join(name for name, method in METHODS.items() if method.next_token)
        raise ConfigError(f"reward='prefix': for {known} only, not {names}")
    if config.kl and not all(method.samples is grpo_samples for method in methods):
        others = [name for name, method in METHODS.items() if method.samples is not grpo_samples]
        raise ConfigError(f"kl={config.kl}: must be 0 with {', '.join(others)}")
    for keys, reads in (
        ("advantage_std loss_mean mask_truncated", lambda method: method.samples is grpo_samples),
        ("generator_reward train_generator random_masks", lambda method: method.generator),
        ("shuffle_rewards", lambda method: method.predict),
    ):
        for key in keys.split():
            if getattr(config, key) != getattr(Config, key) and not any(map(reads, methods)):
                raise ConfigError(f"{key}={getattr(config, key)!r}: changes nothing with {names}")
    if config.offload and needs_reference(config):
        raise ConfigError("offload=True: must be false with rlp, entropy_token and kl, which keep a second copy")
    if config.warmup_method and not all(method.warmup for method in methods):
        what = "cannot be combined with rlvr, rlp or quiet_star; warmup_method= switches it off"
        raise ConfigError(f"warmup_method={config.warmup_method!r}: {what}")
    for method in methods:
        if method.check:
            method.check(config)
