"""The benchmark: every response gets the length that was asked for, the figures follow from tokens and seconds, and a
run in miniature prints what is promised. No time is judged here."""

import gzip
import json
import random
from dataclasses import replace

import pytest
from reference import ROOT, TINY_BASE

import train
from transformers.generation.continuous_batching.requests import RequestState

import rollout as sampling
from bench import step as timing
from bench.__main__ import main
from bench.plan import PlanOptions, Work, read_words
from bench.step import NEVER, given_work, made_up_work, make_run, random_sampler, step_table, stop_at_limits, time_steps
from config import Config, ConfigError
from prompts import predict_prompt
from rollout import generate

TINY = ["configs/tiny.yaml", "passages_per_step=2", "masks_per_passage=2", "predictions_per_mask=4"]


@pytest.fixture
def tiny(monkeypatch) -> Config:
    monkeypatch.chdir(ROOT)
    return read_words(TINY, Work)[1]


def lengths(groups) -> list[list[int]]:
    return [[len(response.completion_ids) for response in group] for group in groups]


@pytest.fixture
def talkative(build_sampler):
    """The trained tiny base, which no longer ends its responses by itself, and prompts to which it knows the answer."""
    sampler = build_sampler(TINY_BASE, predict_prompt=" {passage}\nPredict:")
    sampler.eos_ids = {10**6}
    with gzip.open(ROOT / "assets/tiny_wiki.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(6)]
    return sampler, [predict_prompt(sampler, text.replace(text.split()[3], "[mask]", 1)) for text in texts]


@pytest.mark.parametrize("at_once", [0, 3])
def test_every_response_gets_its_own_length(talkative, at_once):
    sampler, prompts = talkative
    sampler.config = replace(sampler.config, max_requests=at_once)
    rng = random.Random(0)
    limits = [[rng.randint(1, 15) for _ in range(4)] for _ in prompts]
    with stop_at_limits(limits):
        assert lengths(generate(sampler, prompts, 4, 15, NEVER, seed=1)) == limits
    assert set(sum(lengths(generate(sampler, prompts, 4, 15, NEVER, seed=1)), [])) == {15}  # the limits are gone again


def test_a_restarted_response_keeps_its_length(talkative, monkeypatch):
    sampler, prompts = talkative
    batching, restart = sampling.batching_settings, RequestState.create_equivalent_initial_request
    restarts = []

    def counted(self):
        restarts.append(len(self.generated_tokens))
        return restart(self)

    # a cache for some three of them: others are sent back to the queue halfway
    monkeypatch.setattr(sampling, "batching_settings", lambda *words: replace(batching(*words), num_blocks=9))
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counted)
    limits = [[60, 9, 50, 33]] * len(prompts)
    with stop_at_limits(limits):
        assert lengths(generate(sampler, prompts, 4, 60, NEVER, seed=1)) == limits
    assert max(restarts) > 0, "none was restarted after it had begun"


def test_a_step_whose_lengths_are_not_those_asked_for_raises(tiny, ranks):
    run = make_run(random_sampler(tiny, ranks))
    run.sampler.eos_ids = set(range(700))
    with pytest.raises(RuntimeError, match="predict, step 3: responses did not get their lengths"):
        train.step(run, 3, given_work({"predict": ([[1, 2, 3, 4, 5]] * 2, [[14] * 4] * 2)}))


def test_random_weights_are_seeded_and_not_the_checkpoints(tiny, ranks):
    def first(config):
        return next(random_sampler(config, ranks).replica.parameters())

    weights = first(tiny)
    assert weights.equal(first(tiny)) and not weights.equal(first(replace(tiny, seed=1)))
    assert abs(weights.std().item() - 0.05) < 0.005  # initializer_range; not what training made of it


def test_figures_follow_from_tokens_and_seconds():
    figures = {"response_tokens": 90, "trained_tokens": 60, "peak_memory_gb": 1.5}
    rows = [{"time/propose": seconds, "time/predict": 2 * seconds, "time/update": 5 * seconds} | figures
            for seconds in (9, 2, 4, 3)]  # fmt: skip
    table = step_table(rows, {"prefill": 1.0, "predict": 1.5, "update": 3.0, "optimizer, refresh": 1.0})
    assert [line.split() for line in table.split("\n")[1:5]] == [
        ["propose", "3.000"], ["predict", "6.000", "1.500", "25.0%"], ["update", "15.000", "3.000", "20.0%"],
        ["step", "24.000"],
    ]  # fmt: skip
    assert "sampled: 90 tokens, 10 a second\ntrained: 60 tokens of responses, 4 a second\n" in table
    assert "update: 1.50 GB\n" in table and table.endswith("not counted: 72.000 s")


