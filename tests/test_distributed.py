"""Two ranks compute what one would, and meet without waiting for ever. The checks themselves are in worker.py."""

import json

import pytest
import worker
from reference import DENSE, FAMILIES, ROOT


@pytest.fixture(scope="session")
def both(command, tmp_path_factory):
    """(name of a check) -> what it returned on rank 0 and on rank 1. All checks ran in one go, at the first request."""
    out = tmp_path_factory.mktemp("two_ranks")
    ended = command([ROOT / "tests/worker.py", out], limit=worker.LIMIT + 30, ranks=2)
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
        assert len(result) == len(DENSE) * 2 * 2
        for name, case in result.items():
            assert case["gradients"] < 1e-4 and case["metrics"] < 1e-4, name
            assert case["tokens_per_rank"][0] != case["tokens_per_rank"][1]
        assert {case["micro_batches"] > 2 for case in result.values()} == {True, False}


def test_a_rank_with_nothing_to_train_still_takes_part(both):
    for result in both("check_a_rank_with_nothing_to_train"):
        assert result["samples"] == 1 and result["gradients"] < 1e-4


def test_two_updates_on_one_batch_equal_the_naive_loop(both):
    for result in both("check_two_updates_per_batch"):
        assert result["moves"] < 1e-4 and result["metrics"] < 1e-4 and 0 < result["clip_fraction"] < 0.5


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_is_named(both):
    for result in both("check_a_loss_that_is_not_finite_on_one_rank"):
        assert result == {"message": "step 5: loss not finite on rank [1]; weights unchanged", "unchanged": True}


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


def test_a_checkpoint_restores_every_bit(both):
    for result in both("check_a_checkpoint_restores_every_bit"):
        assert result["kept"] == ["latest", "step_000002", "step_000003"]  # keep_last=2
        assert result["latest"] == "step_000003" and result["done"] == 3
        assert result["masters"] and result["optimizer"] and result["replica"]
        assert result["next_step"]  # and the run goes on as it would have


def test_a_checkpoint_is_a_folder_for_from_pretrained(both):
    for result in both("check_a_checkpoint_restores_every_bit"):
        assert result["exported"] and result["tokenizer"]


def test_the_probe_gives_the_same_numbers_on_both_ranks(both):
    first, second = both("check_the_probe_is_the_same_on_every_rank")
    assert first == second
    assert first["again"] and len(first["masks"]) == 3
    assert first["probe"]["probe/perplexity"] == pytest.approx(first["perplexity"], rel=1e-4)
    names = {"accuracy", "accuracy_greedy", "accuracy_no_thought", "accuracy_greedy_no_thought", "valid_rate"}
    assert set(first["probe"]) == {f"probe/{name}" for name in names | {"perplexity"}}
