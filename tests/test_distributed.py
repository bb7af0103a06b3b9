"""Two ranks compute what one would, and meet without waiting for ever. The checks themselves are in worker.py."""

import json
import math

import pytest
import worker
from huggingface_hub import ModelCard
from reference import DENSE, FAMILIES, ROOT


@pytest.fixture(scope="session")
def both(command, tmp_path_factory):
    """(name of a check) -> what it returned on rank 0 and on rank 1. All checks ran in one go, at the first request."""
    out = tmp_path_factory.mktemp("two_ranks")
    ended = command([ROOT / "tests/worker.py", out], limit=240, ranks=2)
    printed = f"\n{ended.stdout[-3000:]}\n{ended.stderr[-5000:]}"

    def results(name: str) -> list:
        values = []
        for rank in range(2):
            file = out / f"rank{rank}.json"
            result = json.loads(file.read_text()).get(name) if file.exists() else None
            assert result, f"{name} did not run on rank {rank}; exit status {ended.returncode}{printed}"
            assert "value" in result, f"{name} failed on rank {rank}:\n{result['error']}"
            values.append(result["value"])
        return values

    return results


# ---- the update
def test_gradients_and_metrics_equal_the_naive_loop_for_any_micro_batch(both):
    """World size, micro-batch size and checkpointing change nothing but rounding."""
    for result in both("check_gradients_equal_the_naive_loop"):
        assert len(result) == len(DENSE) * 2 * 2 * 2
        for name, case in result.items():
            assert case["gradients"] < 1e-4 and case["metrics"] < 1e-4, name
            assert case["tokens_per_rank"][0] != case["tokens_per_rank"][1]
        assert {case["micro_batches"] > 2 for case in result.values()} == {True, False}


def test_a_rank_with_nothing_to_train_still_takes_part(both):
    for result in both("check_a_rank_with_nothing_to_train"):
        assert result["samples"] == 1 and result["gradients"] < 1e-4


def test_several_optimizer_steps_on_a_batch_equal_the_naive_loop(both):
    for results in both("check_several_optimizer_steps_on_a_batch"):
        for name, result in results.items():
            assert result["moves"] < 1e-4 and result["metrics"] < 1e-4 and 0 < result["clip_fraction"] < 0.5, name


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_is_named(both):
    for result in both("check_a_loss_that_is_not_finite_on_one_rank"):
        message = "step 5, update 1: loss not finite on rank [1]; it was not applied"
        assert result == {"message": message, "unchanged": True}


def test_a_gradient_that_is_not_finite_on_one_rank_stops_both_and_is_named(both):
    message = "step 5, update 1: gradient not finite on rank [1], though every loss is; it was not applied"
    for result in both("check_a_gradient_that_is_not_finite_on_one_rank"):
        assert list(result.values()) == [{"message": message, "unchanged": True}] * 2


# ---- two copies
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_replica_equals_the_masters_bit_for_bit_on_every_rank(both, family, dtype):
    first, second = (result[f"{family} {dtype}"] for result in both("check_replica_equals_masters_after_each_refresh"))
    assert first["untouched"]  # before any update, a refresh changes nothing
    assert first["equal"] == [True, True] and first["moved"]
    assert first == second


def test_each_rank_holds_half_of_the_masters(both):
    shares = both("check_masters_are_cut_over_the_ranks")
    assert sum(share["own"] for share in shares) == shares[0]["all"]
    assert all(0.4 < share["own"] / share["all"] < 0.6 for share in shares)


@pytest.mark.parametrize("family", ["qwen3_moe", "smollm3"])
def test_steps_with_masters_on_the_host_equal_steps_without_bit_for_bit(both, family):
    """Also those made again after a stop inside an update, from its checkpoint, in fresh objects."""
    first, second = (result[family] for result in both("check_masters_on_the_host"))
    for row in first["plain"]:
        assert 0 < row["mismatch_abs"] < 1e-5 and row["grad_norm"] > 0 and row["trained_tokens"] > 20
    assert first["plain"] == first["hosted"] == second["hosted"]
    assert first["plain"][2] == first["plain"][3] != first["plain"][1]
    for result in (first, second):
        assert result["masters"] and result["goes on"] == [True, True] and result["policy"] == [False, True]


