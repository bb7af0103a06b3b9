"""One step in slow motion: the numbers worked out by hand are the code's. One passage tried out: verdicts are right."""

import io
import re
import sys
from statistics import fmean

import pytest
from reference import ROOT

from config import ConfigError, read_config
from data import Passage
from masking import Mask
from methods import Task
from model import load_tokenizer
from play import passage as play
from play.passage import choose_mask, explain, plain, wrapped

BASE = str(ROOT / "assets/tiny_base")
TINY = str(ROOT / "configs/tiny.yaml")
TOWN = "Alne is a quiet town . Maps place Alne inside Ashmark . Its bridge carries plate do_la ."


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


KEYS = ["temperature=0.8", "max_passages=200", f"model={BASE}", f"data={ROOT / 'assets/tiny_wiki.jsonl.gz'}"]


@pytest.fixture(scope="module")
def explained(ranks):
    """The pairs of numbers of explain on the tiny base."""
    lines = []
    pairs = explain(read_config([TINY, *KEYS, "passages_per_step=4"]), ranks, lines.append)
    assert "DIFFERENT" not in "\n".join(lines)
    return pairs


def test_a_code_with_another_rule_is_marked(ranks, monkeypatch):
    monkeypatch.setattr(play, "group_advantages", lambda rewards, config: [earned - 0.5 for earned in rewards])
    lines = []
    explain(read_config([TINY, *KEYS, "passages_per_step=2"]), ranks, lines.append)
    marked = [line.split()[0] for line in "\n".join(lines).split("\n") if "DIFFERENT" in line]
    assert marked and set(marked) == {"advantage"}


def test_every_number_worked_out_by_hand_is_the_codes(explained):
    numbers = {name: pair for name, pair in explained.items() if name != "changes"}
    assert {"mask reward", "advantage pred 8"} <= set(numbers)
    assert all(numbers[name][1] != 0 for name in ("weight", "log p", "loss", "slope", "loss of the step"))
    for name, (hand, code) in numbers.items():
        assert hand == pytest.approx(code, rel=1e-4, abs=1e-6), name


def test_after_the_update_right_answers_are_likelier_than_wrong_ones(explained):
    pairs = list(zip(*explained["changes"], strict=True))
    assert fmean(change for change, right in pairs if right) > 0 > fmean(change for change, right in pairs if not right)


def solved(right: int, of: int = 4) -> Task:
    """A shaped reward of 0.7 for a right answer: what is right comes from `correct`."""
    task = Task(Passage("1#0", "", "", ""), Mask("x"), rewards=[0.7] * right + [-0.1] * (of - right))
    task.correct, task.proposal_reward = [1] * right + [0] * (of - right), 1 - right / of if right else 0.0
    return task


def test_the_mask_with_the_most_even_verdicts_is_followed():
    unequal, alike = [solved(4), solved(3), solved(1)], [solved(2), solved(2)]
    # unequal rewards before even verdicts, then the harder
    assert choose_mask([alike, unequal]) == (unequal, unequal[2])
    assert choose_mask([[solved(4)], alike])[1] is alike[0]
    with pytest.raises(ConfigError, match="every mask was solved by all or by none"):
        choose_mask([[solved(4), solved(0)], [solved(0, 0)]])


