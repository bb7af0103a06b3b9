"""Which checkpoint a run continues from, which run may, what is on disk when the disk refuses; and the model card.

What a checkpoint restores is in test_distributed.py, what is left after a fault in test_faults.py.
"""

import fcntl
import json
import os
import re
import resource
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from reference import TINY_BASE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import metrics as evidence
from checkpoint import (
    check_same_run, missing_parts, exported_model, finish_save, make_saver, model_fingerprint, newest_checkpoint,
    resume_notes, save_checkpoint,
)  # fmt: skip
from config import Config, ConfigError
from engine import checks
from grpo import make_optimizer
from methods import METHODS
from metrics import append_row, read_rows, unwritten
from model import build_policy
from prompts import predict_prompt
from report import card as card_module
from report.card import for_transformers_4, known_base, model_card, write_card
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
    one = newest_checkpoint(Path(config.run_dir), (said if said is not None else []).append)
    return one and one[1]["step"]


# ---- which checkpoint
def test_the_newest_whole_checkpoint_is_found(config):
    assert found(config) is None
    for step in (2, 4):
        fake(config, step)
    assert found(config) == 4


def test_a_link_that_was_moved_back_counts_and_says_so(config, tmp_path):
    fake(config, 2)
    fake(config, 4, latest=False)  # killed before the link moved
    said = []
    assert found(config, said) == 2 and "latest points to step_000002: step_000004 passed over" in said[0]
    (tmp_path / "run/checkpoints/latest").unlink()
    assert found(config) == 4


def test_a_copied_run_continues_from_its_newest_step_and_its_copied_latest_is_not_read(config, tmp_path):
    """cp -rL and aws s3 sync make a folder of the link; a link to nowhere counts as none."""
    fake(config, 2)
    fake(config, 4, latest=False)
    for step in (2, 4):
        hf = tmp_path / f"run/checkpoints/step_{step:06d}/hf"
        hf.mkdir()
        (hf / "config.json").write_text("{}")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)  # follows links
    said = []
    assert found(replace(config, run_dir=str(copy)), said) == 4 and "latest is a copied folder" in said[0]
    assert exported_model(copy) == copy / "checkpoints/step_000004/hf"
    for word in ("latest", "latest/hf"):
        with pytest.raises(ConfigError, match="is a copied folder, not a link"):
            exported_model(copy / "checkpoints" / word)
    link = tmp_path / "run/checkpoints/latest"
    assert exported_model(link) == link / "hf" and exported_model(tmp_path) is None
    link.unlink()
    link.symlink_to("step_000009")
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
        assert missing_parts(path) == "state/shard has 99 bytes of 100" and "state/shard has 99 bytes of 100" in said[0]


def test_only_damaged_checkpoints_are_no_reason_to_begin_again(config, tmp_path):
    fake(config, 2)
    os.truncate(tmp_path / "run/checkpoints/step_000002/state/shard", 0)
    with pytest.raises(ConfigError, match="every checkpoint in .* is damaged; resume=never starts afresh"):
        newest_checkpoint(Path(config.run_dir), [].append)


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
        if value == getattr(Config(), key) and key not in free:  # a key that the saved run did not know had its default
            earlier = {name: kept for name, kept in facts["config"].items() if name != key}
            with pytest.raises(ConfigError, match=f"^{key}="):
                check_same_run({"config": earlier}, other)
    allowed = """steps run_dir resume save_every keep_last probe_every samples_per_step rank_timeout wandb
        eval_every eval_tasks eval_limit
        tokens_per_micro_batch gradient_checkpointing offload attention liger use_cuda_graph cache_memory
        max_requests max_mismatch verify_seconds"""
    assert free == set(allowed.split())


