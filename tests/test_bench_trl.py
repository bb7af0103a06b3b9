"""The comparison with TRL: each trainer gets the same work, in a process of its own. No time is judged here."""

import gc
import time
from importlib.util import find_spec

import pytest
import torch
from reference import ROOT, load_plain

from bench import trl as peers
from bench.__main__ import main
from bench.step import given_work, make_run
from bench.trl import peer_prompts
from config import Config, read_config
from model import load_replica, load_tokenizer
from rollout import make_sampler
from train import step

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


@pytest.mark.slow
def test_our_steps_run_in_a_process_of_their_own_and_make_the_table(tiny, monkeypatch, capsys):
    monkeypatch.setattr(peers, "TRAINERS", {"ours": peers.TRAINERS["ours"]})
    main(["trl", *SMALL])
    head, row = capsys.readouterr().out.splitlines()
    step, lowest, highest, warmup, times, memory = map(float, row.split()[1:])
    assert 0 < lowest <= step <= highest and times == 1.0 and warmup > 0 and memory > 0 and "times" in head


def plain_step(model, optimizer, ids, seen, count: int, tokens: int, size: int) -> None:
    """What one writes first: pad on the left, generate, a forward with all logits, advantages, backward, step."""
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": count, "pad_token_id": 0}
    sampling |= {"max_new_tokens": tokens, "min_new_tokens": tokens}
    rewards = (torch.arange(count) % 2).float().repeat(len(ids), 1)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).view(-1, 1)
    with torch.no_grad():
        whole = model.generate(input_ids=ids, attention_mask=seen, **sampling)
    seen = torch.cat([seen.repeat_interleave(count, 0), torch.ones_like(whole[:, ids.shape[1] :])], 1)
    assert whole.shape == (len(ids) * count, ids.shape[1] + tokens)
    for begin in range(0, len(whole), size):
        part = slice(begin, begin + size)
        positions = (seen[part].cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=whole[part], attention_mask=seen[part], position_ids=positions).logits
        logprobs = logits[:, ids.shape[1] - 1 : -1].float().log_softmax(-1)
        chosen = logprobs.gather(-1, whole[part, ids.shape[1] :, None])[..., 0]
        (-(torch.exp(chosen - chosen.detach()) * advantages[part]).sum() / (len(whole) * tokens)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.slow
def test_our_step_keeps_up_with_a_plain_loop(ranks, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, tokens, count = read_config(["configs/tiny.yaml"]), 12, 8
    prompts, tokenizer = peer_prompts(config)[:16], load_tokenizer(config)
    run = make_run(make_sampler(load_replica(config, ranks), tokenizer, config, ranks))
    method = given_work({"predict": (tokenizer(prompts).input_ids, [[tokens] * count] * len(prompts))})
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    padded, model = tokenizer(prompts, padding=True, return_tensors="pt"), load_plain(config.model)
    size = config.tokens_per_micro_batch // (padded.input_ids.shape[1] + tokens)
    given = padded.input_ids, padded.attention_mask, count, tokens, size
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    seconds = {"ours": [], "plain": []}
    gc.collect()
    gc.freeze()  # as train.py does
    for number in range(4):  # by turns
        begin = time.process_time()
        step(run, number, method)
        middle = time.process_time()
        plain_step(model, optimizer, *given)
        seconds["ours"].append(middle - begin)
        seconds["plain"].append(time.process_time() - middle)
    gc.unfreeze()
    assert min(seconds["ours"]) <= 1.25 * min(seconds["plain"]), seconds


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed")
def test_all_trainers_run(tiny, capsys):
    main(["trl", *SMALL])
    assert [line[:14].strip() for line in capsys.readouterr().out.splitlines()[1:]] == list(peers.TRAINERS)