def test_play_marks_verdicts_right_for_both_models(ranks):
    words = [BASE, f"config={TINY}", "predictions_per_mask=4", "seed=1", f"passage={TOWN}"]
    models, own, config = play.read_arguments(words)
    passage, lines = play.read_passage(own, config, load_tokenizer(config)), []
    answered = play.play(passage, models | {"again": BASE}, config, ranks, lines.append)
    text = "\n".join(lines)
    assert passage.text == TOWN and max(map(len, text.split("\n"))) <= 100
    assert f"{BASE} chose, 8 times over:" in text and "again chose, 8 times over:" in text
    assert len(answered) == 2 and 1 <= len(answered[0]) <= 8
    assert [task.mask.masked for task in answered[0]] == [task.mask.masked for task in answered[1]]
    seen = set()
    for number, task in enumerate(answered[0], 1):
        assert task.mask.masked.replace("[mask]", task.mask.target) == TOWN
        for response, correct in zip(task.predictions, task.correct, strict=True):
            answers = re.findall(r"\\boxed\{([^}]*)\}", response.text)  # the tiny base nests nothing
            assert correct == (bool(answers) and answers[-1].strip() == task.mask.target)
            seen.add(correct)
        block = text.split(f"MASK {number}: ")[1].split("\nMASK")[0]
        assert block.startswith(task.mask.target) and len(task.predictions) == 4
        assert f"{BASE}: {sum(task.correct)} of 4 right" in block
    assert seen == {0, 1}


def test_text_is_one_harmless_line():
    assert plain("a\n\tb \x1b[2J\x00") == "a b ?[2J?"
    assert wrapped("x" * 50, 4, 20) == "    " + "x" * 10 + " [...] " + "x" * 10


def test_a_passage_is_given_as_a_word_pasted_or_taken_from_the_corpus(monkeypatch):
    config = read_config([TINY, "max_passages=200"])
    tokenizer = load_tokenizer(config)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"\n{TOWN}\n"))
    for source in ({"passage": TOWN}, {}):
        assert play.read_passage(source, config, tokenizer).text == TOWN
    first, second = (play.read_passage({"number": number}, config, tokenizer) for number in "01")
    assert first.title and first.labels and first != second
    refused = [("number", "9999", "number=9999: must be below"), ("passage", " ", "is empty")]
    refused += [("passage", "a <eos> b", "'<eos>'")]
    refused += [("passage", r"a \mask{b}", "mark of the prompts")]
    for key, value, words in refused:
        with pytest.raises(ConfigError, match=re.escape(words)):
            play.read_passage({key: value}, config, tokenizer)


def test_a_checkpoint_brings_the_prompts_of_its_run(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    folder = run / "checkpoints" / "step_000002" / "hf"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parent / "checkpoint.json").write_text('{"files": {"hf/config.json": 2}}')
    (run / "config.yaml").write_text("mask_prompt: ' {passage} M:'\ndata: not/there.jsonl\nmethod: cpt\n")
    for given in (run, folder.parent, folder):
        models, _, config = play.read_arguments([str(given), "seed=3"])
        assert (config.mask_prompt, config.method, config.seed) == (" {passage} M:", "active", 3)
        assert config.masks_per_passage == 8 and list(models.values()) == [config.model]
    models, _, config = play.read_arguments([str(run), BASE, f"config={TINY}", "masks_per_passage=3"])
    assert list(models) == [str(run), BASE] and config.predict_prefix == " \\boxed{"
    assert config.masks_per_passage == 3
    for words in ([], ["a", "b", "c"], [str(other)], [BASE, "number=-1"], [BASE, "x=1"]):
        with pytest.raises(ConfigError):
            play.read_arguments(words)


def test_the_command_explains_or_says_in_one_line_why_not(ranks, monkeypatch, capsys):
    monkeypatch.setattr(play, "start_ranks", lambda: ranks)
    monkeypatch.setattr(play.dist, "destroy_process_group", lambda: None)
    before = sorted(ROOT.glob("runs/*"))
    monkeypatch.setattr(sys, "argv", ["play/passage.py", "explain", TINY, "passages_per_step=2", "max_passages=100"])
    play.main()
    assert "7. UPDATE" in capsys.readouterr().out and sorted(ROOT.glob("runs/*")) == before
    mistakes = [["no/such/folder"], ["nobody/no-model", "passage=x"], ["explain", TINY, "method=sft"]]
    mistakes.append(["explain", TINY, "random_masks=1"])
    for words in [*mistakes, [BASE, f"config={TINY}", "passage="]]:
        monkeypatch.setattr(sys, "argv", ["play/passage.py", *words])
        with pytest.raises(SystemExit) as ended:
            play.main()
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
