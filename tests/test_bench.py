"""The benchmark: every response gets the length that was asked for, the figures follow from lengths and seconds, and a
run in miniature prints what is promised. No time is judged here."""

import gzip
import json
import random
import re
from dataclasses import replace

import pytest
from reference import ROOT, TINY_BASE

import model
from transformers.generation.continuous_batching.requests import RequestState

import rollout as sampling
from bench import step as timing
from bench.__main__ import main
from bench.memory import shape_of
from bench.options import read_words
from bench.plan import GPUS, architecture, decode_limit, train_flops
from bench.step import NEVER, one_step, random_sampler, time_rows
from config import Config, ConfigError
from rollout import generate, predict_prompt

TINY = ["configs/tiny.yaml", "passages_per_step=2", "masks_per_passage=2", "predictions_per_mask=4"]


@pytest.fixture
def tiny(monkeypatch) -> Config:
    monkeypatch.chdir(ROOT)
    return read_words(TINY, "step")[1]


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
    assert lengths(generate(sampler, prompts, 4, 15, NEVER, seed=1, limits=limits)) == limits
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
    assert lengths(generate(sampler, prompts, 4, 60, NEVER, seed=1, limits=limits)) == limits
    assert max(restarts) > 0, "none was restarted after it had begun"


def test_a_step_whose_lengths_are_not_those_asked_for_raises(tiny, ranks):
    run = timing.make_run(random_sampler(tiny, architecture(tiny.model), ranks))
    run.sampler.eos_ids = set(range(700))
    with pytest.raises(RuntimeError, match="predict, step 3: responses did not get their lengths"):
        one_step(run, {"predict": ([[1, 2, 3, 4, 5]] * 2, [[14] * 4] * 2)}, 3)


def test_random_weights_are_seeded_and_not_the_checkpoints(tiny, ranks):
    def first(config):
        return next(random_sampler(config, architecture(config.model), ranks).replica.parameters())

    weights = first(tiny)
    assert weights.equal(first(tiny)) and not weights.equal(first(replace(tiny, seed=1)))
    assert abs(weights.std().item() - 0.05) < 0.005  # initializer_range; not what training made of it


@pytest.fixture
def clocked(monkeypatch):
    """No step is run: its phases take 1, 2 and 5 times the seconds of a list, and its memory is given."""
    seconds = []

    def step(run, works, number):
        now = seconds.pop(0)
        times = {"propose": now, "predict": 2 * now, "update": 5 * now, "step": 8 * now}
        return {"seconds": times, "trained": [(20, [10])] * 20, "memory": (1.5, 100, 0.5)}

    monkeypatch.setattr(timing, "one_step", step)
    return seconds


def test_figures_follow_from_lengths_and_seconds(tiny, ranks, clocked):
    clocked += [9.0, 2.0, 4.0, 3.0] * 2  # for each row a warm-up and three repeats
    options, config = read_words([*TINY, "prompt=20", "equal=10"], "step")
    result = time_rows(config, options, ranks, GPUS["h100"])
    row, shape = result["rows"]["equal"], shape_of(architecture(tiny.model))
    assert row["seconds"] == {"propose": 3.0, "predict": 6.0, "update": 15.0, "step": 24.0}
    assert row["warmup_seconds"]["step"] == 72.0 and len(row["repeats"]) == 3
    assert (row["responses"], row["response_tokens"], row["trained_tokens"]) == (20, 200, 600)
    assert row["response_tokens_per_second"] == 200 / 9 and row["training_tokens_per_second"] == 600 / 15
    assert row["mfu"] == pytest.approx(train_flops(shape, [(20, [10])] * 20) / 15 / GPUS["h100"].flops)
    least = [decode_limit(shape, tiny, GPUS["h100"], 1, 100, 20, [[10] * n] * n) for n in (2, 4)]
    assert list(row["decode_limit_seconds"].values()) == least and row["decode_share"] == pytest.approx(sum(least) / 9)
    assert (row["cache_tokens"], row["cache_gb"], row["training_gb"]) == (100, 0.5, 1.5)
    table = timing.step_table(result)
    assert re.search(r"response tokens per second .* 22\n(.*\n)+training tokens per second +40 +40\n", table)


