"""The methods: what each draws, spends, earns and trains on, by hand and against the plain model."""

import doctest
import math
import random
import re
import string
from collections import Counter
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from reference import (ROOT, TINY_BASE, CaptureGradients, largest_error, load_plain, make_run, naive_score, tiny_config,
                       wiki_passages)  # fmt: skip

import masking
import methods
from config import Config, ConfigError
from data import Passage
from prompts import chat_frame, leading_ids, mask_prompt, predict_prompt, question_prompt
from text.files import DataError
from grpo import Group, update
from masking import Mask, make_mask
from methods import METHODS, Task, make_task, reward
from metrics import sample_rows, step_metrics
from model import build_reference, load_tokenizer
from relatives import next_token, rlp, rlvr
from relatives.next_token import LOOKAHEAD, next_token_mask
from relatives.rlp import Position, make_frame
from rewards import answerable
from rollout import Rollout

BONN = Passage("1#0", "Bonn", "", "Bonn is old.")
BONN_TOKENS = [(0, 4), (4, 7), (7, 11), (11, 12)]
QUESTIONS = [Passage(f"q:{n}", "", "", f"What is {n} + 1 ?", answer=str(n + 1)) for n in range(4)]
RIGHT, WRONG = r"It flows. \boxed{Rhine}", r"\boxed{Elbe}"


@pytest.fixture
def run(build_sampler):
    """On the tiny base, with a second copy. Its tokenizer merges letters, keeps the space before a word, adds <bos>."""
    return with_copy(build_sampler(TINY_BASE, max_prompt_tokens=192, predict_prompt=" {passage}\nPredict:"))


@pytest.fixture
def bytes_run(build_sampler, folders):
    """On a random model whose tokens are bytes and whose texts begin with themselves."""
    return with_copy(build_sampler(folders["smollm3"]))


def with_copy(sampler):
    made = make_run(sampler)
    made.reference = build_reference(sampler.replica, made.config, made.ranks)
    return made


def offsets(run, text: str) -> list[tuple[int, int]]:
    """(start, end) of each token in characters."""
    return run.sampler.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def draw(run, method: str, passages: list[Passage], step: int = 0, **sizes) -> list[list[Task]]:
    """The tasks of a step with these passages."""
    for key, value in {"method": method, "passages_per_step": len(passages), **sizes}.items():
        setattr(run.config, key, value)
    return METHODS[method].propose(run, passages, step)


def said(text: str, tokens: int = 2) -> Rollout:
    return Rollout([1], [2] * tokens, [-1.0] * tokens, text, "eos")


# ------------------------------------------------------------------------------------------------- what a method spends
@pytest.mark.parametrize("module, least", [(masking, 12), (methods, 3), (next_token, 6), (rlp, 1), (rlvr, 5)])
def test_examples_in_the_docstrings(module, least):
    results = doctest.testmod(module)
    assert results.attempted >= least and results.failed == 0


def test_a_rule_draws_masks_for_the_responses_that_the_generator_would_have_cost():
    """`active`: 8 passages x 4 masks x (1 + 8) = 288 responses; 36 masks x 8 predictions are as many."""
    small = Config(passages_per_step=8, masks_per_passage=4, predictions_per_mask=8)
    assert methods.tasks_per_passage(small, "random_span") == [5, 5, 5, 5, 4, 4, 4, 4]
    assert methods.tasks_per_passage(small, "sft") == [36] * 8
    assert methods.tasks_per_passage(Config(), "random_token") == [9] * 32  # the paper's 2304 responses, 288 masks
    for passages, masks, predictions in ((1, 2, 3), (3, 4, 16), (7, 8, 8), (32, 2, 2)):
        config = Config(passages_per_step=passages, masks_per_passage=masks, predictions_per_mask=predictions)
        counts, active = methods.tasks_per_passage(config, "random_span"), passages * masks * (1 + predictions)
        assert len(counts) == passages and max(counts) - min(counts) <= 1
        assert 0 <= active - sum(counts) * predictions < predictions


@pytest.mark.parametrize(("method", "counts"), [
    ("random_span", [5, 4]), ("random_token", [5, 4]), ("entropy_token", [5, 4]), ("sft", [36, 36]),
    ("rlvr", [1, 1]), ("rlp", [1, 1]), ("cpt", [0, 0]),
])  # fmt: skip
def test_a_steps_tasks_are_so_many_and_a_function_of_seed_and_step(run, method, counts):
    def drawn(step: int, seed: int = 0) -> list:
        run.config.seed = seed
        random.seed(step)  # what else draws must not matter
        groups = draw(run, method, passages, step, masks_per_passage=4, predictions_per_mask=8)
        return [[(task.mask, task.prompt_ids, task.position) for task in group] for group in groups]

    passages = QUESTIONS[:2] if method == "rlvr" else wiki_passages(2)
    first = drawn(5)
    assert [len(group) for group in first] == counts and drawn(5) == first
    if method not in ("rlvr", "cpt"):  # which draw nothing: they take a step's passages as they are
        assert drawn(6) != first and drawn(5, seed=1) != first


