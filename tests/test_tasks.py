"""The methods: what each draws, spends and trains on, by hand and against the plain model."""

import doctest
import math
import random
from collections import Counter
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from reference import (
    ROOT,
    TINY_BASE,
    CaptureGradients,
    largest_error,
    load_plain,
    wiki_passages,
)

import methods as tasks
from config import Config
from data import DataError, Passage
from grpo import Group, learning_rate, update
from masking import LOOKAHEAD, Mask, next_token_mask
from methods import (
    MIN_PREFIX,
    Task,
    candidates,
    close_thought,
    draw_tasks,
    empty_thought_gain,
    gains_without_thought,
    given_samples,
    information_gain,
    make_task,
    method_at,
    question_corpus,
    rlp_frame,
    tasks_per_passage,
    thought_gains,
    thought_prompt,
    token_entropies,
    token_spans,
    training_samples,
    verify_predictions,
)
from model import build_policy, build_reference, needs_reference
from rewards import answerable
from rollout import Rollout, predict_prompt, question_prompt
from train import predict, reward

DRAWN = ("random_span", "random_token", "entropy_token", "rlvr", "rlp", "sft")
BONN = Passage("1#0", "Bonn", "", "Bonn is old.")
BONN_TOKENS = [(0, 4), (4, 7), (7, 11), (11, 12)]
QUESTIONS = [Passage(f"q:{n}", "", "", f"What is {n} + 1 ?", answer=str(n + 1)) for n in range(4)]


@pytest.fixture
def sampler(build_sampler):
    """On the tiny base; its tokenizer merges letters, keeps the space in front of a word, begins texts with <bos>."""
    return build_sampler(TINY_BASE, max_prompt_tokens=192, predict_prompt=" {passage}\nPredict:")


@pytest.fixture
def bytes_sampler(build_sampler, folders):
    """On a random model whose tokens are bytes and whose texts begin with themselves."""
    return build_sampler(folders["smollm3"])


@pytest.fixture
def reference(sampler):
    return build_reference(sampler.replica, sampler.config, sampler.ranks)


def sized(sampler, passages: int, masks: int = 2, predictions: int = 2) -> None:
    """A step of this size."""
    sampler.config.passages_per_step = passages
    sampler.config.masks_per_passage, sampler.config.predictions_per_mask = masks, predictions


def said(text: str) -> Rollout:
    return Rollout([1], [2, 3], [-1.0, -1.0], text, "eos")


def key(task: Task) -> tuple:
    """What makes a task."""
    return task.passage.id, task.mask, task.prompt_ids, task.position


# ------------------------------------------------------------------------------------------------- what a method spends


def test_examples_in_the_docstrings():
    results = doctest.testmod(tasks)
    assert results.attempted >= 5 and results.failed == 0


@pytest.mark.parametrize("method", ["random_span", "random_token", "entropy_token"])
def test_rules_draw_a_mask_more_for_every_eight_that_no_generator_responds(method):
    """active: 8 passages x 4 masks x (1 + 8) = 288 responses of the small run; 36 masks x 8 predictions are as many."""
    small = Config(passages_per_step=8, masks_per_passage=4, predictions_per_mask=8)
    assert tasks_per_passage(small, method) == [5, 5, 5, 5, 4, 4, 4, 4]
    assert tasks_per_passage(Config(), method) == [9] * 32  # the paper's 2304 responses, 288 masks


def test_sft_answers_each_mask_once():
    assert tasks_per_passage(Config(passages_per_step=8, masks_per_passage=4), "sft") == [36] * 8
    assert tasks_per_passage(Config(), "sft") == [72] * 32


def test_responses_are_matched_to_those_of_active_within_one_group():
    for passages in (1, 2, 3, 7, 32):
        for masks in (2, 4, 8):
            for predictions in (2, 3, 8, 16):
                config = Config(
                    passages_per_step=passages, masks_per_passage=masks, predictions_per_mask=predictions
                )
                active = passages * masks * (1 + predictions)
                counts = tasks_per_passage(config, "random_span")
                assert len(counts) == passages and max(counts) - min(counts) <= 1
                assert 0 <= active - sum(counts) * predictions < predictions
                assert sum(tasks_per_passage(config, "sft")) == active