def test_model_and_data_may_move_but_not_change(config, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    saved = replace(config, model=str(tmp_path / "one"), data="old.jsonl")
    facts = {"config": asdict(saved), "fingerprints": {"model": model_fingerprint(saved.model), "data": "abc"}}
    moved = replace(saved, model=str(tmp_path / "two"), data="new.jsonl")
    check_same_run(facts, moved, "abc")
    for key in ("", "def"):
        with pytest.raises(ConfigError, match="^data='new.jsonl'"):
            check_same_run(facts, moved, key)
    (tmp_path / "two/model.safetensors").write_bytes(b"wEights")
    with pytest.raises(ConfigError, match="^model="):
        check_same_run(facts, moved, "abc")
    with pytest.raises(ConfigError, match="^model="):  # of an older checkpoint nothing is known
        check_same_run({"config": asdict(saved)}, replace(saved, model=str(tmp_path / "two")))
    assert model_fingerprint("owner/base") == "owner/base"


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


# ---- the model card
STARTED = """time: 2026-01-01 00:00:00 +0000
command: /home/anyone/code/train.py /home/anyone/my.yaml seed=3 run_dir=RUN
git: 0123abc
git changes: none
world size: 2
device: cpu

"""


@pytest.fixture
def trained(build_sampler, folders, tmp_path):
    """(config keys) -> the sampler of a run with two rows and a start on record."""

    def build(folder=folders["smollm3"], **changes):
        run = tmp_path / "my run"
        sampler = build_sampler(folder, **{"run_dir": str(run), "steps": 10, "seed": 3, **changes})
        run.mkdir(exist_ok=True)
        (run / "environment.txt").write_text(STARTED.replace("RUN", str(run)))
        for step, accuracy in ((0, 0.25), (1, None), (2, 0.5), (4, 0.75)):
            probe = {"probe/accuracy": accuracy, "probe/perplexity": 7.0} if accuracy else {}
            append_row(run / "metrics.jsonl", {"step": step, "reward": 1.0, **probe})
        return sampler

    return build


def test_the_hub_reads_names_of_its_own_and_no_paths(trained, tmp_path):
    sampler = trained(data="wikimedia/wikipedia")
    sampler.config.model = "owner/base"
    assert ModelCard(str(model_card(sampler, 3))).data.to_dict() == {
        "base_model": "owner/base", "datasets": ["wikimedia/wikipedia"], "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pretrainzero", "reinforcement-learning", "grpo", "active", "arxiv:2512.03442"],
    }
    local = model_card(trained(data=str(tmp_path)), 3)  # a folder is nobody else's
    assert local.data.base_model is None and local.data.datasets is None
    assert "see the base model" in local.text and "see the data" in local.text


def test_an_export_holds_the_keys_of_transformers_4_and_is_the_same_to_5(trained, ranks):
    """4.57 read a default rope_theta for SmolLM3's 5,000,000 and refused the tokenizer's class."""
    sampler = trained()
    facts = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "backend": "tokenizers"}
    facts |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    four = for_transformers_4(dict(facts))
    assert four["rope_theta"] == 5e6 and "rope_scaling" not in four and "extra_special_tokens" not in four
    assert (four["tokenizer_class"], four["additional_special_tokens"]) == ("PreTrainedTokenizerFast", ["<a>"])
    facts["rope_parameters"]["rope_type"] = "yarn"
    assert for_transformers_4(facts)["rope_scaling"] == facts["rope_parameters"]
    folder = saved(sampler, ranks, 3) / "hf"
    written, before = json.loads((folder / "config.json").read_text()), sampler.replica.config
    assert written["rope_theta"] == before.rope_parameters["rope_theta"]
    again, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert again.rope_parameters == before.rope_parameters
    assert tokenizer.get_vocab() == sampler.tokenizer.get_vocab()
    assert tokenizer.special_tokens_map == sampler.tokenizer.special_tokens_map


