"""What a step reports, by hand, and the table that compares runs."""

import runpy
from types import SimpleNamespace

import pytest
import torch
from reference import load_plain

from config import Config
from data import Passage
from grpo import Group, make_samples
from masking import Mask
from methods import Task, given_rollout, text_samples
from metrics import (
    agreement_warning, active_parameters, append_row, compare, largest_memory, peak_memory_gb, read_rows, sample_rows,
    step_flops, step_metrics, summary_table, tokens_after_answer,
)  # fmt: skip
from prompts import BOXED_OPENING
from rollout import Rollout

PIECES = ["", "so ", r"\boxed{", "Rhine", "}", " and", "<end>"]
"""Of the tokens 1 to 6: a response reads as its tokens' pieces."""


def said(*ids: int, prompt: int = 3, finish: str = "eos") -> Rollout:
    return Rollout([9] * prompt, list(ids), [-0.5] * len(ids), "".join(PIECES[n] for n in ids if n < 6), finish)


def stub_sampler(**keys) -> SimpleNamespace:
    """As much of a sampler as metrics look at; a model of 1000 parameters."""
    config = Config(predictions_per_mask=2, **keys)
    replica = torch.nn.Linear(25, 40, bias=False)
    replica.config = SimpleNamespace()
    return SimpleNamespace(config=config, piece=PIECES.__getitem__, replica=replica)


@pytest.fixture
def step():
    """Of one passage three generator responses: a mask found by one of two, one found by none, none at all."""
    labels = ["copy", "template", "noise", "noise", "fact"]
    passage = Passage("1#0", "Bonn", "", "Bonn lies on the Rhine.", labels)
    right, wrong = said(1, 2, 3, 4, 5, 6), said(2, 4, finish="answer")
    masks = [Mask("Rhine", "", "m", "Rhine", 1, 17, "fact"), Mask("on the", "", "m", "on the", 1, 10, "noise"),
             Mask("", invalid="no_answer")]  # fmt: skip
    predictions = [[right, wrong], [wrong, said(1, 1, 1, finish="length")], []]
    correct = [[1, 0], [0, 0], []]
    tasks = [
        Task(passage, mask, said(1, 1, prompt=5), [], group, right, [float(one) for one in right], earned)
        for mask, group, right, earned in zip(masks, predictions, correct, [0.5, 0.0, 0.0], strict=True)
    ]
    groups = [Group("pred", task.predictions, task.rewards) for task in tasks[:2]]
    groups.append(Group("gen", [task.proposal for task in tasks], [task.proposal_reward for task in tasks]))
    return [tasks], groups


def test_metrics_of_a_step_by_hand(step):
    proposals, groups = step
    sampler = stub_sampler()
    metrics = step_metrics([*proposals, []], groups, make_samples(groups, sampler.config), sampler)
    expected = {
        "reward": 1.5 / 7, "surprisal": 0.5, "responses": 7, "response_tokens": 6 + 2 + 2 + 3 + 3 * 2,
        "gen/reward": 0.5 / 3, "gen/responses": 3, "gen/groups_kept": 1, "gen/valid_rate": 2 / 3, "gen/distinct": 2,
        "gen/span_words": 1.5, "gen/occurrences": 1, "gen/invalid_no_answer": 1 / 3, "gen/share_fact": 0.5,
        "gen/share_noise": 0.5, "gen/share_copy": 0, "gen/length_mean": 2, "gen/length_max": 2, "gen/truncated": 0,
        "pred/reward": 0.25, "pred/responses": 4, "pred/groups_kept": 0.5, "pred/accuracy": 0.25,
        "pred/accuracy_zero": 0.5, "pred/accuracy_one": 0,
        "pred/valid_rate": 0.75, "pred/truncated": 0.25, "pred/length_max": 6, "pred/tokens_after_answer": 0.25,
    }  # fmt: skip
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    assert metrics["pred/accuracy_histogram"] == [1, 1, 0]  # masks with 0, 1 and 2 right answers
    assert "gen/share_shown" not in metrics  # no passage has such a word