@pytest.mark.parametrize(("method", "counts"), [
    ("random_span", [5, 4]), ("random_token", [5, 4]), ("entropy_token", [5, 4]), ("sft", [36, 36]),
    ("rlvr", [1, 1]), ("rlp", [1, 1]), ("cpt", [0, 0]),
])  # fmt: skip
def test_a_step_draws_these_many_tasks(sampler, reference, method, counts):
    sized(sampler, 2, 4, 8)
    passages = QUESTIONS[:2] if method == "rlvr" else wiki_passages(2)
    assert [len(group) for group in draw_tasks(method, passages, reference, sampler, 0)] == counts


# --------------------------------------------------------------------------------------------------- which method, when


def test_a_warm_up_method_takes_the_first_steps():
    paper = Config(warmup_method="random_span", warmup_method_steps=100)
    assert [method_at(paper, step) for step in (0, 99, 100, 1999)] == ["random_span", "random_span", "active", "active"]
    assert method_at(Config(), 0) == method_at(Config(warmup_method_steps=100), 0) == "active"


def test_one_learning_rate_schedule_runs_over_both_methods():
    plain, warmed = Config(), Config(warmup_method="random_span", warmup_method_steps=100)
    rates = [learning_rate(warmed, step) for step in range(2000)]
    assert rates == [learning_rate(plain, step) for step in range(2000)]
    assert rates[99] > rates[100] > 0.99 * 5e-7  # no restart where the methods change


def test_a_second_copy_is_kept_where_something_reads_it():
    for keys in ({"method": "rlp"}, {"method": "entropy_token"}, {"warmup_method": "entropy_token"}, {"kl": 0.01}):
        assert needs_reference(Config(**keys))
    for method in ("active", "random_span", "random_token", "rlvr", "sft", "cpt"):
        assert not needs_reference(Config(method=method))


@pytest.mark.parametrize("method", DRAWN)
def test_tasks_are_a_function_of_seed_and_step(sampler, reference, method):
    def draw(step: int, seed: int = 0) -> list:
        sampler.config.seed = seed
        random.seed(step)  # what else draws must not matter
        groups = draw_tasks(method, passages, reference, sampler, step)
        return [[key(task) for task in group] for group in groups]

    passages = QUESTIONS[:3] if method == "rlvr" else wiki_passages(3)
    first = draw(5)
    draw(6)
    assert draw(5) == first
    if method != "rlvr":  # which draws nothing: the questions of a step are its passages
        assert draw(6) != first and draw(5, seed=1) != first


# ----------------------------------------------------------------------------------------------------- next-token masks


def test_a_next_token_mask_ends_the_passage_and_leaves_the_tokens_space_in_front():
    mask = next_token_mask(BONN, BONN_TOKENS, 2)
    assert mask == Mask("old", "", "Bonn is [mask]", "old", 1, 8, "", ("old", "old."))


def test_prefixes_are_the_continuation_up_to_each_token_border_and_no_longer_than_the_lookahead():
    text = " ".join("abcdefghijklmnopqrstuvwxyz")
    spans = [(0, 1)] + [(2 * n - 1, 2 * n + 1) for n in range(1, 26)]  # each token with its space
    mask = next_token_mask(Passage("1#0", "", "", text), spans, 3)
    assert mask.masked == "a b c [mask]" and len(mask.prefixes) == LOOKAHEAD == 16
    assert mask.prefixes[:3] == ("d", "d e", "d e f") and mask.prefixes[-1] == text[6 : 6 + 31]


@pytest.mark.parametrize(("number", "target"), [(3, "."), (4, "")])
def test_a_token_without_letter_or_digit_is_no_target(number, target):
    mask = next_token_mask(Passage("1#0", "", "", "Bonn is old.  "), [*BONN_TOKENS, (12, 14)], number)
    assert (mask.words, mask.invalid, mask.masked, mask.prefixes) == (target, "not_answerable", "", ())


def test_a_next_token_mask_has_the_label_of_its_word():
    passage = Passage("1#0", "", "", "Bonn is old.", ["copy", "template", "fact"])
    assert [next_token_mask(passage, BONN_TOKENS, number).label for number in (1, 2)] == ["template", "fact"]


