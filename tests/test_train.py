"""Whole runs with the evidence they leave, and dry runs."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import yaml

from config import Config, ConfigError, read_config
from metrics import append_row, keep_rows, log_row, open_run, read_rows

SMALL = ["configs/tiny.yaml", "passages_per_step=4", "probe_passages=8", "probe_samples=2", "samples_per_step=4"]
STEP_METRICS = """
    step method lr loss grad_norm mismatch_kl mismatch_abs reward entropy surprisal clip_fraction
    responses response_tokens flops trained_responses trained_tokens
    gen/reward gen/valid_rate gen/groups_kept gen/length_mean gen/length_max gen/truncated gen/tokens_after_answer
    pred/reward pred/valid_rate pred/groups_kept pred/length_mean pred/length_max pred/truncated
    pred/tokens_after_answer gen/distinct gen/span_words gen/occurrences gen/share_fact
    pred/accuracy pred/accuracy_caseless pred/accuracy_zero pred/accuracy_one pred/accuracy_histogram
    time/propose time/predict time/reward time/update time/refresh time/step tokens_per_second peak_memory_gb
""".split()
PROBE_METRICS = """
    probe/accuracy probe/accuracy_greedy probe/accuracy_no_thought probe/accuracy_greedy_no_thought probe/valid_rate
    probe/perplexity probe/accuracy_fact probe/accuracy_greedy_fact time/probe
""".split()


# ---- the run directory
def test_a_fresh_start_moves_an_earlier_run_aside(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"), resume="never")
    for number in range(3):
        open_run(config)
        append_row(tmp_path / "run" / "metrics.jsonl", {"step": number})
    for number, name in enumerate(("run.1", "run.2", "run")):
        assert read_rows(tmp_path / name / "metrics.jsonl") == [{"step": number}]


def test_a_run_writes_down_the_commits_of_what_it_takes_from_the_hub(tmp_path, monkeypatch):
    """A resumed run may meet another one: each start adds its own."""
    known = {("owner/base", "model"): "abc"}
    resolve = lambda name, repo_type: Mock(resolved=known[name, repo_type])  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "resolve_revision", resolve)
    config = Config(model="owner/base", data="owner/text", run_dir=str(tmp_path))
    for fresh in (True, False):  # the second time the data set is known, too
        open_run(config, fresh)
        known["owner/text", "dataset"] = "def"
    open_run(replace(config, model=str(tmp_path), data=str(tmp_path)), False)
    lines = (tmp_path / "environment.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith(("model ", "dataset "))] == [
        "model owner/base: abc", "model owner/base: abc", "dataset owner/text: def",
    ]  # fmt: skip


def test_a_run_that_cannot_be_continued_is_not_written_over(tmp_path):
    """By default, where an earlier run left no checkpoint; one that goes on keeps its rows, and a dry run any."""
    config, told = Config(run_dir=str(tmp_path / "run")), []
    rows = tmp_path / "run" / "metrics.jsonl"
    for fresh, steps, there in ((True, 5, False), (False, 5, True), (True, 0, True), (True, 5, False)):
        open_run(replace(config, steps=steps), fresh, told.append)
        assert rows.exists() == there
        append_row(rows, {"step": 0})
    assert len(told) == 1 and "without a checkpoint to go on from" in told[0]
    assert len(read_rows(tmp_path / "run.1" / "metrics.jsonl")) == 3


def test_rows_after_the_checkpoint_and_a_line_cut_by_a_kill_are_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    text = "é \u2028\u0085 \r\n"  # line ends that are none of ours
    append_row(file, *({"step": step, "text": text} for step in range(5)))
    with file.open("a") as end:
        end.write('{"step": 2, "te')
    assert len(read_rows(file)) == 5
    keep_rows(file, 2)
    assert read_rows(file) == [{"step": step, "text": text} for step in range(3)]
    keep_rows(tmp_path / "none.jsonl", 2)
    for garbage in (b"\0\0\n", b"[3]\n", b'{"loss": 1}\n', b"\xff\n"):
        file.write_bytes(b'{"step": 1}\n' + garbage)
        with pytest.raises(ConfigError, match="metrics.jsonl: no row at line"):
            keep_rows(file, 2)
        assert file.read_bytes().endswith(garbage)  # nothing is lost


# ---- whole runs
@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """Two steps, one process, no torchrun: (run directory, what was printed)."""
    run = tmp_path_factory.mktemp("alone") / "run"
    ended = command(["train.py", *SMALL, "steps=2", f"run_dir={run}"], limit=90)
    assert ended.returncode == 0, ended.stderr
    return run, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    """Three steps on two ranks, with checkpoints after 2 and 3."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    words = [*SMALL, "steps=3", "save_every=2", "lr_schedule=cosine", "warmup_steps=1", "probe_every=2"]
    ended = command(["train.py", *words, f"run_dir={run}"], limit=120, ranks=2)
    assert ended.returncode == 0, ended.stderr
    return run