def test_a_run_in_miniature(tiny, ranks, monkeypatch):
    calls, original = [], timing.rollout

    def watched(sampler, prompts, *words, **keys):
        groups = original(sampler, prompts, *words, **keys)
        calls.append((prompts, lengths(groups)))
        return groups

    monkeypatch.setattr(timing, "rollout", watched)
    options, config = read_words([*TINY, "repeats=2", "prompt=9", "mean_response=6"], "step")
    result = time_rows(config, options, ranks, None)
    lognormal, equal = calls[:6], calls[6:]  # a warm-up and two repeats of two phases each
    assert lognormal == lognormal[:2] * 3 and equal == equal[:2] * 3  # the work of a row is the same in every step
    (proposing, _), (predicting, drawn) = lognormal[:2]
    assert [len(proposing), len(predicting)] == [2, 4] and {*map(len, proposing + predicting)} == {9}
    assert len(set(sum(drawn, []))) > 3 and sum(map(sum, drawn)) / 16 == pytest.approx(6, abs=0.5)
    assert equal[:2] == [(proposing, [[7] * 2] * 2), (predicting, [[7] * 4] * 4)]  # prompts follow from the seed
    json.dumps(result)
    assert set(result["rows"]) == {"lognormal", "equal"} and result["gpu"] is None
    for name, row in result["rows"].items():
        assert row["responses"] == 20 and row["trained_tokens"] == row["response_tokens"] + 9 * 6  # a prompt once
        assert set(row["seconds"]) == {"propose", "predict", "reward", "update", "refresh", "step"}
        assert all(value > 0 for value in row["seconds"].values()), name
        assert row["mfu"] is row["decode_share"] is row["training_gb"] is None
        assert row["cache_gb"] == pytest.approx(row["cache_tokens"] * result["cache_bytes_per_token"] / 1e9, rel=0.05)
    assert re.search(r"478,080 parameters(.*\n)+mfu +- +-\n", timing.step_table(result))


def test_a_step_against_its_rollouts(tiny, ranks, clocked):
    options, config = read_words([*TINY, "repeats=1", "prompt=9", "rollouts=4,12"], "step")
    clocked += [9.0, 0.05, 9.0, 0.06]  # 8 x 50 ms for 4 rollouts, 8 x 60 ms for 12
    result = time_rows(config, options, ranks, None)
    assert {name: row["responses"] for name, row in result["rows"].items()} == {"4": 4, "12": 12}
    last = r"\n12 +0.480 +0.120 +0.300 +40.00\n0.360 s \+ 10.00 ms a rollout, at most 0% off$"
    assert re.search(last, timing.step_table(result))


BREAKS = {
    "refresh": (model, "refresh", lambda policy, replica: None),
    "greedy": (timing, "generate", lambda *words: generate(*words[:-1], False)),
    "gather": (timing, "from_arrays", lambda arrays, prompts: []),
    "checkpoint": (timing, "load_checkpoint", lambda saver, path, facts: None),
}


@pytest.mark.parametrize("broken", ["", *BREAKS])
def test_the_checks_pass_here_and_name_what_is_broken(tiny, ranks, monkeypatch, capfd, broken):
    if broken:
        monkeypatch.setattr(*BREAKS[broken])
    lines, tiny = [], replace(tiny, tokens_per_micro_batch=1024)
    assert timing.check_host(tiny, ranks, lines.append) == ([broken] if broken else [])
    names = "versions ranks gather Liger attention greedy log-probs update refresh checkpoint".split()
    assert [line.split()[:2] for line in lines] == [[name, "FAIL" if name == broken else "pass"] for name in names]


def test_words_of_a_command_keys_of_the_config_and_defaults(tiny):
    options, config = read_words([*TINY, "prompt=9", "seed=3", "sigma=0.5", "rollouts=8,16"], "step")
    assert (options.prompt, options.sigma, options.rollouts, config.seed) == (9, 0.5, "8,16", 3)
    options, _ = read_words([], "step")
    assert (options.prompt, options.cap, options.mean_response, options.equal) == (400, 1024, 384, 512)
    assert read_words(["seed=3"], "trl", TINY[0])[1] == read_words([TINY[0], "seed=3"], "trl")[1]


@pytest.mark.parametrize("command, words", [
    ([], "cap=99 prompt=999 mean_response=15 equal=15 repeats=0 rollouts=9 rollouts=4,x rollouts=0 sigma=-1 method=cpt "
         "gpus=2 repeats=two"),
    (["plan"], "gpus=0 kept=0 mfu=1.5 sigma=-1 gpu=abacus gpus=two"), (["trl"], "tokens=0 peers=ours,verl"),
])  # fmt: skip
def test_a_bad_word_is_named(tiny, command, words):
    for word in words.split():
        with pytest.raises(ConfigError, match=f"^{word.split('=')[0]}="):
            main([*command, *TINY, word])


@pytest.mark.slow
def test_commands(command, tmp_path):
    done = command(["-m", "bench", *TINY, "repeats=1", f"out={tmp_path / 'b' / 'x.json'}"], 120, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "b" / "x.json").read_text())
    assert result["world"] == 2 and result["rows"]["equal"]["responses"] == 20
    assert done.stdout.count("response tokens per second") == 1  # one rank prints
    refused = command(["-m", "bench", "plan", "configs/smollm3.yaml", "gpu=abacus"], 60)
    assert refused.returncode == 2 and refused.stderr.startswith("config error: gpu='abacus'")
    checked = command(["-m", "bench", "check"], 120, ranks=2)
    assert checked.returncode == 0 and checked.stdout.count(" pass ") == 10 and "2 ranks" in checked.stdout