def test_candidates_by_hand():
    text, spans = "Ann, 7 – é b", [(0, 3), (3, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    assert candidates(spans, text, None, 0.2) == [2, 4, 5]  # not the first, no comma, no dash
    entropies = [9.0, 8.0, 1.0, 7.0, 3.0, 2.0]
    assert candidates(spans, text, entropies, 0.2) == [4]  # a fifth of three is none, so one
    assert candidates(spans, text, entropies, 0.67) == [4, 5]
    assert candidates(spans, text, entropies, 1.0) == [2, 4, 5]  # in the order of the text
    assert candidates(spans[:2], text, entropies[:2], 0.2) == candidates([], "", None, 0.2) == []


def test_the_share_counts_the_tokens_that_may_be_drawn():
    text = "a" + " b" * 50 + " ." * 50
    spans = [(0, 1)] + [(2 * n - 1, 2 * n + 1) for n in range(1, 101)]
    entropies = [float(number) for number in range(101)]
    assert candidates(spans, text, entropies, 0.2) == list(range(41, 51))  # 10 of the 50 words, though stops are higher


def test_random_tokens_are_drawn_uniformly_without_repeats_in_a_step(sampler):
    """chi-square over the tokens with a letter or digit, but the first."""
    sized(sampler, 1)  # 3 masks a step
    passage = wiki_passages(1)[0]
    spans = token_spans(sampler, passage.text)
    starts = Counter()
    for step in range(500):
        (drawn,) = draw_tasks("random_token", [passage], None, sampler, step)
        assert len({task.mask.start for task in drawn}) == 3
        starts.update(task.mask.start for task in drawn)
    words = [passage.text[start:end] for start, end in spans[1:]]
    allowed = [end - len(word.strip()) for (_, end), word in zip(spans[1:], words, strict=True) if answerable(word)]
    assert sorted(starts) == allowed and 20 < len(allowed) < len(spans) - 1
    expected = 1500 / len(allowed)
    chi_square = sum((starts[start] - expected) ** 2 / expected for start in allowed)
    freedom = len(allowed) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_text_with_fewer_words_than_masks_repeats_and_one_without_any_gives_none(sampler):
    sized(sampler, 2, 4, 8)
    passages = [Passage("1#0", "", "", "... near mountains ."), Passage("2#0", "", "", "... . –")]
    repeated, without = draw_tasks("random_token", passages, None, sampler, 0)
    assert {task.mask.target for task in repeated} == {"near", "mountains"} and len(repeated) == 5
    assert without == []


# -------------------------------------------------------------------------------------------------- entropies of tokens


@torch.no_grad()
def plain_entropies(model, start: list[int], ids: list[int]) -> list[float]:
    """Of the distribution from which each token of a text would be drawn, by the ordinary model."""
    logprobs = model(input_ids=torch.tensor([start + ids]), use_cache=False).logits[0].double().log_softmax(-1)
    entropies = (-logprobs.exp() * logprobs).sum(-1).tolist()
    return entropies[len(start) - 1 : -1] if start else [0.0, *entropies[:-1]]


@pytest.mark.parametrize("budget", [160, 10_000])
def test_token_entropies_are_those_of_the_plain_model(sampler, reference, budget):
    sampler.config.tokens_per_micro_batch = budget
    plain, passages = load_plain(TINY_BASE).eval(), wiki_passages(12)
    for passage, found in zip(passages, token_entropies(passages, reference, sampler), strict=True):
        bos, *ids = sampler.tokenizer(passage.text).input_ids
        # a difference of two sums near 30, in float32
        assert found == pytest.approx(plain_entropies(plain, [bos], ids), abs=5e-5)


def test_where_texts_begin_with_themselves_nothing_is_said_of_the_first_token(bytes_sampler):
    one = bytes_sampler
    reference, plain = build_reference(one.replica, one.config, one.ranks), load_plain(one.config.model).eval()
    (found,) = token_entropies([BONN], reference, one)
    assert found == pytest.approx(plain_entropies(plain, [], list(one.tokenizer(BONN.text).input_ids)), abs=1e-5)
    assert len(found) == 12 and found[0] == 0 < min(found[1:])


def test_entropy_tokens_lie_among_the_fifth_where_the_start_model_is_least_sure(sampler, reference):
    """Over many draws: always there, and everywhere there; random tokens lie there one time in five."""
    sized(sampler, 8)  # 3 masks a passage
    passages, plain = wiki_passages(8), load_plain(TINY_BASE).eval()
    with torch.no_grad():  # the model has moved on since; the frozen copy has not
        for parameter in sampler.replica.parameters():
            parameter.mul_(-1)
    highest = []
    for passage in passages:
        bos, *ids = sampler.tokenizer(passage.text).input_ids
        spans, entropies = token_spans(sampler, passage.text), plain_entropies(plain, [bos], ids)
        allowed = [n for n, (start, end) in enumerate(spans) if n > 0 and answerable(passage.text[start:end])]
        allowed.sort(key=lambda n, entropies=entropies: -entropies[n])
        top = allowed[: len(allowed) // 5]
        assert entropies[top[-1]] > entropies[allowed[len(top)]] + 1e-4  # no tie at the border
        highest.append({passage.text.index(passage.text[slice(*spans[n])].strip(), spans[n][0]) for n in top})

    def shares(method: str, steps: int) -> tuple[float, list[set]]:
        inside, seen = [], [set() for _ in passages]
        for step in range(steps):
            for number, group in enumerate(draw_tasks(method, passages, reference, sampler, step)):
                inside += [task.mask.start in highest[number] for task in group]
                seen[number] |= {task.mask.start for task in group}
        return fmean(inside), seen

    assert shares("entropy_token", 20) == (1.0, highest)
    assert shares("random_token", 20)[0] == pytest.approx(0.2, abs=0.06)


# ------------------------------------------------------------------------------------------------- rewards of the rules


def graded(sampler, task: Task, answers: list[str], kind: str) -> list[float]:
    """What `reward` pays for these boxed answers."""
    task.predictions = [said(rf"\boxed{{{answer}}}") for answer in answers]
    settings = SimpleNamespace(config=Config(method="random_token", reward=kind), ranks=sampler.ranks)
    (group,) = reward("random_token", [task], [[task]], None, None, settings, 0)
    assert group.role == "pred" and group.rollouts == task.predictions and group.rewards == task.rewards
    return group.rewards


def test_the_prefix_reward_by_hand(sampler):
    task = make_task(BONN, next_token_mask(BONN, BONN_TOKENS, 1), sampler)
    answers = ["is", " is old ", "is old.", "is ol", "is old. And", "Is", ""]
    assert graded(sampler, task, answers, "prefix") == [1, 1, 1, 0, 0, 0, 0]
    assert graded(sampler, task, answers, "exact") == [1, 0, 0, 0, 0, 0, 0]


def test_the_prefix_reward_pays_for_the_true_continuation_up_to_any_token(sampler):
    sized(sampler, 1, 4, 2)
    (drawn,) = draw_tasks("random_token", wiki_passages(1), None, sampler, 0)
    checked = 0
    for task in drawn:
        text, start = task.passage.text, task.mask.start
        assert task.mask.masked == text[:start] + "[mask]"
        ids = sampler.tokenizer(text, add_special_tokens=False).input_ids
        decode = sampler.tokenizer.decode
        before = next(n for n in range(len(ids)) if decode(ids[:n]).strip() == text[:start].strip())
        following = [decode(ids[before : before + n]).strip() for n in range(1, 8)]
        assert following[0] == task.mask.target and before > 0
        assert graded(sampler, task, following, "prefix") == [1.0] * len(following)
        inside = [one[:-1] for one in following if one[:-1].strip() not in following and len(one) > 2]
        assert graded(sampler, task, inside, "prefix") == [0.0] * len(inside)
        checked += len(inside)
    assert checked > 5


def test_a_frozen_generator_is_rewarded_but_not_trained(sampler):
    """Neither its tokens nor their number is left in the loss."""
    groups = [Group("pred", [said("a"), said("b")], [1.0, 0.0]), Group("gen", [said("c"), said("d")], [0.5, 0.0])]
    for trained, texts in ((True, "abcd"), (False, "ab")):
        sampler.config.train_generator = trained
        samples = training_samples("active", groups, [], [], None, sampler)
        assert "".join(sample.rollout.text for sample in samples) == texts
        assert {sample.weight for sample in samples} == {1 / (2 * len(texts))}  # two tokens each


def test_random_spans_follow_spanberts_law_in_the_loop_too(bytes_sampler):
    """Words in a span: Geo(0.2) up to 10, mean 3.797."""
    sized(bytes_sampler, 1, 32, 2)
    bytes_sampler.config.max_span_chars, passage = 0, Passage("1#0", "", "", " ".join(str(100 + n) for n in range(300)))
    lengths = []
    for step in range(40):
        (drawn,) = draw_tasks("random_span", [passage], None, bytes_sampler, step)
        lengths += [len(task.mask.words.split()) for task in drawn]
        assert all(task.mask.masked.replace("[mask]", task.mask.target) == passage.text for task in drawn)
        assert all(task.prompt_ids == predict_prompt(bytes_sampler, task.mask.masked) for task in drawn[:3])
    law = [0.8**k for k in range(10)]
    assert len(lengths) == 40 * 48
    for k, weight in enumerate(law, 1):
        assert lengths.count(k) / len(lengths) == pytest.approx(weight / sum(law), abs=0.03)
    assert fmean(lengths) == pytest.approx(3.797, abs=0.2)


def test_a_prediction_prompt_over_the_limit_makes_the_mask_invalid(sampler):
    mask = next_token_mask(BONN, BONN_TOKENS, 2)
    length = len(predict_prompt(sampler, mask.masked))
    for limit, cause in ((length, ""), (length - 1, "prompt_too_long")):
        sampler.config.max_prompt_tokens = limit
        task = make_task(BONN, next_token_mask(BONN, BONN_TOKENS, 2), sampler)
        assert (task.mask.invalid, len(task.prompt_ids)) == (cause, 0 if cause else length)


# ----------------------------------------------------------------------------------------------- answers that are given


def test_sft_trains_on_the_masked_words_and_the_end_after_the_prediction_prompt(sampler):
    sampler.config.sft_answer = " \\boxed{ {answer} }"
    drawn = [make_task(BONN, next_token_mask(BONN, BONN_TOKENS, n), sampler) for n in (1, 2)]
    samples, decode = given_samples("sft", drawn, [], sampler), sampler.tokenizer.decode
    prompts = [predict_prompt(sampler, masked) for masked in ("Bonn [mask]", "Bonn is [mask]")]
    assert [sample.rollout.prompt_ids for sample in samples] == prompts
    assert [decode(sample.rollout.completion_ids) for sample in samples] == [
        " \\boxed{ is }<eos>", " \\boxed{ old }<eos>",
    ]  # fmt: skip
    tokens = sum(len(sample.rollout.completion_ids) for sample in samples)
    assert [(sample.advantage, sample.weight) for sample in samples] == [(1.0, 1 / tokens)] * 2
    assert all(sample.rollout.sampler_logprobs == [] for sample in samples)


def test_the_default_answer_of_sft_is_a_box(sampler):
    (sample,) = given_samples("sft", [make_task(BONN, Mask("é {1}", "", "x", "é {1}"), sampler)], [], sampler)
    ids = sampler.tokenizer(" \\boxed{é {1}}", add_special_tokens=False).input_ids
    assert sample.rollout.completion_ids == ids + [sampler.tokenizer.eos_token_id]


def test_sft_with_no_valid_mask_trains_nothing(sampler):
    assert given_samples("sft", [], [BONN], sampler) == []


def test_cpt_trains_on_every_token_but_the_first(sampler, bytes_sampler):
    passages = wiki_passages(3)
    samples = given_samples("cpt", [], passages, sampler)
    for sample, passage in zip(samples, passages, strict=True):
        bos, *ids = sampler.tokenizer(passage.text).input_ids
        assert (sample.rollout.prompt_ids, sample.rollout.completion_ids) == ([bos], ids)
    tokens = sum(len(sample.rollout.completion_ids) for sample in samples)
    assert {(sample.advantage, sample.weight) for sample in samples} == {(1.0, 1 / tokens)}
    (sample,) = given_samples("cpt", [], [BONN], bytes_sampler)  # a tokenizer that puts nothing in front
    first, *rest = bytes_sampler.tokenizer(BONN.text).input_ids
    assert (sample.rollout.prompt_ids, sample.rollout.completion_ids) == ([first], rest)


@pytest.mark.parametrize("method", ["sft", "cpt"])
@pytest.mark.parametrize("budget", [200, 10_000])
def test_given_answers_are_learnt_by_plain_mean_cross_entropy(sampler, method, budget):
    """Loss and gradient of one batch; the sampling temperature has no say in it."""
    config = sampler.config
    config.tokens_per_micro_batch, config.max_grad_norm, config.temperature = budget, 1e9, 0.5
    passages = wiki_passages(4)
    sized(sampler, 4)
    drawn = [task for group in draw_tasks(method, passages, None, sampler, 0) for task in group]
    assert reward(method, drawn, [drawn], None, None, sampler, 0) == []
    samples = training_samples(method, [], drawn, passages, None, sampler)
    assert len(samples) == (4 * 2 * 3 if method == "sft" else 4)
    policy, plain = build_policy(sampler.replica, config, sampler.ranks), load_plain(TINY_BASE)
    found, expected = CaptureGradients(policy), CaptureGradients(plain)
    metrics = update(policy, found, samples, config, sampler.ranks, 0)
    logits, targets = [], []
    for sample in samples:
        prompt, completion = sample.rollout.prompt_ids, sample.rollout.completion_ids
        whole = torch.tensor([prompt + completion])
        logits.append(plain(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1])
        targets += completion
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(targets))  # the mean over all tokens
    loss.backward()
    expected.step()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert largest_error(found.gradients, expected.gradients) < 1e-4
    assert metrics["trained_tokens"] == len(targets) and metrics["trained_responses"] == len(samples)
    assert metrics["mismatch_kl"] == metrics["mismatch_abs"] == metrics["clip_fraction"] == 0  # nobody sampled


# ------------------------------------------------------------------------------------------------------------ questions


def test_questions_are_split_by_a_hash_of_their_text():
    config = Config(data=str(ROOT / "assets/tiny_questions.jsonl"), heldout=0.2)
    corpus = question_corpus(config, lambda *_: None)
    train, heldout = ({one.text for one in part} for part in (corpus.train, corpus.heldout))
    assert not train & heldout and len(train | heldout) == 100 and 10 <= len(heldout) <= 30
    assert corpus.counts == {"records": 100, "questions": 100, "train": len(train), "heldout": len(heldout)}
    for one in corpus.train + corpus.heldout:
        left, right = one.text.removeprefix("What is ").removesuffix(" ?").split(" + ")
        assert int(one.answer) == int(left) + int(right)
    config.heldout = 0.4
    assert heldout < {one.text for one in question_corpus(config, lambda *_: None).heldout}


def test_a_question_that_stands_twice_is_on_one_side_only(tmp_path):
    lines = [f'{{"question": "What is {n} + 0 ?", "answer": "{n}"}}\n' for n in range(20)]
    (tmp_path / "q.jsonl").write_text("".join(lines * 2))
    corpus = question_corpus(Config(data=str(tmp_path / "q.jsonl"), heldout=0.3), lambda *_: None)
    assert not {one.text for one in corpus.train} & {one.text for one in corpus.heldout}
    assert len(corpus.train) + len(corpus.heldout) == 40


def test_a_question_loses_the_instruction_of_its_data_set(tmp_path):
    """The template brings its own. The side that it is on is that of the text as it stood."""
    ending = " Let's think step by step and output the final answer within \\\\boxed{}."
    lines = [f'{{"question": "What is {n} + 0 ?{ending}", "answer": "{n}"}}\n' for n in range(20)]
    (tmp_path / "q.jsonl").write_text("".join(lines))
    corpus = question_corpus(Config(data=str(tmp_path / "q.jsonl"), heldout=0.3), lambda *_: None)
    texts = {one.text for one in corpus.train + corpus.heldout}
    assert texts == {f"What is {n} + 0 ?" for n in range(20)}


def test_questions_of_which_none_is_held_out_are_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "What is 1 + 0 ?", "answer": "1"}\n')
    with pytest.raises(DataError, match="1 questions to train on, 0 held out; change heldout"):
        question_corpus(Config(data=str(tmp_path / "q.jsonl"), heldout=1e-9), lambda *_: None)


def test_a_question_is_asked_as_it_stands_and_a_long_one_not_at_all(sampler):
    sampler.config.question_prompt = "Q: {passage}\nA:"
    sized(sampler, 1)
    (task,) = draw_tasks("rlvr", QUESTIONS[:1], None, sampler, 0)[0]
    assert task.prompt_ids == question_prompt(sampler, "What is 0 + 1 ?") and task.mask.target == "1"
    assert sampler.tokenizer.decode(task.prompt_ids, skip_special_tokens=True) == "Q: What is 0 + 1 ?\nA:"
    sampler.config.max_prompt_tokens = len(task.prompt_ids) - 1
    (task,) = draw_tasks("rlvr", QUESTIONS[:1], None, sampler, 0)[0]
    assert (task.mask.invalid, task.prompt_ids) == ("prompt_too_long", [])


def test_questions_are_rewarded_by_math_verify(sampler):
    golds, answers = ["1/2", "12", "7"], [["0.5", r"\frac12", "2", None], ["12.0", "1,2"], ["7", "7"]]
    verdicts = [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert verify_predictions(answers, golds, sampler.config, sampler.ranks) == verdicts
    flat = [(gold, answer) for gold, group in zip(golds, answers, strict=True) for answer in group]
    assert check_answers(flat) == [verdict for group in verdicts for verdict in group]
    sized(sampler, 3)
    questions = [Passage(f"{n}", "", "", "?", answer=gold) for n, gold in enumerate(golds)]
    proposals = draw_tasks("rlvr", questions, None, sampler, 0)
    for (task,), group in zip(proposals, answers, strict=True):
        task.predictions = [said("no box" if one is None else rf"\boxed{{{one}}}") for one in group]
    groups = reward("rlvr", [task for (task,) in proposals], proposals, None, None, sampler, 0)
    assert [(group.role, group.rewards) for group in groups] == [("pred", one) for one in verdicts]


# ------------------------------------------------------------------------------------------------------------------ rlp


def test_a_thought_is_asked_for_at_one_position_of_each_text(sampler):
    sized(sampler, 6)
    passages, frame = wiki_passages(6), rlp_frame(sampler)
    for passage, (task,) in zip(passages, draw_tasks("rlp", passages, None, sampler, 3), strict=True):
        ids = sampler.tokenizer(passage.text, add_special_tokens=False).input_ids
        t = len(task.position.prefix_ids)
        assert t >= MIN_PREFIX and task.position.prefix_ids == ids[:t] and task.position.target_id == ids[t]
        assert task.prompt_ids == thought_prompt(frame, task.position)
        assert passage.text.startswith(task.mask.masked.removesuffix("[mask]") + task.mask.target)


@pytest.mark.parametrize(("method", "closing"), [("rlp", "</think>"), ("random_span", r"\boxed{a}")])
def test_what_ends_a_prediction_is_what_its_method_waits_for(sampler, method, closing):
    """Every token is declared to be the one, then the other."""
    sized(sampler, 2)
    drawn = [task for group in draw_tasks(method, wiki_passages(2), None, sampler, 0) for task in group]
    for piece in ("</think>", r"\boxed{a}"):
        sampler.pieces |= {token: piece for token in range(len(sampler.tokenizer))}
        predict(drawn, sampler, sampler.config, 0)
        ends = {(len(one.completion_ids), one.finish) for task in drawn for one in task.predictions} - {(1, "eos")}
        assert ((1, "answer") in ends) == (piece == closing) and (len(ends) == 1 or piece != closing)
        assert all(len(task.predictions) == 2 for task in drawn)


def test_thoughts_are_rewarded_by_the_information_they_give(sampler, reference):
    """However they ended; and before any thought, nothing is gained but what the tags do."""
    config, ranks, frame = sampler.config, sampler.ranks, rlp_frame(sampler)
    policy = build_policy(sampler.replica, config, ranks)
    sized(sampler, 2)
    proposals = draw_tasks("rlp", wiki_passages(2), reference, sampler, 0)
    ends = ("length", "eos", "answer")
    for (task,) in proposals:
        ids = sampler.tokenizer("near mountains", add_special_tokens=False).input_ids
        task.predictions = [Rollout(task.prompt_ids, ids, [-1.0] * len(ids), "", end) for end in ends]
    drawn = [task for (task,) in proposals]
    groups = reward("rlp", drawn, proposals, policy, reference, sampler, 0)
    thoughts = [[close_thought(one, frame) for one in task.predictions] for task in drawn]
    positions = [task.position for task in drawn]
    expected = information_gain(policy, reference, positions, thoughts, frame, config, ranks)
    assert [group.rewards for group in groups] == expected == thought_gains(drawn, policy, reference, sampler)
    assert len(set(expected[0])) == 3
    samples = training_samples("rlp", groups, drawn, [], reference, sampler)
    assert [sample.rollout for sample in samples] == [one for task in drawn for one in task.predictions]
    gains = gains_without_thought(wiki_passages(2), policy, reference, sampler)
    assert abs(gains["rlp/no_thought_gain"]) < 1e-5
    tags = empty_thought_gain(policy, reference, positions, frame, config, ranks)
    assert gains["rlp/empty_thought_gain"] == pytest.approx(tags) and abs(tags) > 0.01
