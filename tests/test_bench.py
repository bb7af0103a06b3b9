"""The benchmark: every response gets the length that was asked for, the figures follow from lengths and seconds, and a
run in miniature prints what is promised. No time is judged here."""

import gzip
import json
import random
import re
from dataclasses import asdict, replace

import pytest
from reference import ROOT, TINY_BASE

import model
from bench import check
from bench import step as timing
from bench.costs import GPUS, Bundle, architecture, decode_limit, train_flops
from bench.memory import shape_of
from bench.options import Options, Phase, complete, split_words
from bench.step import NEVER, StepTimes, Work, make_work, one_step, random_sampler, time_rows
from config import Config, ConfigError, read_config
from rollout import generate, predict_prompt

SMALL = ["passages_per_step=2", "masks_per_passage=2", "predictions_per_mask=4"]


@pytest.fixture
def tiny(monkeypatch) -> Config:
    monkeypatch.chdir(ROOT)
    return read_config(["configs/tiny.yaml", *SMALL])


# ---- lengths


def lengths(groups) -> list[list[int]]:
    return [[len(response.completion_ids) for response in group] for group in groups]


@pytest.fixture
def talkative(build_sampler):
    """The trained tiny base, which ends its responses by itself, and prompts to which it knows the answer."""
    sampler = build_sampler(TINY_BASE, predict_prompt=" {passage}\nPredict:")
    with gzip.open(ROOT / "assets/tiny_wiki.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(6)]
    masked = [text.replace(text.split()[3], "[mask]", 1) for text in texts]
    return sampler, [predict_prompt(sampler, text) for text in masked]


@pytest.mark.parametrize("at_once", [0, 3])
def test_every_response_gets_its_own_length(talkative, at_once):
    sampler, prompts = talkative
    sampler.config = replace(sampler.config, max_requests=at_once)
    sampler.eos_ids = {10**6}
    rng = random.Random(0)
    limits = [[rng.randint(1, 15) for _ in range(4)] for _ in prompts]
    assert lengths(generate(sampler, prompts, 4, 15, NEVER, seed=1, limits=limits)) == limits
    assert set(sum(lengths(generate(sampler, prompts, 4, 15, NEVER, seed=1)), [])) == {15}  # the limits are gone again


def test_a_restarted_response_keeps_its_length(talkative, monkeypatch):
    import rollout
    from transformers.generation.continuous_batching.requests import RequestState

    sampler, prompts = talkative
    sampler.eos_ids = {10**6}
    original, restarts = rollout.batching_settings, []

    def crowded(*words):  # a cache for some three of them: others are sent back to the queue halfway
        options = original(*words)
        options.num_blocks = 9
        return options

    reset = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(rollout, "batching_settings", crowded)
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request",
        lambda self: restarts.append(len(self.generated_tokens)) or reset(self),
    )  # fmt: skip
    limits = [[60, 9, 50, 33]] * len(prompts)
    assert lengths(generate(sampler, prompts, 4, 60, NEVER, seed=1, limits=limits)) == limits
    assert max(restarts) > 0, "none was restarted after it had begun"


def test_a_step_whose_lengths_are_not_those_asked_for_raises(tiny, ranks, monkeypatch):
    run = timing.make_run(random_sampler(tiny, architecture(tiny.model), ranks))
    run.sampler.eos_ids = set(range(700))
    work = make_work(Phase("predict", 2, 4, 14), [14] * 8, 5, 747, seed=0)
    with pytest.raises(RuntimeError, match="predict, step 3: responses did not get their lengths"):
        one_step(run, [work], 3)


def test_work_is_the_same_for_the_same_seed_and_every_group_has_both_rewards():
    phase = Phase("predict", 3, 2, 9)
    one = make_work(phase, [1, 2, 3, 4, 5, 6], 7, 100, seed=0)
    assert one == make_work(phase, [1, 2, 3, 4, 5, 6], 7, 100, seed=0)
    assert one.prompts != make_work(phase, [1] * 6, 7, 100, seed=1).prompts
    assert one.limits == [[1, 2], [3, 4], [5, 6]] and [len(prompt) for prompt in one.prompts] == [7, 7, 7]
    rng = random.Random(0)
    rewards = [timing.seeded_verdicts(count, rng) for count in (2, 3, 8) * 20]
    assert all(set(group) == {0.0, 1.0} for group in rewards) and [len(group) for group in rewards[:3]] == [2, 3, 8]