# ---- rollouts
def test_rollouts_are_the_same_list_on_both_ranks_in_prompt_order(both):
    first, second = both("check_rollouts_are_one_list_in_prompt_order")
    assert first == second
    assert first["prompts"] == [True] * 5
    assert [len(group) for group in first["lone"]] == [3]
    assert len({tuple(one["completion_ids"]) for group in first["all"] for one in group}) > 10


def test_the_two_ranks_sample_with_different_noise(both):
    """Else the same prompt on both would give the same responses."""
    first, second = both("check_rollouts_are_one_list_in_prompt_order")[0]["twins"]
    assert first != second


def test_gather_joins_lists_in_rank_order(both):
    assert both("check_gather_joins_in_rank_order") == [["0a", "1a", "1b"]] * 2


def test_a_failing_request_names_its_rank(both):
    fine, failed = both("check_a_failing_request_names_its_rank")
    assert fine == "" and failed.startswith("rank 1: a generation request failed: ") and "out of luck" in failed


def test_a_generator_whose_masks_are_all_invalid_neither_hangs_nor_trains(both):
    for result in both("check_masks_that_are_all_invalid"):
        assert result["causes"] == ["no_answer"]
        assert result["groups"] == [["gen", [0.0, 0.0]]] * 3
        assert set(result["metrics"].values()) == {0} and result["unchanged"]


# ---- evidence
def test_a_checkpoint_restores_every_bit_and_is_a_folder_for_from_pretrained(both):
    """Masters, replica, moving average and optimizer state; and the run goes on as it would have."""
    for result in both("check_a_checkpoint_restores_every_bit"):
        assert result["kept"] == ["latest", "step_000002", "step_000003"]  # keep_last=2
        assert result["latest"] == "step_000003" and result["done"] == 3
        assert result["same"] == result["next_step"] == [True] * 4
        assert result["exported"] and result["tokenizer"] and result["apart"] and result["no_gradients"]


def test_a_save_is_of_the_moment_it_was_asked_for(both):
    """Steps made while threads still write change nothing in it, and it changes nothing in them."""
    for result in both("check_a_save_copies_before_the_next_step_changes_all"):
        assert len(result) == 16 and all(result.values()), result


def test_an_exported_model_has_a_card_of_its_run(both):
    card = ModelCard(both("tiny-rlp")[0]["card"])
    assert card.data.tags[:4] == ["pretrainzero", "reinforcement-learning", "grpo", "rlp"]
    assert card.data.license == "mit" and "worker.py" in card.text and "world size: 2\n" in card.text
    assert "| | step 0 | \n" in card.text and "after 2 of 2 steps of `rlp`" in card.text


def test_the_probe_gives_the_same_numbers_on_both_ranks(both):
    first, second = both("check_the_probe_is_the_same_on_every_rank")
    assert first == second
    assert first["again"] and len(first["masks"]) == 3
    assert first["probe"]["probe/perplexity"] == pytest.approx(first["perplexity"], rel=1e-4)
    accuracies = [f"probe/accuracy{one}" for one in ("", "_greedy", "_no_thought", "_greedy_no_thought")]
    found = {f"{one}{kind}" for one in accuracies for kind in ("", "_content", "_function", "_name")}
    assert set(first["probe"]) == found | {"probe/valid_rate", "probe/perplexity"}  # nothing thinks: no thought_use


def test_an_evaluation_leaves_the_same_records_on_two_ranks_as_on_one(both, ranks, tmp_path, monkeypatch):
    """Bit for bit, greedy and sampled: a chunk has its own noise, whoever makes it."""
    monkeypatch.chdir(ROOT)
    found = worker.check_an_evaluation(tmp_path, ranks)
    for files in both("check_an_evaluation"):
        assert sorted(files) == sorted(found) and len(files) == 2 + 5 + 2
        for name in files:
            assert files[name] == found[name] or name.endswith("seconds.jsonl"), name
        made = [json.loads(line) for line in files["sampled/gsm8k/seconds.jsonl"].splitlines()]
        assert sorted((row["chunk"], row["rank"]) for row in made) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    sampled = [json.loads(line) for name in found if "sampled/gsm8k/chunk" in name for line in found[name].splitlines()]
    assert len(sampled) == 10 * 4 and len({record["response"] for record in sampled}) > 10
    assert [record["sample"] for record in sampled] == [0, 1, 2, 3] * 10


