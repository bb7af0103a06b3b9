"""The comparison with other trainers: every peer gets the same work. No time is judged here, and TRL is not needed."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from reference import ROOT

from bench import trl as peers
from bench.__main__ import main
from bench.options import Options
from bench.trl import make_peer, naive, one_process, peer_prompts, peer_table
from config import Config, read_config

SMALL = Options(prompts=3, completions=4, tokens=5, repeats=1, rounds=1)


@pytest.fixture
def tiny(monkeypatch) -> Config:
    monkeypatch.chdir(ROOT)
    return read_config(["configs/tiny.yaml", "max_prediction_tokens=5"])


def test_prompts_are_prediction_prompts_on_articles_one_or_several_each(tiny):
    one, two = peer_prompts(tiny, SMALL), peer_prompts(tiny, Options(prompts=3, articles=2))
    assert len({*one}) == len(two) == 3 and all(text.endswith("\nPredict:") for text in one)
    for short, long in zip(one, two, strict=True):
        assert long.startswith(short.removesuffix("\nPredict:")) and len(long) > len(short)


def test_a_padded_batch_holds_the_rows_that_its_tokens_allow_and_that_divide_the_step(tiny):
    """Of 12 responses, in rows of the longest prompt and 5 tokens: of 5 rows that fit, 4 divide 12; one at least."""
    longest = make_peer(tiny, SMALL)[3]
    for room, rows in ((4, 4), (5, 4), (6, 6), (0.2, 1), (999, 12)):
        tiny.tokens_per_micro_batch = int(room * (longest + 5))
        assert make_peer(tiny, SMALL)[-1] == rows


def test_the_naive_loop_makes_the_asked_responses_and_moves_the_weights(tiny, monkeypatch):
    model, *others = make_peer(tiny, SMALL)
    before, generate = [parameter.detach().clone() for parameter in model.parameters()], model.generate
    shapes, marks = [], []

    def watched(**words):
        whole = generate(**words)
        shapes.append((words["input_ids"].shape, whole.shape))
        return whole

    model.generate = watched
    monkeypatch.setattr(peers, "make_peer", lambda *_: (model, *others))
    naive(tiny, SMALL, marks)
    assert len(marks) == 4 and marks == sorted(marks)  # before and after the warm-up and one step
    assert len(shapes) == 2 and all(prompt[0] == 3 and whole == (12, prompt[1] + 5) for prompt, whole in shapes)
    assert any((old != new).any() for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
def test_our_step_keeps_up_with_the_naive_loop(tiny):
    ours, theirs = (min(one_process(name, ["prompts=16", "tokens=12"])["cpu_seconds"]) for name in ("ours", "naive"))
    assert ours <= 1.25 * theirs, (ours, theirs)


def test_our_step_runs_in_a_process_of_its_own(tiny):
    row = one_process("ours", ["prompts=2", "completions=2", "tokens=3", "repeats=1"])
    assert row["warmup"] > 0 and len(row["seconds"]) == len(row["cpu_seconds"]) == 1 and row["memory_gb"] > 0


@pytest.mark.parametrize("visible, given", [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "2,3"}, "2"),
                                            ({"CUDA_VISIBLE_DEVICES": ""}, "")])  # fmt: skip
def test_a_peer_sees_one_gpu_or_none(monkeypatch, visible, given):
    monkeypatch.setattr(peers.subprocess, "run", lambda _, env, **__: SimpleNamespace(
        returncode=0, stdout=json.dumps(env["CUDA_VISIBLE_DEVICES"])))  # fmt: skip
    monkeypatch.setattr(peers.os, "environ", visible)
    assert one_process("trl", []) == given


def test_the_table_gives_medians_of_medians_and_ratios_to_the_first_peer():
    def run(*seconds):
        return {"warmup": 9.0, "seconds": seconds, "cpu_seconds": [2 * value for value in seconds], "memory_gb": 1.5}

    runs = {"ours": [run(1, 2, 3), run(4, 4, 4), run(1, 1, 9)], "trl": [run(6, 6, 6), run(5, 5, 5), run(8, 8, 8)]}
    ours, trl = (line.split() for line in peer_table(runs)[-2:])
    assert ours == ["ours", "2.00", "1.00", "4.00", "9.00", "1.00", "4.00", "1.00", "1.50"]
    assert trl == ["trl", "6.00", "5.00", "8.00", "9.00", "3.00", "12.00", "3.00", "1.50"]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed")
def test_all_peers_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    main(["trl", "prompts=4", "completions=4", "tokens=6", "repeats=1", "rounds=1", f"out={tmp_path / 'all.json'}"])
    runs = json.loads((tmp_path / "all.json").read_text())
    assert list(runs) == list(peers.PEERS) and all(len(one[0]["seconds"]) == 1 for one in runs.values())
