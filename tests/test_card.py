"""The model card of an exported model: as the hub reads it, as a reader follows it; and that it costs no checkpoint.

That of a run on two ranks is in test_distributed.py.
"""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from reference import TINY_BASE
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import checkpoint
import checkpoint as card
from checkpoint import (
    damage,
    find_checkpoint,
    finish_save,
    known_base,
    make_saver,
    model_card,
    save_checkpoint,
    write_card,
)
from config import dump_config
from grpo import make_optimizer
from metrics import append_row
from model import build_policy
from rollout import predict_prompt

STARTED = """time: 2026-01-01 00:00:00 +0000
command: /home/anyone/code/train.py /home/anyone/my.yaml seed=3 run_dir=RUN
python: 3.11.7 on Linux x86_64
torch: 2.13.0
transformers: 5.23.0
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


def export(sampler, folder: Path, step: int = 3) -> Path:
    """As checkpoint.py does."""
    sampler.replica.save_pretrained(folder)
    sampler.tokenizer.save_pretrained(folder)
    write_card(folder, sampler, step)
    return folder


# ---- the front matter


def test_the_hub_reads_names_of_its_own_and_no_paths(trained, tmp_path):
    sampler = trained(data="wikimedia/wikipedia")
    sampler.config.model = "owner/base"
    data = ModelCard(model_card(sampler, 3)).data
    assert data.to_dict() == {
        "base_model": "owner/base",
        "datasets": ["wikimedia/wikipedia"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pretrainzero", "reinforcement-learning", "grpo", "active", "arxiv:2512.03442"],
    }
    validate_repo_id(data.base_model)
    local = ModelCard(model_card(trained(data=str(tmp_path)), 3))  # a folder is nobody else's
    assert local.data.base_model is None and local.data.datasets is None
    assert "see the base model" in local.text and "see the data" in local.text


def test_a_licence_is_what_the_base_models_card_says_and_nothing_else(trained, tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    assert known_base(str(base)) == ({}, {})
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/base\n---\n# Base")
    sampler = trained()
    sampler.config.model = str(base)
    found = ModelCard(model_card(sampler, 3))
    assert (found.data.license, found.data.base_model) == ("apache-2.0", "owner/base")  # a second stage of training
    assert f"| `{base}`, made from `owner/base` |" in found.text
    assert "| `apache-2.0`, says its card |" in found.text
    for broken in ("---\n{\n---\n", "---\n- a\n---\n", "no front matter"):
        (base / "README.md").write_text(broken)
        assert known_base(str(base)) == ({}, {})
    # of a hub name: the card in the cache, and no other
    assert known_base("owner/base") == ({"base_model": "owner/base"}, {})
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr(card, "try_to_load_from_cache", lambda *words: str(base / "README.md"))
    assert known_base("owner/base")[1] == {"license": "other", "license_name": "own", "license_link": "LICENSE"}


# ---- the text


def test_the_first_probe_and_the_latest_up_to_this_step_are_told(trained):
    """A thread writes the card while training goes on: a row of a later step may be there."""
    text = model_card(trained(), 3)
    assert "|  | step 0 | step 2 |" in text and "| `probe/accuracy` | 0.250 | 0.500 |" in text
    assert "# my run, step 3" in text and "| 3 of 10, each of 3 passages x 2 masks x 2 predictions |" in text


def test_no_path_of_the_machine_is_told_but_the_configs_own(trained):
    sampler = trained()
    text, known = model_card(sampler, 3), dump_config(sampler.config)
    assert f"train.py my.yaml seed=3 run_dir={sampler.config.run_dir}\n# git revision 0123abc\n" in text
    paths = re.findall(r"(?<![\w.:/>])/[\w.-]+(?:/[\w. -]+)*", re.sub(r"https?://\S+|</\w+>", "", text))
    strange = [path for path in paths if path != "/v1/completions" and path.split(" ")[0] not in known]
    assert len(paths) > 3 and not strange


def test_texts_of_a_config_stay_inside_their_blocks(trained):
    prompt = "```\n---\n| {passage} |\n```` 'a' \\boxed"
    sampler = trained(predict_prompt=prompt, question_prompt=prompt)
    text = model_card(sampler, 3)
    found = ModelCard(text)
    assert found.data.pipeline_tag == "text-generation" and found.text.startswith("\n# my run")
    assert dump_config(sampler.config).rstrip() in text and "`````yaml\n" in text
    example = re.search(r"`````python\n(.*?)`````\n", text, re.DOTALL)[1]
    namespace = {}
    exec(re.search(r"^prompt = \(.*?^\)", example, re.DOTALL | re.MULTILINE)[0], namespace)
    assert namespace["prompt"] == prompt


@pytest.mark.parametrize("method", card.METHODS)
def test_every_method_has_a_card_that_names_it(trained, method):
    found = ModelCard(model_card(trained(method=method), 3))
    assert method.replace("_", "-") in found.data.tags and f"| `{method}` |" in found.text


def test_a_run_without_rows_or_record_has_a_card(build_sampler, folders, tmp_path):
    text = model_card(build_sampler(folders["smollm3"], run_dir=str(tmp_path)), 0)
    assert "The run directory has none." in text and "were not recorded" in text


# ---- what it is for


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_of_the_card_loads_the_folder_and_asks_as_the_run_did(trained, tmp_path, monkeypatch, capsys, chat):
    sampler = trained(TINY_BASE, mask_prompt=" {passage}\nMask:", predict_prompt=" {passage}\nPredict:")
    if chat:
        sampler.tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}"
    folder = export(sampler, tmp_path / "hf")
    example = re.search(r"```python\n(.*?)```\n", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    namespace = {}
    exec(example, namespace)
    asked = namespace["inputs"]["input_ids"][0].tolist()
    passage = sampler.tokenizer.decode(asked, skip_special_tokens=True)
    assert asked == predict_prompt(sampler, card.MASKED_EXAMPLE) and "Predict:" in passage
    assert capsys.readouterr().out


def test_generate_samples_from_what_the_run_sampled_from(trained, tmp_path):
    """Logits over the temperature, nothing cut off, and every end that rollouts know."""
    sampler = trained(temperature=0.7)
    sampler.replica.generation_config.update(top_p=0.5, do_sample=True, repetition_penalty=1.5)  # a base's own habits
    sampler.eos_ids = {sampler.tokenizer.eos_token_id, *range(65, 91)}
    folder = export(sampler, tmp_path / "hf")
    how = GenerationConfig.from_pretrained(folder)
    assert how.eos_token_id == sorted(sampler.eos_ids) and how.pad_token_id == min(sampler.eos_ids)
    assert how.max_new_tokens is None and how.max_length is None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    inputs = tokenizer(["ab"] * 8, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=30, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    for scores, logits in zip(output.scores, output.logits, strict=True):
        assert torch.allclose(scores, logits / 0.7) and scores.isfinite().all()
    ended = 0
    for row in output.sequences[:, 2:].tolist():
        ends = [place for place, token in enumerate(row) if token in sampler.eos_ids]
        ended += bool(ends)
        assert not ends or set(row[ends[0] + 1 :]) <= {how.pad_token_id}
    assert ended >= 4 and len({tuple(row) for row in output.sequences.tolist()}) == 8


# ---- a checkpoint


def saved(sampler, ranks) -> Path:
    policy = build_policy(sampler.replica, sampler.config, ranks)
    saver = make_saver(policy, make_optimizer(policy, sampler.config), sampler)
    saver.done = 3
    save_checkpoint(saver)
    assert finish_save(saver)
    return find_checkpoint(sampler.config)[0]


def test_a_checkpoint_without_its_card_is_damaged(trained, ranks):
    path = saved(trained(), ranks)
    files = json.loads((path / "checkpoint.json").read_text())["files"]
    assert {"hf/README.md", "hf/generation_config.json"} <= files.keys()
    assert damage(path) == ""
    os.truncate(path / "hf/README.md", 10)
    assert damage(path).startswith("hf/README.md has 10 bytes of ")


@pytest.mark.parametrize("error", [ValueError("no words"), OSError(28, "No space left on device")])
def test_a_card_that_fails_costs_a_line_and_no_checkpoint(trained, ranks, monkeypatch, capsys, error):
    def fail(folder, sampler, step):
        (folder / "README.md.part").write_text("half")
        raise error

    monkeypatch.setattr(checkpoint, "write_card", fail)
    sampler = trained()
    path = saved(sampler, ranks)
    assert "WARNING: no model card in the checkpoint of step 3" in capsys.readouterr().err
    assert damage(path) == "" and not list((path / "hf").glob("README*"))
    assert asdict(sampler.config) == json.loads((path / "checkpoint.json").read_text())["config"]
    AutoModelForCausalLM.from_pretrained(path / "hf")