def test_a_second_copy_is_kept_where_something_reads_it():
    for keys in ({"method": "rlp"}, {"method": "entropy_token"}, {"warmup_method": "entropy_token"}, {"kl": 0.01}):
        assert methods.needs_reference(Config(**keys))
    others = set(METHODS) - {"rlp", "entropy_token"}
    assert not any(methods.needs_reference(Config(method=name)) for name in others)


# ----------------------------------------------------------------------------------------------------- next-token masks
def bonn_mask(number: int) -> Mask:
    return next_token_mask(BONN, BONN_TOKENS, number, Config())


def test_a_next_token_mask_ends_the_passage_and_leaves_the_tokens_space_in_front():
    """Its prefixes are the continuation up to each token border, no longer than the look-ahead."""
    assert bonn_mask(2) == Mask("old", "", "Bonn is [mask]", "old", 1, 8, "content", ("old", "old."))
    for number, target in ((3, "."), (4, "")):  # a token without letter or digit is no target
        mask = next_token_mask(Passage("1#0", "", "", "Bonn is old.  "), [*BONN_TOKENS, (12, 14)], number, Config())
        assert (mask.words, mask.invalid, mask.masked, mask.prefixes) == (target, "not_answerable", "", ())
    labelled = replace(BONN, labels=["copy", "template", "fact"])
    assert [next_token_mask(labelled, BONN_TOKENS, number, Config()).label for number in (1, 2)] == ["template", "fact"]
    text, spans = " ".join(string.ascii_lowercase), [(0, 1)] + [(2 * n - 1, 2 * n + 1) for n in range(1, 26)]
    mask = next_token_mask(Passage("1#0", "", "", text), spans, 3, Config())
    assert mask.masked == "a b c [mask]" and len(mask.prefixes) == LOOKAHEAD == 16
    assert mask.prefixes[:3] == ("d", "d e", "d e f") and mask.prefixes[-1] == text[6 : 6 + 31]