def test_tokens_after_the_first_answer_are_counted_without_the_end():
    sampler = stub_sampler()
    some = {3: said(2, 3, 4, 5, 2, 4, 6), 1: said(2, 3, 4, 5, finish="length")}
    none = [said(2, 3, 4, 6), said(2, 3, 4, finish="answer"), said(1, 1, 6), said(2, 3, finish="length")]
    for count, response in [*some.items(), *((0, one) for one in none)]:
        assert tokens_after_answer(response, sampler, BOXED_OPENING) == count


def test_flops_by_hand(step):
    """2 N a token read, each prompt once, or sampled; 6 N a token trained, in each update."""
    _, groups = step
    samples = make_samples(groups, Config())  # the first predictor group and the generator's
    sampled = (3 + 6 + 2) + (3 + 2 + 3) + (5 + 2 + 2 + 2)
    trained = (3 + 6) + (3 + 2) + 3 * (5 + 2)
    assert step_flops(groups, samples, 1000, Config()) == 2000 * sampled + 6000 * trained
    assert step_flops(groups, samples, 1000, Config(updates_per_batch=2)) == 2000 * sampled + 12000 * trained


def test_of_experts_a_token_meets_those_that_it_is_sent_to(folders):
    """Two of four, three tables of 32 x 24 each, in two layers."""
    model = load_plain(folders["qwen3_moe"])
    assert active_parameters(model) == model.num_parameters() - 2 * 2 * 3 * 32 * 24
    dense = load_plain(folders["smollm3"])
    assert active_parameters(dense) == dense.num_parameters()


def test_given_completions_count_as_responses_that_nobody_sampled():
    sampler = stub_sampler()
    sampler.tokenizer = lambda text: SimpleNamespace(input_ids=list(text.encode()))
    passages = [Passage("1#0", "", "", "abcd"), Passage("2#0", "", "", "ab")]
    samples = text_samples(SimpleNamespace(sampler=sampler), [], [], passages)
    assert samples[0].rollout == given_rollout([97], [98, 99, 100])
    metrics = step_metrics([[], []], [], samples, sampler)
    assert (metrics["responses"], metrics["response_tokens"], metrics["flops"]) == (2, 4, 6000 * 6)
    assert metrics["surprisal"] == metrics["reward"] == metrics["gen/valid_rate"] == 0


def test_gains_of_thoughts_are_rewards_but_neither_right_nor_wrong(step):
    proposals, groups = step
    for group in groups:
        group.rewards = [0.5] * len(group.rewards)
    for task in proposals[0]:
        task.correct = []
    metrics = step_metrics(proposals, groups, [], stub_sampler())
    assert metrics["reward"] == 0.5 and metrics["pred/accuracy_histogram"] == [0, 0, 0]
    assert metrics["pred/accuracy"] == metrics["pred/valid_rate"] == 0


def test_a_rise_in_training_that_the_probe_does_not_share_is_told():
    def rows(accuracies: list[float], probes: list[float]) -> list[dict]:
        shared = {"method": "active", "pred/responses": 8, "gen/top_word_share": 0.75}
        steps = [shared | {"pred/accuracy": one} for one in accuracies]
        first, last = ({"method": "active", "probe/accuracy": one} for one in probes)
        return [first, *steps[:-1], steps[-1] | last]

    rising = [0.1] * 5 + [0.5] * 5
    told = agreement_warning(rows(rising, [0.02, 0.03]))
    assert "from 0.10 to 0.50" in told and "0.020 to 0.030" in told and "top_word_share 0.75" in told
    slow, few = rows([0.1] * 5 + [0.25] * 5, [0.02, 0.02]), rows(rising[1:], [0.02, 0.02])
    unwritten = rows(rising, [0.02, 0.02])
    del unwritten[-1]["probe/accuracy"]
    warmed = [row | {"method": "random_span"} if 0 < n < 6 else row for n, row in enumerate(rows(rising, [0.02, 0.02]))]
    for quiet in (rows(rising, [0.02, 0.07]), slow, few, unwritten, warmed):
        assert agreement_warning(quiet) == ""