def test_a_licence_is_what_the_base_models_card_says_and_nothing_else(trained, tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    assert known_base(str(base)) == ({}, {})
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/base\n---\n# Base")
    sampler = trained()
    sampler.config.model = str(base)
    card = ModelCard(str(model_card(sampler, 3)))
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "owner/base")  # a second stage of training
    assert f"`{base}`, made from `owner/base`; licence: apache-2.0, says its card" in card.text
    for broken in ("---\n{\n---\n", "---\n- a\n---\n", "no front matter"):
        (base / "README.md").write_text(broken)
        assert known_base(str(base)) == ({}, {})
    assert known_base("owner/base") == ({"base_model": "owner/base"}, {})
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr(card_module, "try_to_load_from_cache", lambda *words: str(base / "README.md"))
    assert known_base("owner/base")[1] == {"license": "other", "license_name": "own", "license_link": "LICENSE"}


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_of_the_card_loads_the_folder_and_asks_as_the_run_did(trained, tmp_path, monkeypatch, capsys, chat):
    prompts = {"mask_prompt": " {passage}\nMask:", "predict_prompt": " {passage}\nPredict:"}
    sampler = trained(TINY_BASE, temperature=0.7, **prompts)
    if chat:
        sampler.tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}"
    sampler.replica.generation_config.update(top_p=0.5, do_sample=True, repetition_penalty=1.5)  # a base's own habits
    folder = tmp_path / "hf"
    sampler.replica.save_pretrained(folder)
    sampler.tokenizer.save_pretrained(folder)
    write_card(folder, sampler, 3)
    example = re.search(r"```python\n(.*?)```\n", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    namespace = {}
    exec(example, namespace)
    asked = namespace["inputs"]["input_ids"][0].tolist()
    assert asked == predict_prompt(sampler, METHODS["active"].example) and capsys.readouterr().out
    how = GenerationConfig.from_pretrained(folder)
    assert how.eos_token_id == sorted(sampler.eos_ids) and how.max_new_tokens is None and how.max_length is None
    model = AutoModelForCausalLM.from_pretrained(folder)  # logits over the temperature, nothing cut off
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(torch.tensor([asked]), max_new_tokens=5, **options)
    for scores, logits in zip(output.scores, output.logits, strict=True):
        assert torch.allclose(scores, logits / 0.7) and scores.isfinite().all()


# ---- what is saved
def saved(sampler, ranks, *steps: int) -> Path:
    policy = build_policy(sampler.replica, sampler.config, ranks)
    saver = make_saver(policy, make_optimizer(policy, sampler.config), sampler)
    for saver.done in steps:
        save_checkpoint(saver)
        assert finish_save(saver)
    return newest_checkpoint(Path(sampler.config.run_dir))[0]


def test_a_checkpoint_without_its_card_is_damaged(trained, ranks):
    path = saved(trained(), ranks, 3)
    facts = json.loads((path / "checkpoint.json").read_text())
    assert {"hf/README.md", "hf/generation_config.json"} <= facts["files"].keys() and missing_parts(path) == ""
    assert len(facts["fingerprints"]["model"]) == 64
    os.truncate(path / "hf/README.md", 10)
    assert missing_parts(path).startswith("hf/README.md has 10 bytes of ")


def test_a_disk_without_links_costs_a_warning_and_no_checkpoint(trained, ranks, monkeypatch, capsys):
    def refused(*words, **keys):
        raise OSError(1, "Operation not permitted")

    sampler = trained(keep_last=2)
    saved(sampler, ranks, 1)
    folder = Path(sampler.config.run_dir) / "checkpoints"
    monkeypatch.setattr(os, "symlink", refused)
    assert saved(sampler, ranks, 2, 3).name == "step_000003"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000003"]  # and no old link
    assert capsys.readouterr().err.count("latest could not be pointed to step_00000") == 2
    monkeypatch.undo()
    shutil.copytree(folder / "step_000002", folder / "latest")  # a copied folder is in the way
    assert saved(sampler, ranks, 4).name == "step_000004" and not (folder / "latest").is_symlink()
    assert "latest could not be pointed to step_000004" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("no words"), OSError(28, "No space left on device")])
def test_a_card_that_fails_costs_a_line_and_no_checkpoint(trained, ranks, monkeypatch, capsys, error):
    def save(file):
        file.write_text("half")
        raise error

    monkeypatch.setattr(card_module, "model_card", lambda *_: SimpleNamespace(save=save))
    path = saved(trained(), ranks, 3)
    assert "WARNING: no model card in the checkpoint of step 3" in capsys.readouterr().err
    assert missing_parts(path) == "" and not list((path / "hf").glob("README*"))


def test_one_process_at_a_time_writes_to_a_run_and_other_files_beside_its_checkpoints_do_not_matter(config, tmp_path):
    fake(config, 2)
    shutil.copytree(tmp_path / "run/checkpoints/step_000002", tmp_path / "run/checkpoints/step_backup")
    assert newest_checkpoint(Path(config.run_dir), [].append)[0].name == "step_000002"
    open_or_resume(replace(config, resume="never"), 2, [].append)
    with (tmp_path / "run/environment.txt").open() as file:
        checks._held.close()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ConfigError, match="another process is writing to it"):
            open_or_resume(config, 2, [].append)
