"""The comparison with TRL: each trainer gets the same work, in a process of its own. No time is judged here."""

from importlib.util import find_spec

import pytest
from reference import ROOT

from bench import trl as peers
from bench.__main__ import main
from bench.trl import peer_prompts
from config import Config, read_config

SMALL = ["configs/tiny.yaml", "passages_per_step=2", "masks_per_passage=2", "predictions_per_mask=4",
         "max_prediction_tokens=6"]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch) -> Config:
    monkeypatch.chdir(ROOT)
    return read_config(SMALL)


def test_prompts_are_the_prediction_prompts_of_a_step(tiny):
    prompts = peer_prompts(tiny)
    assert len({*prompts}) == 4 and all(text.endswith("\nPredict:") for text in prompts)


@pytest.mark.parametrize("visible, given", [(None, "0"), ("2,3", "2"), ("", "")])
def test_a_trainer_sees_one_gpu_or_none(tiny, monkeypatch, visible, given):
    seen = []
    monkeypatch.setitem(peers.TRAINERS, "ours", lambda config: seen.append(peers.os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    peers.measure("ours", tiny)
    assert seen == [given]


def test_our_steps_run_in_a_process_of_their_own_and_make_the_table(tiny, monkeypatch, capsys):
    monkeypatch.setattr(peers, "TRAINERS", {"ours": peers.TRAINERS["ours"]})
    main(["trl", *SMALL])
    head, row = capsys.readouterr().out.splitlines()
    step, lowest, highest, warmup, times, memory = map(float, row.split()[1:])
    assert 0 < lowest <= step <= highest and times == 1.0 and warmup > 0 and memory > 0 and "times" in head


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed")
def test_all_trainers_run(tiny, capsys):
    main(["trl", *SMALL])
    assert [line[:14].strip() for line in capsys.readouterr().out.splitlines()[1:]] == list(peers.TRAINERS)