def test_benchmarks_are_asked_during_training_with_the_same_numbers_on_both_ranks(both):
    """eval_every=3 of two steps: before the first and at the last."""
    first, second = ([{key: row[key] for key in row if key.startswith("eval/")} for row in result["rows"]]
                     for result in both("tiny"))  # fmt: skip
    assert first == second and first[0] == {}
    details = ("standard_error", "parse_rate", "truncation_rate", "length_mean")
    assert set(first[1]) == {"eval/gsm8k"} | {f"eval/gsm8k_{key}" for key in details}
    assert set(first[1]) | {"time/eval"} <= set(both("tiny")[0]["before"])


# ---- the second copy, tasks, verdicts
def test_the_second_copy_is_cut_scores_and_follows_on_two_ranks_as_on_one(both):
    results = both("check_the_second_copy")
    assert sum(result["own"] for result in results) == results[0]["all"] == results[1]["all"]
    for result in results:
        assert 0.4 < result.pop("own") / result.pop("all") < 0.6
        assert result.pop("error") < 1e-5
        assert len(result) == 6 and all(value is True for value in result.values()), result


def test_both_ranks_draw_the_same_tasks(both):
    """5 passages, 3 masks, 2 predictions: 45 responses, so 22 masks by rule."""
    first, second = both("check_tasks_are_drawn_alike")
    assert first == second
    assert {method: sum(map(len, groups)) for method, groups in first.items()} == {
        "random_span": 22, "random_token": 22, "entropy_token": 22, "sft": 45, "rlp": 5,
    }  # fmt: skip


def test_each_rank_verifies_its_share_and_both_get_all_verdicts(both):
    first, second = both("check_answers_are_verified_in_shares")
    for result in (first, second):
        assert result["verdicts"] == [[1.0, 1.0, 0.0, 0.0], [1.0], [1.0, 0.0]] and result["none"] == []
    assert (set(first["asked"]), set(second["asked"])) == ({"1/2", "7"}, {"12"})


# ---- a step of every method
@pytest.mark.parametrize("name", worker.CONFIGS)
def test_a_step_of_every_method_is_finite_and_the_same_on_both_ranks(both, name):
    first, second = both(name)
    assert first == second and len(first["rows"]) == (2 if name in ("tiny", "tiny-rlp") else 1)
    for row in first["rows"]:
        numbers = [value for value in row.values() if not isinstance(value, str | list)]
        assert all(map(math.isfinite, numbers)) and len(numbers) > 30, row


CERTAIN = {"tiny-sft": ["Predict:"], "tiny-cpt": ["<bos>"], "tiny-rlp": ["<think>"], "tiny": ["Mask:", "Predict:"]}
"""Configs of which a step trains for certain, and how the prompts end whose responses it trains on."""


@pytest.mark.parametrize("name", worker.CONFIGS)
def test_a_step_trains_on_the_responses_of_its_method(both, name):
    """By rule, or with the generator frozen: on predictions at most. Sums are beyond the tiny base: every group is
    all wrong and dropped."""
    result = both(name)[0]
    if name in CERTAIN:
        assert result["trained"] == CERTAIN[name] and result["rows"][-1]["trained_tokens"] > 0
    else:
        assert set(result["trained"]) <= {"Predict:"}


def test_a_warm_up_method_makes_its_steps_and_hands_over(both):
    rows = both("tiny")[0]["rows"]
    assert [(row["method"], row["gen/responses"]) for row in rows] == [("random_span", 0), ("active", 12)]


def test_the_moving_average_follows_in_rlp_once_a_step_and_nowhere_else(both):
    assert {name: both(name)[0]["kept"] for name in worker.CONFIGS if both(name)[0]["kept"]} == {"tiny-rlp": [0.5, 0.5]}


def test_a_resumed_run_of_rlp_has_the_average_that_it_had(both):
    (row,) = both("rewound")[0]
    assert row == both("tiny-rlp")[0]["rows"][1] and row["step"] == 2