def test_a_run_leaves_all_evidence(alone):
    run, _ = alone
    names = "config.yaml environment.txt prompts.txt metrics.jsonl samples.jsonl probes.jsonl report.html cache"
    assert {path.name for path in run.iterdir()} >= {*names.split(), "checkpoints"}
    words = [f"{key}={json.dumps(value)}" for key, value in yaml.safe_load((run / "config.yaml").read_text()).items()]
    assert read_config(words) == read_config([*SMALL, "steps=2", f"run_dir={run}"])
    environment = (run / "environment.txt").read_text()
    assert "command: train.py configs/tiny.yaml passages_per_step=4" in environment
    assert f"torch: {torch.__version__}" in environment and "world size: 1" in environment
    prompts = (run / "prompts.txt").read_text()
    assert "Mask:" in prompts and "[mask]" in prompts and "Predict:" in prompts


def test_metrics_has_a_row_per_step_and_one_before_training(alone):
    rows = read_rows(alone[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert set(PROBE_METRICS) <= set(rows[0])
    for row in rows[1:]:
        assert set(STEP_METRICS) <= set(row)
        assert row["method"] == "active" and len(row["pred/accuracy_histogram"]) == 9
        assert row["mismatch_abs"] < 1e-4 and row["clip_fraction"] == 0  # float32, one update per batch
    assert set(PROBE_METRICS) <= set(rows[2])
    assert (rows[1]["lr"], rows[2]["lr"]) == (1e-4, 2e-4)  # warm-up


def test_samples_hold_passage_mask_and_predictions_with_their_rewards(alone):
    samples = read_rows(alone[0] / "samples.jsonl")
    assert len(samples) == 2 * 4 * 4  # steps, passages, masks
    for one in samples:
        assert one["passage"]["title"] and one["passage"]["url"] and one["passage"]["text"]
        valid = not one["mask"]["invalid"]
        assert len(one["predictions"]) == (8 if valid else 0)
        if valid:
            right = sum(prediction["correct"] for prediction in one["predictions"])
            assert all(prediction["correct"] == prediction["reward"] for prediction in one["predictions"])
            assert one["mask"]["masked"].replace("[mask]", one["mask"]["target"]) == one["passage"]["text"]
            assert one["proposal"]["reward"] == (1 - right / 8 if right else 0)
    rewards = [one["proposal"]["reward"] for one in samples[:16]]
    assert read_rows(alone[0] / "metrics.jsonl")[1]["gen/reward"] == pytest.approx(sum(rewards) / 16)


def test_wandb_gets_each_row_if_it_is_asked_for_and_is_not_looked_for_otherwise(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    log_row(tmp_path, {"step": 0}, Config())
    assert "wandb" not in sys.modules and read_rows(tmp_path / "metrics.jsonl") == [{"step": 0}]
    if not find_spec("wandb"):
        with pytest.raises(ConfigError, match="wandb='masks': its package is not there"):
            read_config(["configs/tiny.yaml", "wandb=masks"])
    (tmp_path / "wandb.py").write_text(
        "calls, run = [], None\n"
        "def init(**keys):\n    global run\n    run = keys\n"
        "def log(row, step):\n    calls.append((step, row))\n"
    )
    sys.path.insert(0, str(tmp_path))
    config = read_config(["configs/tiny.yaml", "wandb=masks", "seed=5"])
    for step in (1, 2):
        log_row(tmp_path / ".", {"step": step, "method": "active", "loss": 0.5, "pred/accuracy_histogram": [1]}, config)
    fake = sys.modules.pop("wandb")
    assert fake.calls == [(1, {"step": 1, "loss": 0.5}), (2, {"step": 2, "loss": 0.5})]
    assert fake.run["project"] == "masks" and fake.run["config"]["seed"] == 5 and fake.run["name"] == tmp_path.name
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_the_terminal_tells_what_runs_and_sums_up(alone):
    words = ["parameters, float32, 1 x cpu", "layers stored for the backward pass\n", "step 0: probe accuracy"]
    for part in [*words, "step 1/2", "step 2/2", "held-out", "report.html"]:
        assert part in alone[1], alone[1]
    assert "Traceback" not in alone[1]


def test_the_order_of_passages_does_not_depend_on_the_number_of_ranks(alone, unbroken):
    order = [
        [(row["step"], row["passage"]["id"]) for row in read_rows(run / "samples.jsonl") if row["step"] <= 2]
        for run in (alone[0], unbroken)
    ]
    assert order[0] == order[1] and len(order[0]) == 32
    # the seconds of a save stand in the next row: its own must be on disk before the checkpoint is
    assert [row["step"] for row in read_rows(unbroken / "metrics.jsonl") if "time/save" in row] == [3]


WARMUP = ["warmup_method=random_span", "warmup_method_steps=2", "gradient_checkpointing=auto"]


@pytest.mark.parametrize("keys", [["kl=0.1"], pytest.param(["offload=true", *WARMUP], marks=pytest.mark.slow)])
def test_a_dry_run_shows_both_roles_and_changes_nothing(command, tmp_path, keys):
    """Also those that come after a warm-up. Nor does it forget what a run of the same folder has written."""
    (tmp_path / "run").mkdir()
    append_row(tmp_path / "run/metrics.jsonl", {"step": 0}, {"step": 1})
    ended = command(["train.py", *SMALL, "steps=0", *keys, f"run_dir={tmp_path / 'run'}"], limit=90)
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 0, printed
    for words in ("gen/valid_rate", "pred/valid_rate", "mismatch_kl", "dry run done; no weights were changed"):
        assert words in printed, printed
    assert ("masters, gradients and Adam on the host" in printed) == ("offload=true" in keys)
    assert printed.count("--- generator:") == printed.count("--- predictor:") == 2
    assert "no group with contrast" not in printed
    (loss,) = [float(line.split()[1]) for line in printed.splitlines() if line.split()[:1] == ["loss"]]
    assert abs(loss) < 1  # the penalty at the start is 0
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [0, 1]
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_a_dry_run_tries_the_trainer_even_where_nothing_can_be_learned(command, folders, tmp_path):
    """A base that masks nothing valid earns 0 throughout: no group would be kept, and the update would do nothing."""
    words = ["steps=0", "train_generator=false", "mask_truncated=true", f"model={folders['smollm3']}"]
    words += ["max_prompt_tokens=400", "tokens_per_micro_batch=512"]
    ended = command(["train.py", *SMALL, *words, f"run_dir={tmp_path / 'run'}"], limit=90, ranks=2)
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 0, printed
    row = dict(line.split()[:2] for line in printed.splitlines() if line.startswith("  "))
    assert float(row["gen/valid_rate"]) == float(row["gen/groups_kept"]) == 0
    assert min(float(row[key]) for key in ("trained_tokens", "mismatch_abs", "grad_norm", "peak_memory_gb")) > 0
    assert "no group with contrast" in printed and ", no valid mask: " in printed


@pytest.mark.slow
def test_a_dry_run_of_star_tries_the_trainer_too(command, folders, tmp_path):
    words = ["steps=0", "method=star", f"model={folders['smollm3']}"]
    words += ["max_prompt_tokens=400", "tokens_per_micro_batch=512"]
    printed = command(["train.py", *SMALL, *words, f"run_dir={tmp_path / 'run'}"], limit=90).stdout
    (tokens,) = [float(line.split()[1]) for line in printed.splitlines() if line.split()[:1] == ["trained_tokens"]]
    assert "no group with contrast" in printed and tokens > 0


@pytest.mark.slow
def test_a_bad_data_file_is_one_clear_line_and_ends_all_ranks(command, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("no json\n" * 3)
    ended = command(["train.py", *SMALL, f"data={file}", f"run_dir={tmp_path / 'run'}"], limit=90, ranks=2)
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("data error: ")]
    assert "no usable passage in" in line and str(file) in line and "bad_json" in line