# ---- random weights


def test_random_weights_are_seeded_and_not_the_checkpoints(tiny, ranks):
    def first(config):
        return next(random_sampler(config, architecture(config.model), ranks).replica.parameters())

    one = first(tiny)
    assert one.equal(first(tiny)) and not one.equal(first(replace(tiny, seed=1)))
    assert abs(one.std().item() - 0.05) < 0.005  # initializer_range; not what training made of it


# ---- figures


def test_figures_follow_from_lengths_and_seconds(tiny, ranks, monkeypatch):
    seconds = iter([9.0, 2.0, 4.0, 3.0])  # a warm-up and three repeats
    shape, gpu = shape_of(architecture(tiny.model)), GPUS["h100"]

    def step(run, works, number):
        now = next(seconds)
        times = {"propose": now, "predict": 2 * now, "update": 5 * now, "step": 8 * now}
        return StepTimes(times, [Bundle(20, [10])] * 20, training_gb=1.5, cache_tokens=100, cache_gb=0.5)

    monkeypatch.setattr(timing, "one_step", step)
    propose = Work(Phase("propose", 2, 2, 14), [[1] * 20] * 2, [[10, 10], [10, 10]])
    predict = Work(Phase("predict", 4, 4, 14), [[1] * 20] * 4, [[10, 10, 10, 10]] * 4)
    run = type("Run", (), {"config": tiny, "ranks": ranks})
    row = timing.time_row(run, [propose, predict], shape, gpu, repeats=3)
    assert row["seconds"] == {"propose": 3.0, "predict": 6.0, "update": 15.0, "step": 24.0}
    assert row["warmup_seconds"]["step"] == 72.0 and len(row["repeats"]) == 3
    assert (row["responses"], row["response_tokens"], row["trained_tokens"]) == (20, 200, 600)
    assert row["response_tokens_per_second"] == 200 / 9 and row["training_tokens_per_second"] == 600 / 15
    assert row["mfu"] == pytest.approx(train_flops(shape, [Bundle(20, [10])] * 20) / 15 / gpu.flops)
    # a cache of 100 tokens holds four responses of 20 + 10 / 2 tokens; float32 takes four bytes a number
    both = [decode_limit(shape, gpu, 20, work.limits, 1, 4, width=4) for work in (propose, predict)]
    assert list(row["decode_limit_seconds"].values()) == both
    assert row["decode_share"] == pytest.approx(sum(both) / 9)
    assert (row["cache_tokens"], row["cache_gb"], row["training_gb"]) == (100, 0.5, 1.5)
    result = {"rows": {"one": row}, "gpu": asdict(gpu), "world": 1, "shape": asdict(shape), "attention": "x"}
    text = timing.step_table(result | {"config": asdict(tiny), "options": {"prompt": 20, "repeats": 3}})
    assert re.search(r"response tokens per second +22\n", text) and re.search(r"training tokens per second +40\n", text)


# ---- the whole, in miniature


def test_a_run_in_miniature(tiny, ranks, monkeypatch):
    seen = []
    original = timing.rollout

    def watched(*words, **keys):
        groups = original(*words, **keys)
        seen.append(lengths(groups))
        return groups

    monkeypatch.setattr(timing, "rollout", watched)
    result = time_rows(tiny, complete(Options(repeats=2, prompt=9, mean_response=6), tiny, "step"), ranks)
    assert [len(groups) for groups in seen] == [2, 4] * 6  # two rows of a warm-up and two repeats
    lists = [[length for group in groups for length in group] for groups in seen]
    assert lists[0] == lists[2] == lists[4] and lists[1] == lists[3] == lists[5]
    assert len(set(lists[1])) > 3 and sum(lists[1]) / 16 == pytest.approx(6, abs=0.5)
    assert set(lists[6] + lists[7]) == {7}
    json.dumps(result)
    assert set(result["rows"]) == {"lognormal", "equal"} and result["gpu"] is None
    for name, row in result["rows"].items():
        assert row["responses"] == 20 and row["trained_tokens"] == row["response_tokens"] + 9 * 6  # a prompt once
        assert set(row["seconds"]) == {"propose", "predict", "reward", "update", "refresh", "step"}
        assert all(value > 0 for value in row["seconds"].values()), name
        assert row["mfu"] is row["decode_share"] is row["training_gb"] is None
        assert row["cache_gb"] == pytest.approx(row["cache_tokens"] * result["cache_bytes_per_token"] / 1e9, rel=0.05)
    assert result["rows"]["equal"]["response_tokens"] == 7 * 20
    text = timing.step_table(result)
    assert "478,080 parameters" in text and re.search(r"mfu +- +-\n", text)


