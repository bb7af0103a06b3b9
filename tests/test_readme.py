"""What README.md and docs/ say of the code: the patches apply and do what is said; names, links, numbers are right."""

import ast
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from reference import ROOT

import grpo
import masking
import rewards
from benchmarks.sets import BENCHMARKS
from config import Config
from methods import Task
from rollout import Rollout

README = (ROOT / "README.md").read_text(encoding="utf-8")
PATCHES = {re.search(r"^\+\+\+ b/([\w/]+)\.py$", text, re.MULTILINE)[1]: text
           for text in re.findall(r"^```diff\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)}  # fmt: skip
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
RESULTS = PAGES[ROOT / "docs" / "results.md"]


# ---- patches
@pytest.fixture
def patched(tmp_path, monkeypatch):
    """(module) -> that module from a copy of the repository with the README's patch for it."""

    def build(name: str):
        (tmp_path / "benchmarks").mkdir()
        files = [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"))]
        for path in files:
            shutil.copy(ROOT / path, tmp_path / path)
        # else the folder of a repository around it would be left alone
        outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        options = {"cwd": tmp_path, "env": outside, "input": PATCHES[name], "capture_output": True, "text": True}
        if subprocess.run(["git", "apply", "--reverse", "--check", "-"], **options).returncode == 0:
            pytest.skip("this patch is applied here")
        ended = subprocess.run(["git", "apply", "-"], **options)
        assert ended.returncode == 0, ended.stderr
        changed = [str(path) for path in files if (tmp_path / path).read_bytes() != (ROOT / path).read_bytes()]
        assert changed == [f"{name}.py"]
        module_name = f"patched_{name.replace('/', '_')}"
        spec = importlib.util.spec_from_file_location(module_name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return build


def test_the_reward_takes_up_to_a_tenth_for_length(patched):
    config, task = Config(max_prediction_tokens=10), Task(None, masking.Mask("Bonn", target="Bonn"))

    def earned(prediction_reward):
        responses = [Rollout([1], [5] * length, [], "", "eos") for length in (2, 10, 2)]
        pairs = zip(responses, (1, 1, 0), strict=True)
        return [prediction_reward(task, response, correct, config) for response, correct in pairs]

    assert earned(patched("rewards").prediction_reward) == pytest.approx([0.98, 0.9, 0])
    assert earned(rewards.prediction_reward) == [1, 1, 0]


def test_the_mask_rule_wants_a_capital_letter(patched):
    passage = SimpleNamespace(text="The art of Bonn is old, says Bonn.", labels=None)

    def invalid(module):
        masks = [module.make_mask(words, passage, Config(), random.Random(0)) for words in ("Bonn", "art", "of Bonn")]
        drawn = [module.random_span(passage, Config(), random.Random(seed)).target for seed in range(20)]
        return [mask.invalid for mask in masks], all(target[0].isupper() for target in drawn)

    assert invalid(patched("masking")) == (["", "no_capital", "no_capital"], True)
    assert invalid(masking) == (["", "", ""], False)


def test_the_loss_is_cispo(patched):
    """Ratios 1, 2 and 1/2, each with advantage 1 and -1. PPO's gradient is gone where the clip acts; CISPO's is the
    clipped weight: 1, 1.28 and 0.8, times the importance weight over the sampler, which is capped at 2."""
    old, sampler = torch.full((6,), -2.0), torch.tensor([-2.0, -2.0, -2.0, -2.0, -3.0, -3.0])
    ratios, advantages = torch.tensor([1, 1, 2, 2, 0.5, 0.5]), torch.tensor([1.0, -1] * 3)
    unused = torch.zeros(6)
    batch = grpo.MicroBatch({}, unused, unused, sampler, advantages, torch.full((6,), 0.1), unused)

    def run(clipped_loss):
        logprobs = (old + ratios.log()).requires_grad_()
        loss, clipped = clipped_loss(logprobs, old, batch, Config())
        loss.backward()
        return [round(slope, 4) for slope in logprobs.grad.tolist()], clipped.tolist()

    slopes, clipped = run(patched("grpo").clipped_loss)
    assert slopes == [-0.1, 0.1, -0.128, 0.128, -0.16, 0.16] and clipped == [False, False, True, True, True, True]
    slopes, clipped = run(grpo.clipped_loss)
    assert slopes == [-0.1, 0.1, 0, 0.2, -0.1, 0] and clipped == [False, False, True, False, False, True]


def test_the_benchmark_is_asked_and_judged(patched, tmp_path):
    file = tmp_path / "platinum.jsonl"
    file.write_text('{"question": "2 + 3?", "answer": "2 and 3 are 5.\\n#### 5", "cleaning_status": "consensus"}\n')
    module = patched("benchmarks/sets")
    assert "gsm8k_platinum" not in BENCHMARKS
    items, counts, _ = module.load_items("gsm8k_platinum", str(file))
    assert counts == {"records": 1, "items": 1} and (items[0].question, items[0].gold) == ("2 + 3?", "5")
    verdicts = module.judge("gsm8k_platinum", items * 2, [r"\boxed{5}", r"\boxed{6}"])
    assert [verdict.score for verdict in verdicts] == [1, 0]


# ---- names
def functions(file: str) -> set[str]:
    """Names of a file's functions, classes and constants, those inside a class with its name in front."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            found |= {name.id for name in node.targets if isinstance(name, ast.Name)}
    return found


def test_every_file_and_function_that_is_named_is_there():
    prose = re.sub(r"^```diff\n.*?^```$", "", "\n".join(PAGES.values()), flags=re.DOTALL | re.MULTILINE)
    files = set(re.findall(r"\b\w[\w/]*\.py\b", prose))
    assert len(files) > 20 and not [file for file in sorted(files) if not (ROOT / file).is_file()]
    named = set(re.findall(r"((?:\w+/)?\w+\.py):([A-Za-z_][\w.]*\w)", prose))
    stems = {path.stem for path in ROOT.glob("*.py")}
    dotted = re.findall(r"`(\w+)\.([a-z_]+)`", prose)  # train.step; not metrics.jsonl
    dotted = [pair for pair in dotted if pair[0] in stems and pair[1] not in ("py", "json", "jsonl", "html")]
    named |= {(f"{stem}.py", name) for stem, name in dotted}
    assert len(named) > 15 and not [(file, name) for file, name in sorted(named) if name not in functions(file)]


def test_every_link_leads_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
            path, _, heading = (target[0] or target[1]).partition("#")
            if not path.startswith("https://"):
                linked = (page.parent / path).resolve()
                assert linked.is_file(), (page.name, path)
                if heading:
                    titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                    assert heading in [title.lower().replace(" ", "-") for title in titles], (page.name, heading)


# ---- numbers and size
def rows(text: str) -> list[list[str]]:
    """Cells of the first table of a text, the head first."""
    lines = [line for line in text.splitlines() if line.startswith("|") or not line]
    table = "\n".join(lines).strip().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table if "---" not in line]


def test_the_result_table_is_a_part_of_the_one_that_is_made_from_the_record():
    head, *short = rows(README.split("\n## Result\n")[1])
    whole_head, *whole = rows(RESULTS.split("<!-- methods -->")[1])
    places = [whole_head.index(name) for name in head]
    assert 1 <= len(short) <= 8
    for row in short:
        (found,) = [other for other in whole if other[0] == row[0]]
        assert row == [found[place] for place in places]


def test_the_readme_is_short_and_so_are_the_pages():
    assert len(README.splitlines()) <= 220
    assert sum(len(text.split()) for text in PAGES.values()) <= 8000