def test_candidates_by_hand():
    text, spans = "Ann, 7 – é b", [(0, 3), (3, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    assert next_token.candidates(spans, text, None, 0.2) == [2, 4, 5]  # not the first, no comma, no dash
    entropies = [9.0, 8.0, 1.0, 7.0, 3.0, 2.0]
    assert next_token.candidates(spans, text, entropies, 0.2) == [4]  # a fifth of three is none, so one
    assert next_token.candidates(spans, text, entropies, 0.67) == [4, 5]  # of those that may be drawn
    assert next_token.candidates(spans, text, entropies, 1.0) == [2, 4, 5]  # in the order of the text
    assert next_token.candidates(spans[:2], text, entropies[:2], 0.2) == next_token.candidates([], "", None, 0.2) == []


def test_random_tokens_are_drawn_uniformly_without_repeats_in_a_step(run):
    """3 masks a step; chi-square over the tokens with a letter or digit, but the first."""
    passage = wiki_passages(1)[0]
    spans, starts = offsets(run, passage.text), Counter()
    for step in range(500):
        (drawn,) = draw(run, "random_token", [passage], step)
        assert len({task.mask.start for task in drawn}) == 3
        starts.update(task.mask.start for task in drawn)
    words = [passage.text[start:end] for start, end in spans[1:]]
    allowed = [end - len(word.strip()) for (_, end), word in zip(spans[1:], words, strict=True) if answerable(word)]
    assert sorted(starts) == allowed and 20 < len(allowed) < len(spans) - 1
    expected, freedom = 1500 / len(allowed), len(allowed) - 1
    chi_square = sum((starts[start] - expected) ** 2 / expected for start in allowed)
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_text_with_fewer_words_than_masks_repeats_and_one_without_any_gives_none(run):
    passages = [Passage("1#0", "", "", "... near mountains ."), Passage("2#0", "", "", "... . –")]
    repeated, without = draw(run, "random_token", passages, masks_per_passage=4, predictions_per_mask=8)
    assert {task.mask.target for task in repeated} == {"near", "mountains"} and len(repeated) == 5 and without == []


def plain_entropies(model, tokenizer, text: str) -> list[float]:
    """Of the distribution from which each token of a text would be drawn, by the ordinary model."""
    ids, start = tokenizer(text).input_ids, len(leading_ids(tokenizer))
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    entropies = (-logprobs.exp() * logprobs).sum(-1).tolist()
    return entropies[start - 1 : -1] if start else [0.0, *entropies[:-1]]


def test_token_entropies_are_those_of_the_plain_model(run, bytes_run):
    """Of a text that begins with itself, nothing is said of the first token."""
    plain, passages = load_plain(TINY_BASE).eval(), wiki_passages(12)
    for run.config.tokens_per_micro_batch in (160, 10_000):
        for passage, found in zip(passages, next_token.token_entropies(run, passages), strict=True):
            expected = plain_entropies(plain, run.sampler.tokenizer, passage.text)
            assert found == pytest.approx(expected, abs=5e-5)  # a difference of two sums near 30, in float32
    (found,) = next_token.token_entropies(bytes_run, [BONN])
    expected = plain_entropies(load_plain(bytes_run.config.model).eval(), bytes_run.sampler.tokenizer, BONN.text)
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 12 and found[0] == 0 < min(found[1:])


def test_entropy_tokens_lie_among_the_fifth_where_the_start_model_is_least_sure(run):
    """Over many draws of 3: always there, and everywhere there; random tokens lie there one time in five."""
    passages, plain = wiki_passages(8), load_plain(TINY_BASE).eval()
    with torch.no_grad():  # the model has moved on since; the frozen copy has not
        for parameter in run.sampler.replica.parameters():
            parameter.mul_(-1)
    highest = []
    for passage in passages:
        spans = offsets(run, passage.text)
        entropies = plain_entropies(plain, run.sampler.tokenizer, passage.text)
        allowed = [n for n, (start, end) in enumerate(spans) if n > 0 and answerable(passage.text[start:end])]
        allowed.sort(key=lambda n, entropies=entropies: -entropies[n])
        top = allowed[: len(allowed) // 5]
        assert entropies[top[-1]] > entropies[allowed[len(top)]] + 1e-4  # no tie at the border
        highest.append({passage.text.index(passage.text[slice(*spans[n])].strip(), spans[n][0]) for n in top})

    def shares(method: str) -> tuple[float, list[set]]:
        inside, seen = [], [set() for _ in passages]
        for step in range(20):
            for number, group in enumerate(draw(run, method, passages, step)):
                inside += [task.mask.start in highest[number] for task in group]
                seen[number] |= {task.mask.start for task in group}
        return fmean(inside), seen

    assert shares("entropy_token") == (1.0, highest)
    assert shares("random_token")[0] == pytest.approx(0.2, abs=0.06)


def test_a_prediction_prompt_over_the_limit_makes_the_mask_invalid(run):
    length = len(predict_prompt(run.sampler, "Bonn is [mask]"))
    for limit, cause in ((length, ""), (length - 1, "prompt_too_long")):
        run.config.max_prompt_tokens = limit
        task = make_task(BONN, bonn_mask(2), run.sampler)
        assert (task.mask.invalid, len(task.prompt_ids)) == (cause, 0 if cause else length)


def test_random_masks_beside_the_generators_leave_its_masks_as_they_are(build_sampler, folders):
    sampler = build_sampler(folders["smollm3"], random_masks=2, masks_per_passage=3, max_span_words=2)
    alone = replace(sampler, config=replace(sampler.config, random_masks=0))
    runs = (SimpleNamespace(config=one.config, sampler=one) for one in (sampler, alone))
    mixed, own = (draw(one, "active", [BONN])[0] for one in runs)
    assert [task.mask for task in mixed[:3]] == [task.mask for task in own]
    assert [task.proposal is None for task in mixed] == [False] * 3 + [True] * 2
    # what an invalid mask earns is known before anything is predicted
    assert [(task.mask.invalid, task.proposal_reward) for task in mixed] == [("no_answer", 0.0)] * 3 + [("", None)] * 2
    assert all(task.prompt_ids and not task.mask.invalid for task in mixed[3:])


# -------------------------------------------------------------------------------------------------------------- rewards
RHINE = Passage("1#0", "Bonn", "", "Bonn lies on the Rhine.")


def task(words: str | None, answers: list[str], tokens: int = 2) -> Task:
    """A generator response that names these words, and predictions that say these answers."""
    text = "none" if words is None else rf"\mask{{{words}}}"
    mask = make_mask(words, RHINE, Config(), random.Random(0))
    return Task(RHINE, mask, said(text), prompt_ids=[1], predictions=[said(answer, tokens) for answer in answers])


def rewarded(proposals: list[list[Task]], step: int = 0, method: str = "active", **keys) -> list[Group]:
    """`reward` of methods that look at texts alone, which need no model."""
    tasks = [task for group in proposals for task in group if not task.mask.invalid]
    return reward(SimpleNamespace(config=Config(**keys), ranks=None), METHODS[method], proposals, tasks, step)


def test_rewards_of_one_passage():
    """2 of 4 right, 1 of 4, too easy, impossible; not in the passage and no mask, so without predictions."""
    half, quarter = [RIGHT, WRONG, WRONG, r"\boxed{Rhine}."], [RIGHT, WRONG, "Rhine", r"\boxed{rhine}"]
    tasks = [task("Rhine", some) for some in (half, quarter, [RIGHT] * 4, [WRONG] * 4)]
    tasks += [task("Danube", []), task(None, [])]
    groups = rewarded([tasks])
    assert [(group.role, group.rewards) for group in groups] == [
        ("pred", [1.0, 0.0, 0.0, 1.0]), ("pred", [1.0, 0.0, 0.0, 0.0]), ("pred", [1.0] * 4), ("pred", [0.0] * 4),
        ("gen", [0.5, 0.75, 0.0, 0.0, 0.0, 0.0]),
    ]
    assert groups[-1].rollouts == [one.proposal for one in tasks]  # the generator's group is all of its responses
    assert groups[0].rollouts == tasks[0].predictions
    assert [one.accuracy for one in tasks[:4]] == [0.5, 0.25, 1, 0]
    *predictions, generator = rewarded([tasks], generator_reward="variance")  # p (1 - p); predictions as ever
    assert (generator.role, generator.rewards) == ("gen", [1 / 4, 3 / 16, 0, 0, 0, 0])
    assert [group.rewards for group in predictions] == [group.rewards for group in groups[:-1]]


def test_masks_that_a_rule_drew_reward_no_generator():
    tasks = [task("Rhine", [RIGHT, WRONG]), task("Danube", []), task("Rhine", [RIGHT, WRONG])]
    tasks[2].proposal = None  # a random mask beside the generator's
    assert [(one.role, one.rewards) for one in rewarded([tasks])] == [("pred", [1, 0])] * 2 + [("gen", [0.5, 0])]
    assert tasks[2].proposal_reward is None
    tasks[0].proposal = tasks[1].proposal = None
    assert [one.role for one in rewarded([tasks], method="random_span")] == ["pred", "pred"]


def test_what_is_right_and_what_is_earned_are_decided_once_and_logged_as_the_update_saw_them(monkeypatch):
    """With shuffled rewards, too: what was right stays true, and decides the generator's reward before the shuffle."""
    answers = [RIGHT] * 3 + [WRONG] * 5
    plain, shuffled = ([[task("Rhine", answers), task("Danube", [])]] for _ in range(2))
    groups = {False: rewarded(plain), True: rewarded(shuffled, shuffle_rewards=True)}
    again, later = (rewarded([[task("Rhine", answers)]], step, shuffle_rewards=True)[0].rewards for step in (0, 1))
    assert again == groups[True][0].rewards != later
    monkeypatch.setattr(methods, "is_right", None)  # whoever asks again, fails
    for (mixed, group), proposals in zip(groups.items(), (plain, shuffled), strict=True):
        one, invalid = proposals[0]
        assert one.correct == [1, 1, 1, 0, 0, 0, 0, 0] and sorted(one.rewards, reverse=True) == one.correct
        assert one.rewards == group[0].rewards and (one.rewards == one.correct) == (not mixed)
        assert [one.proposal_reward, invalid.proposal_reward] == group[1].rewards
        assert sorted(group[1].rewards) == [0, 5 / 8]
        logged, other = sample_rows(proposals, 1)
        pairs = list(zip(one.correct, one.rewards, strict=True))
        assert [(row["correct"], row["reward"]) for row in logged["predictions"]] == pairs
        assert [row["proposal"]["reward"] for row in (logged, other)] == group[1].rewards


def test_a_shaped_reward_reaches_the_update_but_not_the_generator(bytes_run, monkeypatch):
    """A right answer loses up to a tenth for its length, and a wrong one too; the first mask is solved by all."""

    def shaped(task, response, right, config):
        return right - 0.1 * len(response.completion_ids) / config.max_prediction_tokens

    monkeypatch.setattr(methods, "prediction_reward", shaped)
    tasks = [task("Rhine", [RIGHT, RIGHT]), task("Rhine", [WRONG, RIGHT]), task("Danube", [])]
    for one in tasks[:2]:
        one.predictions[1].completion_ids, one.predictions[1].sampler_logprobs = [3] * 8, [-5.0] * 8
    groups = reward(bytes_run, METHODS["active"], [tasks], tasks[:2], 0)
    assert [group.rewards for group in groups[:2]] == [pytest.approx([0.975, 0.9]), pytest.approx([-0.025, 0.9])]
    assert groups[2].rewards == [0, 0.5, 0] and tasks[0].correct == [1, 1]
    samples = methods.grpo_samples(bytes_run, groups, tasks[:2], [])
    row = step_metrics([tasks], groups, samples, bytes_run.sampler)
    assert (row["pred/accuracy_one"], row["pred/accuracy"], row["pred/accuracy_histogram"]) == (0.5, 0.75, [0, 1, 1])
    assert row["pred/reward"] == pytest.approx((0.975 + 0.9 - 0.025 + 0.9) / 4)
    result = update(bytes_run.policy, bytes_run.optimizer, samples, bytes_run.config, bytes_run.ranks, 0)
    assert result["trained_responses"] == 7 and result["grad_norm"] > 0  # the solved mask's lengths have contrast
    monkeypatch.setattr(methods, "prediction_reward", lambda *_: 1.5)
    groups = reward(bytes_run, METHODS["active"], [tasks], tasks[:2], 0)
    assert [group.rewards for group in groups] == [[1.5, 1.5], [1.5, 1.5], [0, 0.5, 0]]


def test_the_prefix_reward_by_hand(run):
    task = make_task(BONN, bonn_mask(1), run.sampler)
    answers = ["is", " is old ", "is old.", "is ol", "is old. And", "Is", ""]
    task.predictions = [said(rf"\boxed{{{answer}}}") for answer in answers]
    for kind, rewards in (("prefix", [1, 1, 1, 0, 0, 0, 0]), ("exact", [1, 0, 0, 0, 0, 0, 0])):
        (group,) = rewarded([[task]], method="random_token", reward=kind)
        assert (group.role, group.rollouts, group.rewards) == ("pred", task.predictions, rewards)
        assert task.rewards == rewards


def test_a_frozen_generator_is_rewarded_but_not_trained(run):
    """Neither its tokens nor their number is left in the loss."""
    groups = [Group("pred", [said("a"), said("b")], [1.0, 0.0]), Group("gen", [said("c"), said("d")], [0.5, 0.0])]
    for trained, texts in ((True, "abcd"), (False, "ab")):
        run.config.train_generator = trained
        samples = methods.grpo_samples(run, groups, [], [])
        assert "".join(sample.rollout.text for sample in samples) == texts
        assert {sample.weight for sample in samples} == {1 / (2 * len(texts))}  # two tokens each


# ----------------------------------------------------------------------------------------------- answers that are given
def test_sft_trains_on_the_masked_words_and_the_end_after_the_prediction_prompt(run):
    tokenizer, drawn = run.sampler.tokenizer, [make_task(BONN, bonn_mask(n), run.sampler) for n in (1, 2)]
    prompts = [predict_prompt(run.sampler, masked) for masked in ("Bonn [mask]", "Bonn is [mask]")]
    assert Config().sft_answer == " \\boxed{{answer}}"
    for form in (Config().sft_answer, " \\boxed{ {answer} }"):
        run.config.sft_answer = form
        texts = [form.replace("{answer}", answer) for answer in ("is", "old")]
        given = [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for text in texts]
        samples = methods.answer_samples(run, [], drawn, [])
        found = [(one.rollout.prompt_ids, one.rollout.completion_ids, one.advantage, one.weight) for one in samples]
        weight = 1 / sum(map(len, given))
        assert found == [(prompt, ids, 1.0, weight) for prompt, ids in zip(prompts, given, strict=True)]
    assert methods.answer_samples(run, [], [], [BONN]) == []  # no valid mask
    run.config.sft_mask = " \\mask{{answer}}"  # the generator's format beside it, so that it is not forgotten
    samples = methods.answer_samples(run, [], drawn[:1], [])
    assert [sample.rollout.prompt_ids for sample in samples] == [prompts[0], mask_prompt(run.sampler, BONN.text)]
    assert tokenizer.decode(samples[1].rollout.completion_ids[:-1]) == " \\mask{is}"
    assert sum(sample.weight * len(sample.rollout.completion_ids) for sample in samples) == pytest.approx(1)


def test_star_trains_on_the_responses_that_earned_something_alone():
    """By cross-entropy: advantage 1, and a weight of one over their tokens."""
    tasks = [task("Rhine", some) for some in ([RIGHT, WRONG, RIGHT], [WRONG, WRONG])]
    tasks.append(task("Rhine", [WRONG, RIGHT], tokens=4))
    rewarded([tasks], method="star")
    samples = methods.right_samples(None, [], tasks, [])
    right = [tasks[0].predictions[0], tasks[0].predictions[2], tasks[2].predictions[1]]
    assert [sample.rollout for sample in samples] == right
    assert [(sample.advantage, sample.weight, sample.likelihood) for sample in samples] == [(1.0, 1 / 8, True)] * 3
    assert methods.right_samples(None, [], tasks[1:2], []) == []
    tasks[0].rewards = [0.0, 0.1, 0.0]
    assert [sample.rollout for sample in methods.right_samples(None, [], tasks[:1], [])] == [tasks[0].predictions[1]]


def test_cpt_trains_on_every_token_but_the_first(run, bytes_run):
    for one, passages in ((run, wiki_passages(3)), (bytes_run, [BONN])):  # with <bos>, and with nothing in front
        samples = methods.text_samples(one, [], [], passages)
        for sample, passage in zip(samples, passages, strict=True):
            first, *ids = one.sampler.tokenizer(passage.text).input_ids
            assert (sample.rollout.prompt_ids, sample.rollout.completion_ids) == ([first], ids)
        tokens = sum(len(sample.rollout.completion_ids) for sample in samples)
        assert {(sample.advantage, sample.weight) for sample in samples} == {(1.0, 1 / tokens)}


@pytest.mark.parametrize("method", ["sft", "cpt"])
@pytest.mark.parametrize(("budget", "finish"), [(200, "given"), (10_000, "given"), (10_000, "eos")])
def test_answers_are_learnt_by_plain_mean_cross_entropy(run, method, budget, finish):
    """Loss and gradient of one batch; given ones at temperature 1, sampled ones (`star`) at the sampler's."""
    config, passages = run.config, wiki_passages(4)
    config.tokens_per_micro_batch, config.max_grad_norm, config.max_mismatch = budget, 1e9, 0.0
    config.temperature = 0.5 if finish == "given" else 1.0
    proposals = draw(run, method, passages)
    drawn = [task for group in proposals for task in group]
    assert reward(run, METHODS[method], proposals, drawn, 0) == []
    samples = METHODS[method].samples(run, [], drawn, passages)
    assert len(samples) == (4 * 2 * 3 if method == "sft" else 4)
    for sample in samples:
        sample.rollout.finish = finish
    found, expected = CaptureGradients(run.policy), CaptureGradients(plain := load_plain(TINY_BASE))
    metrics = update(run.policy, found, samples, config, run.ranks, 0)
    rows = [(sample.rollout.prompt_ids, sample.rollout.completion_ids) for sample in samples]
    logits = [plain(input_ids=torch.tensor([p + c]), use_cache=False).logits[0, len(p) - 1 : -1] for p, c in rows]
    targets = [token for _, completion in rows for token in completion]
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(targets))  # the mean over all tokens
    loss.backward()
    expected.step()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert largest_error(found.gradients, expected.gradients) < 1e-4
    assert metrics["trained_tokens"] == len(targets) and metrics["trained_responses"] == len(samples)
    assert metrics["clip_fraction"] == 0 and (metrics["mismatch_abs"] == 0) == (finish == "given")  # nobody sampled


# ------------------------------------------------------------------------------------------------------------ questions
def question_sides(data, heldout: float) -> tuple[dict[str, int], set[str], set[str]]:
    """Counts, texts to train on, texts that are held out; each answer is the sum that its text asks for."""
    corpus = rlvr.question_corpus(Config(data=str(data), heldout=heldout), lambda *_: None)
    for one in corpus.train + corpus.heldout:
        left, right = one.text.removeprefix("What is ").removesuffix(" ?").split(" + ")
        assert int(one.answer) == int(left) + int(right)
    return corpus.counts, *({one.text for one in part} for part in (corpus.train, corpus.heldout))


def test_questions_are_split_by_a_hash_of_their_text(tmp_path):
    """One that stands twice is on one side only; each loses its data set's instruction: the template brings another."""
    file = ROOT / "assets/tiny_questions.jsonl"
    counts, train, heldout = question_sides(file, 0.2)
    assert not train & heldout and len(train | heldout) == 100 and 10 <= len(heldout) <= 30
    assert counts == {"records": 100, "questions": 100, "train": len(train), "heldout": len(heldout)}
    assert heldout < question_sides(file, 0.4)[2]
    ending, file = " Let's think step by step and output the final answer within \\\\boxed{}.", tmp_path / "q.jsonl"
    lines = [f'{{"question": "What is {n} + 0 ?{ending}", "answer": "{n}"}}\n' for n in range(20)]
    file.write_text("".join([*lines, *(line.replace(ending, "") for line in lines)]))  # with the ending and without
    _, train, heldout = question_sides(file, 0.3)
    assert not train & heldout and train | heldout == {f"What is {n} + 0 ?" for n in range(20)}
    file.write_text(lines[0])
    with pytest.raises(DataError, match="1 questions to train on, 0 held out; change heldout"):
        question_sides(file, 1e-9)


def test_a_question_is_asked_as_it_stands_and_a_long_one_not_at_all(run):
    run.config.question_prompt = "Q: {passage}\nA:"
    (task,) = draw(run, "rlvr", QUESTIONS[:1])[0]
    assert task.prompt_ids == question_prompt(run.sampler, "What is 0 + 1 ?") and task.mask.target == "1"
    assert run.sampler.tokenizer.decode(task.prompt_ids, skip_special_tokens=True) == "Q: What is 0 + 1 ?\nA:"
    run.config.max_prompt_tokens = len(task.prompt_ids) - 1
    (task,) = draw(run, "rlvr", QUESTIONS[:1])[0]
    assert (task.mask.invalid, task.prompt_ids) == ("prompt_too_long", [])


def test_questions_are_rewarded_by_math_verify(run):
    golds, answers = ["1/2", "12", "7"], [["0.5", r"\frac12", "2", None], ["12.0", "1,2"], ["7", "7"]]
    verdicts = [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert rlvr.verify_predictions(answers, golds, run.config, run.ranks) == verdicts
    proposals = draw(run, "rlvr", [Passage(f"{n}", "", "", "?", answer=gold) for n, gold in enumerate(golds)])
    for (task,), group in zip(proposals, answers, strict=True):
        task.predictions = [said("no box" if one is None else rf"\boxed{{{one}}}") for one in group]
    groups = reward(run, METHODS["rlvr"], proposals, [task for (task,) in proposals], 0)
    assert [(group.role, group.rewards) for group in groups] == [("pred", one) for one in verdicts]


# ------------------------------------------------------------------------------------------- rlp: positions and prompts
TEXT = "The moon turns around the earth, and the earth around the sun."  # one token per byte


def positions_in(run, text: str, step: int = 0) -> list[Position]:
    return [task.position for (task,) in rlp.propose_positions(run, [Passage("0#0", "", "", text)] * 100, step)]


def frame_of(tokenizer, template: str, limit: int, chat=None):
    """make_frame of a sampler with these keys."""
    config = Config(rlp_prompt=template, max_prompt_tokens=limit)
    return make_frame(SimpleNamespace(tokenizer=tokenizer, config=config, frame=chat))


def thought_prompt(frame, prefix_ids: list[int]) -> list[int]:
    return frame.head_ids + prefix_ids + frame.tail_ids


@pytest.fixture
def tokenizer(folders):
    return load_tokenizer(tiny_config(folders["smollm3"]))


def test_a_position_is_a_place_in_the_text_and_each_place_is_drawn(bytes_run, tokenizer):
    bytes_run.config.max_prompt_tokens = 1000
    ids, drawn = tokenizer(TEXT).input_ids, sum((positions_in(bytes_run, TEXT, step) for step in range(15)), [])
    assert all(one == Position(ids[: (n := len(one.prefix_ids))], [ids[n]]) for one in drawn)
    assert {len(position.prefix_ids) for position in drawn} == set(range(rlp.MIN_PREFIX, len(ids)))
    assert positions_in(bytes_run, "123456789")[0].prefix_ids == tokenizer("12345678").input_ids


def test_a_text_too_long_before_the_position_loses_its_beginning(bytes_run, tokenizer):
    """The limit holds for what is sampled from, and for what is scored with an empty thought and the target."""
    bytes_run.config.max_prompt_tokens, bytes_run.config.rlp_prompt = 40, "{passage}"
    frame, ids = make_frame(bytes_run.sampler), tokenizer(TEXT * 4).input_ids
    (task, *_), *_ = rlp.propose_positions(bytes_run, [Passage("0#0", "", "", TEXT * 4)] * 2, 0)
    prefix, text = task.position.prefix_ids, bytes(ids)
    assert len(prefix) == frame.longest_prefix and bytes(prefix + task.position.ahead_ids) in text
    assert task.prompt_ids == thought_prompt(frame, prefix) and len(task.prompt_ids) <= 40
    assert len(frame.start_ids + prefix + frame.open_ids + frame.close_ids) + 1 == 40


@pytest.mark.parametrize(("chat_template", "template", "expected"), [
    (None, rlp.THOUGHT_PROMPT, rlp.THOUGHT_PROMPT.replace("{passage}", "Salt melts ") + rlp.THINK_OPEN),
    ("[{{ messages[0].content }}]{% if add_generation_prompt %}A:{% endif %}", "Go on: {passage}!",
     "[Go on: Salt melts !]A:<think>"),
])  # fmt: skip
def test_a_prompt_is_the_request_around_the_text_and_opens_the_thought(tokenizer, chat_template, template, expected):
    """With a chat template the request is one turn, and the thought opens the answer."""
    tokenizer.chat_template = chat_template
    frame = frame_of(tokenizer, template, 1000, chat_frame(tokenizer))
    assert tokenizer.decode(thought_prompt(frame, tokenizer("Salt melts ").input_ids)) == expected


def test_text_ids_are_never_tokenized_again():
    """The tiny base's tokenizer merges and writes <bos>: ids that no tokenizer would make of their text survive."""
    tokenizer = load_tokenizer(tiny_config(TINY_BASE))
    frame = frame_of(tokenizer, "Text: {passage}\n", 100)
    letters = [tokenizer(char, add_special_tokens=False).input_ids[0] for char in "Finn grew"]
    assert tokenizer("Finn grew", add_special_tokens=False).input_ids != letters
    prompt, begin = thought_prompt(frame, letters), len(frame.head_ids)
    assert prompt[begin : begin + len(letters)] == letters and frame.start_ids == [tokenizer.bos_token_id]
    assert tokenizer.decode(prompt) == "<bos>Text: Finn grew\n<think>" and prompt.count(tokenizer.bos_token_id) == 1


def test_a_request_without_room_for_text_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="max_prompt_tokens=20: must be at least [0-9]+") as caught:
        frame_of(tokenizer, rlp.THOUGHT_PROMPT, 20)
    least = int(re.search("at least ([0-9]+)", str(caught.value))[1])
    frame = frame_of(tokenizer, rlp.THOUGHT_PROMPT, least)
    assert frame.longest_prefix == rlp.MIN_PREFIX
    assert len(thought_prompt(frame, [0] * rlp.MIN_PREFIX)) == least


# ------------------------------------------------------------------------------------------------------- rlp: thoughts
@pytest.mark.parametrize(("method", "closing", "stop"), [
    ("rlp", "</think>", True), ("rlp", "</think>", False), ("random_span", r"\boxed{a}", True),
])  # fmt: skip
def test_what_ends_a_prediction_is_what_its_method_waits_for(run, method, closing, stop):
    """Every token is declared to be the one, then the other. The tag ends a thought by definition, whatever the key."""
    run.config.stop_at_answer = stop
    drawn = [task for group in draw(run, method, wiki_passages(2)) for task in group]
    for piece in ("</think>", r"\boxed{a}"):
        run.sampler.pieces |= {token: piece for token in range(len(run.sampler.tokenizer))}
        METHODS[method].predict(run, drawn, 0)
        ends = {(len(one.completion_ids), one.finish) for task in drawn for one in task.predictions} - {(1, "eos")}
        assert ((1, "answer") in ends) == (piece == closing) and (len(ends) == 1 or piece != closing)
        assert all(len(task.predictions) == 2 for task in drawn)


def test_every_thought_is_closed_once_before_it_is_scored():
    """Closed by itself, cut at the limit, ended (the text goes on). Trained are the sampled tokens and no others."""
    frame = rlp.Frame([], [], [7], [7], [8], 100)
    for sampled, finish, scored in (([5, 6, 8], "answer", [7, 5, 6, 8]), ([5, 6], "length", [7, 5, 6, 8]),
                                    ([5, 0], "eos", [7, 5, 8]), ([0], "eos", [7, 8])):  # fmt: skip
        thought = Rollout([1], [*sampled], [0.0] * len(sampled), "", finish)
        assert rlp.close_thought(thought, frame) == scored and thought.completion_ids == sampled


# --------------------------------------------------------------------------------------------------------- rlp: rewards
@pytest.mark.parametrize("base", ["tiny_base", "random"])
def test_the_reward_is_the_log_ratio_of_two_forwards_of_the_plain_model(request, base):
    """Of a policy that has moved from its average, at temperature 1; <bos>, if any, stands in both contexts."""
    run = request.getfixturevalue("run" if base == "tiny_base" else "bytes_run")
    trained, frame = load_plain(run.config.model).eval(), make_frame(run.sampler)
    average, generator = load_plain(run.config.model).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ours, theirs in zip(run.policy.parameters(), trained.parameters(), strict=True):
            theirs.add_(0.05 * torch.randn(theirs.shape, generator=generator))
            ours.to_local().copy_(theirs)
    positions = [Position(list(range(n)), [100 + n]) for n in (9, 30, 12)]
    thoughts = [[[7, 8], [7, 5, 6, 8]], [[7, *range(40), 8], []], [[7, 5, 8], [7, 9, 8]]]
    found = rlp.information_gain(run, positions, thoughts, frame)
    for position, group, gains in zip(positions, thoughts, found, strict=True):
        text, target = frame.start_ids + position.prefix_ids, position.ahead_ids
        ((baseline,), _), = naive_score(average, [(text, target)])
        for thought, gain in zip(group, gains, strict=True):
            ((logprob,), _), = naive_score(trained, [(text + thought, target)])
            assert gain == pytest.approx(logprob - baseline, abs=1e-4)
    assert len(frame.start_ids) == (base == "tiny_base")
    run.config.temperature = 0.7
    assert rlp.information_gain(run, positions, thoughts, frame) == found


def test_thoughts_are_rewarded_by_the_information_they_give_however_they_ended(run):
    frame = make_frame(run.sampler)
    proposals, ends = draw(run, "rlp", wiki_passages(2)), ("length", "eos", "answer")
    drawn = [task for (task,) in proposals]
    for task in drawn:
        ids = run.sampler.tokenizer("near mountains", add_special_tokens=False).input_ids
        task.predictions = [Rollout(task.prompt_ids, ids, [-1.0] * len(ids), "", end) for end in ends]
    groups = reward(run, METHODS["rlp"], proposals, drawn, 0)
    thoughts = [[rlp.close_thought(one, frame) for one in task.predictions] for task in drawn]
    expected = rlp.information_gain(run, [task.position for task in drawn], thoughts, frame)
    assert [group.rewards for group in groups] == [task.rewards for task in drawn] == expected
    assert len(set(expected[0])) == 3 and not any(task.correct for task in drawn)
    samples = rlp.thought_samples(run, groups, drawn, [])
    assert [sample.rollout for sample in samples] == [one for task in drawn for one in task.predictions]
    rlp.grade_thoughts(run, [])  # a step without a position


def test_before_any_thought_nothing_is_gained_but_what_the_tags_do(run):
    passages, frame = wiki_passages(2), make_frame(run.sampler)
    gains = rlp.gains_without_thought(run, passages)
    assert abs(gains["rlp/no_thought_gain"]) < 1e-5 < 0.01 < abs(gains["rlp/empty_thought_gain"])
    tags = frame.open_ids + frame.close_ids
    assert run.sampler.tokenizer.decode(tags) == "<think></think>"
    positions = [task.position for (task,) in draw(run, "rlp", passages)]
    expected = fmean(gain for (gain,) in rlp.information_gain(run, positions, [[tags]] * 2, frame))
    assert gains["rlp/empty_thought_gain"] == pytest.approx(expected)


def test_an_advantage_is_the_distance_to_the_mean_of_the_others_and_every_thought_weighs_the_same():
    """Not divided by the deviation; whatever the lengths."""
    rewards = [0.4, -1.2, 3.0, 0.1, 0.0]
    for index, advantage in enumerate(rlp.rlp_advantages(rewards)):
        assert advantage == pytest.approx(rewards[index] - fmean(rewards[:index] + rewards[index + 1 :]))
    assert rlp.rlp_advantages([20.0, -20.0]) == pytest.approx([40.0, -40.0])
    thoughts = [said("", tokens) for tokens in (1, 4, 10, 5)]
    groups = [Group("pred", thoughts[:2], [0.5, 0.1]), Group("pred", thoughts[2:], [0.3, 0.3])]
    samples = rlp.thought_samples(None, groups, [], [])
    assert [sample.rollout for sample in samples] == thoughts  # none dropped, a group of equal rewards neither
    assert [sample.advantage for sample in samples] == pytest.approx([0.4, -0.4, 0, 0])
    assert [sample.weight for sample in samples] == pytest.approx([1 / 4, 1 / 16, 1 / 40, 1 / 20])
    assert [sample.group for sample in samples] == [0, 0, 1, 1]