def test_a_run_in_miniature(tiny, ranks, monkeypatch):
    calls, original = [], timing.rollout

    def watched(sampler, prompts, *words, **keys):
        groups = original(sampler, prompts, *words, **keys)
        calls.append((prompts, lengths(groups)))
        return groups

    monkeypatch.setattr(timing, "rollout", watched)
    work = Work(prompt=9, mean_response=6.0)
    run = make_run(random_sampler(replace(tiny, kl=0.1, mask_truncated=True), ranks))
    rows = time_steps(run, made_up_work(tiny, work, 747), repeats=2)
    assert calls == calls[:2] * 3  # a warm-up and two repeats of two phases each, on the same work
    (proposing, _), (predicting, drawn) = calls[:2]
    assert [len(proposing), len(predicting)] == [2, 4] and {*map(len, proposing + predicting)} == {9}
    assert len(set(sum(drawn, []))) > 3 and sum(map(sum, drawn)) / 16 == pytest.approx(6, abs=0.5)
    assert made_up_work(tiny, work, 747) == dict(zip(("propose", "predict"), calls[:2], strict=True))
    assert made_up_work(replace(tiny, seed=1), work, 747)["predict"][0] != predicting
    for row in rows:  # all are trained on, the masks too
        assert row["responses"] == row["trained_responses"] == 20
        assert row["response_tokens"] == row["trained_tokens"] == sum(sum(map(sum, one)) for _, one in calls[:2])
    lines = step_table(rows, {}).split("\n")
    assert [line.split()[0] for line in lines[1:7]] == ["propose", "predict", "reward", "update", "refresh", "step"]
    assert all(float(line.split()[1]) > 0 for line in lines[2:7])


BREAKS = {
    "kernels": (timing, "score", lambda model, pairs, *_: [([-6.0] * len(end), []) for _, end in pairs]),
    "refresh": (train, "refresh", lambda policy, replica: 1.0),
    "ranks": (timing, "gather", lambda items: items if items != [0] else [1]),
    "checkpoint": (timing, "load_checkpoint", lambda saver, path, facts: None),
}


@pytest.mark.parametrize("broken", ["", *BREAKS])
def test_the_checks_pass_here_and_name_what_is_broken(tiny, ranks, monkeypatch, capfd, broken):
    if broken:
        monkeypatch.setattr(*BREAKS[broken])
    lines, tiny = [], replace(tiny, tokens_per_micro_batch=1024)
    assert timing.check_host(tiny, ranks, lines.append) == ([broken] if broken else [])
    names = "versions ranks kernels decoding update refresh checkpoint".split()
    assert [line.split()[:2] for line in lines] == [[name, "FAIL" if name == broken else "pass"] for name in names]


def test_words_of_a_command_keys_of_the_config_and_defaults(tiny):
    options, config = read_words([*TINY, "prompt=9", "seed=3", "sigma=0.5"], Work)
    assert (options.prompt, options.sigma, config.seed) == (9, 0.5, 3)
    options, config = read_words([], PlanOptions)
    assert (options.prompt, options.mean_response, options.gpus, config) == (400, 1024, 8, Config(run_dir="runs/run"))


@pytest.mark.parametrize("command, words", [
    ([], "method=cpt gpus=2 prompt=two"), (["plan"], "gpus=0 kept=0 mfu=1.5 gpu=abacus gpus=two repeats=2"),
    (["trl"], "tokens=0"),
])  # fmt: skip
def test_a_bad_word_is_named(tiny, command, words):
    for word in words.split():
        with pytest.raises(ConfigError, match=f"^{word.split('=')[0]}="):
            main([*command, *TINY, word])


@pytest.mark.slow
def test_commands(command):
    done = command(["-m", "bench", *TINY], 120, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "478,080 parameters, float32\n2 x CPU; attention flash_varlen, decoding: block table" in done.stdout
    assert done.stdout.count("sampled: ") == 1  # one rank prints
    refused = command(["-m", "bench", "plan", "configs/smollm3.yaml", "gpu=abacus"], 60)
    assert refused.returncode == 2 and refused.stderr.startswith("config error: gpu='abacus'")
    checked = command(["-m", "bench", "check"], 120, ranks=2)
    assert checked.returncode == 0 and checked.stdout.count(" pass ") == 7 and "2 ranks" in checked.stdout