def test_a_step_against_its_rollouts(tiny, ranks):
    result = time_rows(tiny, complete(Options(repeats=1, prompt=9, rollouts="4,12"), tiny, "step"), ranks)
    assert {name: row["responses"] for name, row in result["rows"].items()} == {"4": 4, "12": 12}
    assert len(timing.scaling_table(result["rows"]).split("\n")) == 4
    rows = {str(n): {"seconds": {"step": 0.1 + 0.01 * n, "predict": 0.1, "update": 0.01 * n}} for n in (64, 128)}
    assert timing.scaling_table(rows).endswith("0.100 s + 10.00 ms a rollout, at most 0% off")


# ---- the first minutes on a new host

BREAKS = {
    "": lambda patch: None,
    "refresh": lambda patch: patch.setattr(model, "refresh", lambda policy, replica: None),
    "greedy": lambda patch: patch.setattr(check, "generate", lambda *words: generate(*words[:-1], False)),
    "gather": lambda patch: patch.setattr(check, "from_arrays", lambda arrays, prompts: []),
    "checkpoint": lambda patch: patch.setattr(check, "load_checkpoint", lambda saver, path, facts: None),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_checks_pass_here_and_name_what_is_broken(tiny, ranks, monkeypatch, capfd, broken):
    BREAKS[broken](monkeypatch)
    lines, tiny = [], replace(tiny, tokens_per_micro_batch=1024)
    assert check.check_host(tiny, ranks, lines.append) == ([broken] if broken else [])
    names = "versions ranks gather Liger attention greedy log-probs update refresh checkpoint".split()
    assert [line.split()[:2] for line in lines] == [[name, "FAIL" if name == broken else "pass"] for name in names]


# ---- words


def test_words_of_a_command_keys_of_the_config_and_defaults():
    words = ["configs/tiny.yaml", "prompt=9", "seed=3", "sigma=0.5", "rollouts=8,16", "gpus=2"]
    options, rest = split_words(words, "step")
    assert (options.prompt, options.sigma, options.rollouts) == (9, 0.5, "8,16")
    assert rest == ["configs/tiny.yaml", "seed=3", "gpus=2"]  # a word of `plan`; the config refuses it
    with pytest.raises(ConfigError, match="gpus='two': expected a whole number"):
        split_words(["gpus=two"], "plan")
    options = complete(Options(), Config(), "step")
    assert (options.prompt, options.cap, options.mean_response, options.equal) == (400, 1024, 384, 512)


@pytest.mark.parametrize("command, word", [
    *(("step", word) for word in ("cap=99", "prompt=999", "mean_response=15", "equal=15", "repeats=0", "rollouts=9",
                                  "rollouts=4,x", "rollouts=0", "sigma=-1")),
    *(("plan", word) for word in ("gpus=0", "kept=0", "mfu=1.5", "sigma=-1", "gpu=abacus")), ("trl", "tokens=0"),
])  # fmt: skip
def test_a_bad_word_is_named(tiny, command, word):
    with pytest.raises(ConfigError, match=f"^{word.split('=')[0]}="):
        complete(split_words([word], command)[0], tiny, command)
    with pytest.raises(ConfigError, match="method='cpt': samples nothing"):
        complete(Options(), replace(tiny, method="cpt"), "step")


@pytest.mark.slow
def test_commands(command, tmp_path):
    words = ["configs/tiny.yaml", *SMALL, "repeats=1", f"out={tmp_path / 'b' / 'x.json'}"]
    done = command(["-m", "bench", *words], 120, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "b" / "x.json").read_text())
    assert result["world"] == 2 and result["rows"]["equal"]["responses"] == 20
    assert done.stdout.count("response tokens per second") == 1  # one rank prints
    refused = command(["-m", "bench", "plan", "configs/smollm3.yaml", "gpu=abacus"], 60)
    assert refused.returncode == 2 and refused.stderr.startswith("config error: gpu='abacus'")
    checked = command(["-m", "bench", "check"], 120, ranks=2)
    assert checked.returncode == 0 and checked.stdout.count(" pass ") == 10 and "2 ranks" in checked.stdout