def test_samples_tell_of_a_generator_only_where_there_was_one(step):
    proposals, _ = step
    proposals[0][1].proposal = None
    proposals[0][0].rewards = [0.9, -0.1]
    rows = list(sample_rows(proposals, 4))
    assert [row["proposal"] and row["proposal"]["reward"] for row in rows] == [0.5, None, 0]
    assert [len(row["predictions"]) for row in rows] == [2, 2, 0] and {row["step"] for row in rows} == {4}
    assert [(one["correct"], one["reward"]) for one in rows[0]["predictions"]] == [(1, 0.9), (0, -0.1)]


# ------------------------------------------------------------------------------------------------------- tables of runs
@pytest.fixture
def runs(tmp_path):
    """Two runs of two steps; the second's corpus labels no words."""
    for name, labels in (("first", {"probe/accuracy_fact": 0.5}), ("second", {})):
        spent = {"responses": 1500, "response_tokens": 6000, "flops": 1e9}
        probed = {"probe/accuracy": 0.125, "probe/accuracy_greedy": 0.25, **labels}
        numbers = {key: 0.5 for key in ("reward", "gen/reward", "gen/valid_rate", "pred/accuracy", "entropy")}
        numbers |= {"pred/groups_kept": 0.5, "surprisal": 0.0}
        (tmp_path / name).mkdir()
        append_row(tmp_path / name / "metrics.jsonl", {"step": 0, **probed}, {"step": 1, **spent, **numbers})
        probed["probe/accuracy"] += 0.25
        append_row(tmp_path / name / "metrics.jsonl", {"step": 2, **spent, **numbers, **probed})
    return tmp_path


def test_runs_are_compared_by_what_they_spent_and_where_their_probes_ended(runs):
    assert "surprisal" not in summary_table(read_rows(runs / "first/metrics.jsonl"))  # 0 throughout: nobody sampled
    head, start, first, second = compare([str(runs / "first"), str(runs / "second")]).splitlines()
    assert head.split()[:7] == ["run", "step", "responses", "tokens", "FLOPs", "sampled", "greedy"]
    assert start.split()[:8] == ["start", "0", "0", "0", "0", "0.125", "0.250", "0.500"]
    assert first.split()[:8] == ["first", "2", "3,000", "12,000", "2e+09", "0.375", "0.250", "0.500"]
    assert second.split()[:8] == ["second", "2", "3,000", "12,000", "2e+09", "0.375", "0.250", "nan"]
    assert len({len(line) for line in (head, start, first, second)}) == 1  # columns line up


def test_the_table_is_a_command_that_names_a_folder_without_metrics(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["metrics.py", str(runs / "first"), str(runs / "second")])
    runpy.run_module("metrics", run_name="__main__")
    assert capsys.readouterr().out.splitlines()[2].startswith("first  ")
    with pytest.raises(SystemExit, match="nothing: no metrics.jsonl"):
        compare([str(runs / "nothing")])


def test_the_updates_memory_is_its_own_and_the_runs_largest_is_not_forgotten(monkeypatch):
    """On a GPU, as an allocator tells that fills 60 GB in rollouts, 31 in the update and 40 after it."""
    now = {"peak": 60e9}
    for name, stand_in in (("is_available", lambda: True), ("empty_cache", lambda: None),
                           ("max_memory_allocated", lambda: now["peak"]),
                           ("reset_peak_memory_stats", lambda: now.update(peak=6e9))):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("metrics._peak", 0.0)
    row = {}
    with largest_memory(row):
        now["peak"] = 31e9
    assert row == {"peak_memory_gb": 31.0}
    now["peak"] = 40e9
    assert peak_memory_gb() == 60.0
