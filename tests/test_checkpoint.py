"""Which checkpoint a run continues from, which run may, and what is on disk when the disk refuses. No model is loaded.

What a checkpoint restores is in test_distributed.py, what is left after a fault in test_faults.py.
"""

import json
import os
import resource
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

import metrics as evidence
from checkpoint import check_same_run, damage, find_checkpoint, resume_notes
from config import Config, ConfigError
from metrics import append_row, read_rows, unwritten
from train import open_or_resume


def fake(config: Config, step: int, latest: bool = True, row=None) -> None:
    """A folder like a checkpoint: two files and the manifest."""
    folder = Path(config.run_dir) / "checkpoints"
    path = folder / f"step_{step:06d}"
    (path / "state").mkdir(parents=True)
    (path / "state/shard").write_bytes(b"x" * 100)
    (path / "state/.metadata").write_bytes(b"y" * 10)
    facts = {"step": step, "seed": config.seed, "world_size": 2, "config": asdict(config), "optimizer": True}
    facts |= {"row": row, "files": {"state/shard": 100, "state/.metadata": 10}}
    (path / "checkpoint.json").write_text(json.dumps(facts))
    if latest:
        (folder / "latest").unlink(missing_ok=True)
        (folder / "latest").symlink_to(path.name)


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(run_dir=str(tmp_path / "run"), steps=10)


def found(config: Config, said: list | None = None) -> int | None:
    one = find_checkpoint(config, (said if said is not None else []).append)
    return one and one[1]["step"]


# ---- which checkpoint


def test_the_newest_whole_checkpoint_is_found(config):
    assert found(config) is None
    for step in (2, 4):
        fake(config, step)
    assert found(config) == 4
    assert find_checkpoint(Config(run_dir=config.run_dir, resume="never")) is None


def test_where_latest_was_moved_back_to_counts_and_so_does_a_step_that_it_has_not_reached(config, tmp_path):
    fake(config, 2)
    fake(config, 4, latest=False)  # killed before the link moved
    assert found(config) == 2
    (tmp_path / "run/checkpoints/latest").unlink()
    assert found(config) == 4


@pytest.mark.parametrize("harm", ["cut", "gone", "metadata", "manifest", "no manifest", "folder"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(config, tmp_path, harm):
    for step in (2, 4):
        fake(config, step)
    path, said = tmp_path / "run/checkpoints/step_000004", []
    shard, manifest = path / "state/shard", path / "checkpoint.json"
    if harm == "cut":
        os.truncate(shard, 99)
    elif harm == "gone":
        shard.unlink()
    elif harm == "metadata":
        (path / "state/.metadata").unlink()
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif harm == "no manifest":
        manifest.unlink()
    else:
        path.rename(path.with_name("elsewhere"))
    assert found(config, said) == 2
    assert (["step_000004 is damaged" in line for line in said] == [True]) if harm != "folder" else not said
    if harm == "cut":
        assert damage(path) == "state/shard has 99 bytes of 100" and "state/shard has 99 bytes of 100" in said[0]


def test_only_damaged_checkpoints_are_no_reason_to_begin_again(config, tmp_path):
    fake(config, 2)
    os.truncate(tmp_path / "run/checkpoints/step_000002/state/shard", 0)
    with pytest.raises(ConfigError, match="every checkpoint in .* is damaged; resume=never starts afresh"):
        find_checkpoint(config, [].append)


# ---- which run


def test_another_config_is_refused_in_one_line_before_any_file_is_touched(config, tmp_path):
    fake(config, 2)
    (tmp_path / "run/config.yaml").write_text("seed: 0\n")
    other = Config(**{**asdict(config), "seed": 1, "learning_rate": 0.5})
    with pytest.raises(ConfigError) as caught:
        open_or_resume(other, 2, print)
    assert str(caught.value).startswith("seed=1 (saved: 0), learning_rate=0.5 (saved: 5e-07): the run in ")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 0\n"
    assert not (tmp_path / "run/environment.txt").exists()


def test_every_key_is_compared_but_those_that_change_no_result(config):
    """Of each key the value is changed to another; what is not refused is listed here by hand."""
    facts = {"config": asdict(config)}
    free = set()
    for key, value in asdict(config).items():
        other = Config(**{**asdict(config), key: not value if isinstance(value, bool) else value * 2 + type(value)(1)})
        try:
            check_same_run(facts, other)
            free.add(key)
        except ConfigError as error:
            assert str(error).startswith(f"{key}=")
    allowed = """steps run_dir resume save_every keep_last probe_every samples_per_step rank_timeout
        tokens_per_micro_batch gradient_checkpointing offload attention liger use_cuda_graph cache_memory
        max_requests"""
    assert free == set(allowed.split())


def test_what_an_unbroken_run_would_have_had_otherwise_is_said(config):
    facts = {"config": asdict(config), "world_size": 2}
    assert resume_notes(facts, config, 2) == []
    (line,) = resume_notes(facts, config, 3)
    assert line.startswith("saved by 2 ranks, resumed by 3: the same weights, optimizer and passages, other samples")
    longer = Config(**{**asdict(config), "steps": 20})
    (line,) = resume_notes(facts, longer, 2)
    assert line.startswith("steps=20 (was 10): from here on the cosine ends at the new last step")
    constant = {"config": facts["config"] | {"lr_schedule": "constant"}, "world_size": 2}
    assert resume_notes(constant, Config(**{**constant["config"], "steps": 20}), 2) == []
    (line,) = resume_notes(facts, Config(**{**asdict(config), "tokens_per_micro_batch": 9000}), 2)
    assert line.startswith("tokens_per_micro_batch=9000 (was 32768): the same run up to rounding")


def test_a_finished_run_is_not_opened_unless_its_last_row_is_missing(config, tmp_path):
    fake(config, 10)
    assert open_or_resume(config, 2, print)[1]["step"] == 10
    assert not (tmp_path / "run/config.yaml").exists()
    fake(config, 8, row={"step": 8})
    open_or_resume(Config(**{**asdict(config), "steps": 8}), 2, [].append)
    assert (tmp_path / "run/config.yaml").exists()


# ---- rows that cannot be written


@contextmanager
def full_disk(size: int):
    """No file of this process may grow beyond `size` bytes: what fits is written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_do_not_fit_are_kept_and_come_first_later(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    append_row(file, {"step": 0})
    before = file.read_bytes()
    with full_disk(len(before) + 15):  # one row and a half
        append_row(file, {"step": 1}, {"step": 2})
        assert file.read_bytes() == before  # no half line, and no row without the next
        assert str(file) in capsys.readouterr().err
        append_row(file, {"step": 3})
        assert unwritten() == [file] and file.read_bytes() == before
    append_row(file, {"step": 4})
    assert [row["step"] for row in read_rows(file)] == [0, 1, 2, 3, 4]
    assert unwritten() == [] and not evidence._waiting


def test_a_file_that_could_not_even_be_made_gets_its_rows_at_the_last_try(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    (tmp_path / "run").write_text("in the way")
    append_row(file, {"step": 0})
    assert unwritten() == [file]
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    assert unwritten() == [] and read_rows(file) == [{"step": 0}]
