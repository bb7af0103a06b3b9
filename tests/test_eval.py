"""Evaluations: a scripted model on all ten benchmarks, scores by hand, chunks, kills and refusals, the comparison."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from reference import ROOT, TINY_BASE
from worker import ASKED

from benchmarks import exams
from benchmarks import evaluate as command_module
from benchmarks.evaluate import chunk_files, chunk_items, claim, conclude, evaluate, open_folder, read_settings
from benchmarks.scores import MATH, PAPER, SIZES, compare_evaluations, paper_means, summarise
from benchmarks.sets import BENCHMARKS, Item
from config import Config, ConfigError
from benchmarks.exams import Exam, load_exams, parse_tasks
from rollout import Rollout

RECORDS = {
    "mmlu_pro": [
        {"question_id": 70, "question": "Which is a gas?", "options": ["iron", "neon", "salt"], "answer": "B"},
        {"question_id": 71, "question": "Which is a metal?", "options": ["iron", "neon"], "answer": "A"},
    ],
    "supergpqa": [
        {"uuid": "f0", "question": "Melts ice?", "options": ["sand", "salt"], "answer": "salt", "answer_letter": "B"},
        {"uuid": "f1", "question": "What burns?", "options": ["wood", "lead"], "answer": "wood", "answer_letter": "A"},
    ],
    "bbeh": [{"input": "Is the last letter of owl an l?", "target": "yes"},
             {"input": "Sort: c, a, b", "target": "a, b, c"}],
    "math500": [{"problem": "Halve $1$.", "solution": r"$\boxed{\frac{1}{2}}$", "answer": r"\frac{1}{2}"}],
    "gsm8k": [
        {"question": "Ann has 2 hens and buys 3.", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        {"question": "Bob had 1,200 nuts and ate none.", "answer": "#### 1,200"},
    ],
    "olympiad": [{"id": 1606, "question": "Find all $x$ with $x^2=4$.", "final_answer": ["2, -2"]}],
    "minerva": [{"problem": "Arc seconds in a degree?", "solution": r"$60 \cdot 60 = \boxed{3600}$", "idx": 3}],
    "amc23": [{"id": 0, "problem": "How far is 9 times 3?", "answer": 27.0}],
    "aime24": [{"id": 60, "problem": "What is 200 + 4?", "solution": "So 204.", "answer": "204"}],
    "aime25": [{"id": "0", "problem": "What is 60 + 10?", "answer": "70"}],
}
"""Each benchmark in the layout of its source."""
WORDS = ["dtype=float32", "chunk=8", "max_new_tokens=6"]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """A small file per benchmark."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, records in RECORDS.items():
        if name == "bbeh":
            (folder / "bbeh.json").write_text(json.dumps({"examples": records}))
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def scripted(monkeypatch):
    """(answers: question -> what is boxed) replaces sampling; returns the calls made."""

    def install(answers: dict[str, str]) -> list:
        def generate(sampler, prompts, count, max_tokens, opening, seed, greedy, label):
            calls.append(SimpleNamespace(prompts=prompts, count=count, seed=seed, greedy=greedy, tokens=max_tokens))
            groups = []
            for prompt in prompts:
                text = sampler.tokenizer.decode(prompt)
                (boxed,) = [answer for question, answer in answers.items() if question in text]
                groups.append([Rollout(prompt, [1, 2, 3], [0.0] * 3, rf"Thus \boxed{{{boxed}}}.", "eos")] * count)
            return groups

        calls = []
        monkeypatch.setattr(exams, "generate", generate)
        return calls

    return install


def read_exams(files: dict[str, Path]) -> list[Exam]:
    return load_exams({name: str(path) for name, path in files.items()}, 0, 0, Config(), print)


def wrong(item: Item) -> str:
    """The next letter, the next number, another text."""
    if item.letters:
        return item.letters[(item.letters.index(item.gold) + 1) % len(item.letters)]
    return str(int(item.gold) + 1) if item.gold.isdigit() else "17"


def settings_for(checkpoint: Path, out: Path, *words: str, files: dict[str, Path] | None = None):
    tasks = [] if files is None else ["tasks=" + ",".join(f"{name}={path}" for name, path in files.items())]
    return read_settings([str(checkpoint), *WORDS, *tasks, *words, f"out={out}"])


def records_of(out: Path) -> dict[str, str]:
    """Every file of records below a folder, by its name there."""
    return {str(path.relative_to(out)): path.read_text() for path in sorted(out.rglob("chunk_*.jsonl"))}


# ------------------------------------------------------------------------------------------------------- the whole path
@pytest.mark.parametrize("right", [True, False])
def test_who_is_always_right_scores_100_on_all_ten_sets_and_who_never_is_0(
    right, files, scripted, folders, ranks, tmp_path
):
    items = [item for exam in read_exams(files) for item in exam.items]
    scripted({item.question: item.gold if right else wrong(item) for item in items})
    evaluate(settings_for(folders["smollm3"], tmp_path / "out", files=files), ranks)
    told = json.loads((tmp_path / "out/eval.json").read_text())
    assert list(told["tasks"]) == [name for name in BENCHMARKS if name in RECORDS]
    for name, one in told["tasks"].items():
        assert one["score"] == (100 if right else 0), name
        items = len(RECORDS[name])
        assert (one["items"], one["responses"]) == (items, items * BENCHMARKS[name].samples)
        assert (one["parse_rate"], one["truncation_rate"], one["length_mean"]) == (1, 0, 3)
        assert one["standard_error"] == (0 if items > 1 else None) and one["seconds"] > 0
    assert told["means"] == {}  # 40 items are AMC's, not one


def test_a_record_holds_all_that_its_verdict_rests_on(files, scripted, folders, ranks, tmp_path):
    scripted({item.question: item.gold for exam in read_exams(files) for item in exam.items})
    evaluate(settings_for(folders["smollm3"], tmp_path, files={"mmlu_pro": files["mmlu_pro"]}), ranks)
    lines = (tmp_path / "mmlu_pro/chunk_00000.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0]) == {
        "task": "mmlu_pro", "id": "70", "sample": 0, "gold": "B", "response": r"Thus \boxed{B}.", "answer": "B",
        "question": "Which is a gas?\nOptions are:\nA. iron\nB. neon\nC. salt",
        "how": "box", "score": 1.0, "finish": "eos", "tokens": 3,
    }  # fmt: skip


def test_one_response_is_greedy_and_more_are_sampled(files, scripted, folders, ranks, tmp_path):
    calls = scripted({item.question: item.gold for exam in read_exams(files) for item in exam.items})
    two = {name: files[name] for name in ("gsm8k", "aime24")}
    evaluate(settings_for(folders["smollm3"], tmp_path / "table", files=two), ranks)
    assert [(one.count, one.greedy, one.tokens) for one in calls] == [(1, True, 6), (32, False, 6)]
    calls.clear()
    evaluate(settings_for(folders["smollm3"], tmp_path / "four", "samples=4", "chunk=4", files=two), ranks)
    assert [(one.count, one.greedy) for one in calls] == [(4, False)] * 3
    assert len({one.seed for one in calls}) == 3  # each chunk of each benchmark has noise of its own


def test_the_evaluation_says_what_it_was_made_with(files, scripted, folders, ranks, tmp_path, capsys):
    scripted({item.question: item.gold for exam in read_exams(files) for item in exam.items})
    settings = settings_for(folders["smollm3"], tmp_path, "seed=3", files={"gsm8k": files["gsm8k"]})
    evaluate(settings, ranks)
    told = json.loads((tmp_path / "eval.json").read_text())
    assert told["checkpoint"] == str(folders["smollm3"].resolve())
    wanted = {"seed": 3, "chunk": 8, "max_new_tokens": 6, "dtype": "float32", "guess": False, "limit": 0}
    assert wanted.items() <= told["settings"].items() and len(told["settings"]["weights"]) == 16
    assert told["tasks"]["gsm8k"]["data"] == load_exams(settings.tasks, 0, 0, Config(), print)[0].data
    assert any(line.startswith("transformers: 5") for line in told["environment"])
    assert any(line.startswith("math-verify: ") for line in told["environment"])
    printed = capsys.readouterr().out
    assert "gsm8k 2 x 1" in printed and "MATH mean    none: no math500" in printed


# ---------------------------------------------------------------------------------------------- numbers, worked by hand
def record(item: str, score: float, how: str = "box", finish: str = "eos", tokens: int = 10) -> dict:
    return {"id": item, "score": score, "how": how, "finish": finish, "tokens": tokens}


def test_scores_are_means_over_items_and_the_error_counts_items():
    """a: 1 of 2 right, b: 2 of 2. Mean 75; deviation of 50 and 100 is sqrt(1250), over sqrt(2) is 25."""
    rows = [record("a", 1.0), record("a", 0.0, "none", "length", 40), record("b", 1.0), record("b", 1.0, "last_number")]
    assert summarise(iter(rows)) == {
        "score": 75.0, "standard_error": pytest.approx(25.0), "items": 2, "responses": 4,
        "parse_rate": 0.5, "truncation_rate": 0.25, "length_mean": 17.5,
    }  # fmt: skip
    # one response each: sqrt(p (1 - p) / (n - 1)) with p = 1/4, n = 4
    assert summarise([record(name, name == "a") for name in "abcd"])["standard_error"] == pytest.approx(25.0)
    assert summarise([record("a", 1.0)])["standard_error"] is None


def whole(**scores: float) -> dict[str, dict]:
    return {name: {"score": score, "items": SIZES.get(name, 30)} for name, score in scores.items()}


def test_a_mean_with_the_papers_name_needs_all_of_its_parts_whole():
    six = whole(**dict(zip(MATH, (10.0, 20.0, 30.0, 40.0, 50.0, 60.0), strict=True)))
    assert paper_means(six) == {"math": pytest.approx(35.0)}
    assert paper_means(six | whole(aime25=99.0)) == {"math": pytest.approx(35.0)}  # not one of the six
    all_four = six | whole(supergpqa=1.0, bbeh=2.0, mmlu_pro=4.0)
    assert paper_means(all_four) == {"math": pytest.approx(35.0), "overall": pytest.approx(10.5)}
    assert set(paper_means(all_four | {"bbeh": {"score": 2.0, "items": 460}})) == {"math"}  # BBEH mini
    assert paper_means(all_four | {"gsm8k": {"score": 40.0, "items": 1318}}) == {}
    for name in MATH:
        assert paper_means({key: one for key, one in all_four.items() if key != name}) == {}


# ----------------------------------------------------------------------------------------------------- chunks and kills
def test_chunks_cover_every_item_once_in_order():
    exam = Exam("gsm8k", [Item(str(n), "", "") for n in range(10)], samples=4, prompt="", data="", counts={})
    for size, expected in {8: [2] * 5, 12: [3, 3, 3, 1], 3: [1] * 10, 100: [10]}.items():
        files = chunk_files(exam, SimpleNamespace(out="out", chunk=size))
        chunks = [chunk_items(exam, number, size) for number in range(len(files))]
        assert [len(items) for items in chunks] == expected and sum(chunks, []) == exam.items
        assert chunk_items(exam, len(files), size) == []
        assert files[-1] == Path(f"out/gsm8k/chunk_{len(files) - 1:05d}.jsonl")


def test_of_two_ranks_one_gets_a_chunk_and_a_killed_ranks_claim_is_void(files, folders, tmp_path):
    settings = settings_for(folders["smollm3"], tmp_path, files={"gsm8k": files["gsm8k"]})
    exams = load_exams(settings.tasks, 0, 0, settings.engine, print)
    (path,) = chunk_files(exams[0], settings)
    assert open_folder(settings, exams) == {("gsm8k", 0)}
    assert claim(path) and not claim(path) and not path.exists()
    assert open_folder(settings, exams) == {("gsm8k", 0)} and claim(path)


@pytest.fixture(scope="module")
def unbroken(ranks, tmp_path_factory):
    """A sampled evaluation of the tiny base, never interrupted: (words, files of records)."""
    out = tmp_path_factory.mktemp("unbroken")
    words = [str(TINY_BASE), *ASKED, "samples=4", f"gsm8k.path={ROOT / 'assets/tiny_questions.jsonl'}"]
    evaluate(read_settings([*words, f"out={out}"]), ranks)
    return words, records_of(out)


KILL = """
import os, signal, sys
from benchmarks import evaluate

def write_whole(path, text, original=evaluate.write_whole):
    if path.name == "chunk_00002.jsonl":
        path.with_name(path.name + ".part").write_text(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, text)

evaluate.write_whole = write_whole
sys.argv[0] = "eval.py"
evaluate.main()
"""


def test_a_killed_evaluation_goes_on_and_ends_as_if_it_had_not_been(unbroken, ranks, tmp_path, capsys):
    """By SIGKILL, while its third chunk of five is written."""
    words, expected = unbroken
    words = [*words, f"out={tmp_path}"]
    ended = subprocess.run([sys.executable, "-c", KILL, *words], cwd=ROOT, capture_output=True, timeout=90, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = records_of(tmp_path)
    assert left == {name: expected[name] for name in list(expected)[:2]} and not (tmp_path / "eval.json").exists()
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in left}
    evaluate(read_settings(words), ranks)
    assert "3 chunks to make, 2 are there" in capsys.readouterr().out
    assert records_of(tmp_path) == expected and len(expected) == 5 and not list(tmp_path.rglob("*.claimed"))
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in left}  # not made again


@pytest.mark.parametrize("text", ["", '{"id": "other"}\n'])
def test_a_chunk_that_is_not_what_it_must_be_is_named(text, files, scripted, folders, ranks, tmp_path):
    scripted({item.question: item.gold for exam in read_exams(files) for item in exam.items})
    settings = settings_for(folders["smollm3"], tmp_path, files={"gsm8k": files["gsm8k"]})
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/chunk_00000.jsonl").write_text(text)
    (tmp_path / "gsm8k/seconds.jsonl").write_text("")
    with pytest.raises(RuntimeError, match="chunk_00000.jsonl: [01] records, not the 2 of its items; delete it"):
        evaluate(settings, ranks)


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.slow
def test_a_model_of_the_hub_is_known_by_its_commit(command, files, tmp_path, monkeypatch):
    """Out of the hub's cache, without a network."""
    commit, cached = "0123456789abcdef0123456789abcdef01234567", tmp_path / "home/hub/models--owner--tiny"
    shutil.copytree(TINY_BASE, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [f"tasks=gsm8k={files['gsm8k']}", f"out={tmp_path / 'out'}", *WORDS]
    ended = command(["eval.py", "owner/tiny", *words], limit=90)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "out/eval-settings.json").read_text())["weights"] == commit
    ended = command(["eval.py", "owner/none", *words], limit=90)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and "checkpoint 'owner/none'" in ended.stderr


def test_more_tokens_than_the_model_has_positions_are_refused(files, folders, ranks, tmp_path):
    settings = settings_for(folders["smollm3"], tmp_path, "max_new_tokens=100000", files={"gsm8k": files["gsm8k"]})
    with pytest.raises(ConfigError, match="max_new_tokens=100000: the model has [0-9]+ positions"):
        evaluate(settings, ranks)


@pytest.mark.parametrize("word, before", [
    ("max_new_tokens=7", "6"), ("samples=2", "0"), ("chunk=9", "8"), ("limit=1", "0"), ("seed=1", "0"),
    ("max_requests=4", "0"), ("last_number=true", "False"), ("guess=true", "False"),
    ("stop_at_answer=false", "True"), ("dtype=bfloat16", "'float32'"), ("temperature=0.7", "1.0"),
    ("chat_template=none", "'auto'"), ("attention=varlen", "'auto'"), ("question_prompt='Q {passage}'", "''"),
])  # fmt: skip
def test_other_settings_in_the_same_folder_are_refused_by_name(word, before, files, folders, tmp_path):
    def opened(*words):
        settings = settings_for(folders["smollm3"], tmp_path, *words, files={"gsm8k": files["gsm8k"]})
        exams = load_exams(settings.tasks, settings.limit, settings.samples, settings.engine, print)
        return open_folder(settings, exams)

    assert opened() == {("gsm8k", 0)} == opened("cache_memory=0.5") == opened("use_cuda_graph=false")
    refused, key = opened(word), word.split("=")[0]
    assert refused.startswith(f"{key}=") and f"was made with {before}; choose another out=" in refused
    assert opened() == {("gsm8k", 0)}  # what was refused left no trace


def test_other_weights_and_other_data_are_refused(files, folders, tmp_path):
    """A few bytes in the middle of the weights; one more item."""
    model = tmp_path / "model"
    shutil.copytree(folders["smollm3"], model)

    def opened():
        settings = settings_for(model, tmp_path / "out", files={"gsm8k": files["gsm8k"]})
        return open_folder(settings, load_exams(settings.tasks, 0, 0, settings.engine, print))

    assert isinstance(opened(), set)
    kept = (model / "model.safetensors").read_bytes()
    middle = len(kept) // 2
    (model / "model.safetensors").write_bytes(kept[:middle] + bytes([kept[middle] ^ 1]) + kept[middle + 1 :])
    assert opened().startswith("weights='")
    (model / "model.safetensors").write_bytes(kept)
    assert isinstance(opened(), set)
    with files["gsm8k"].open("a") as end:
        end.write(json.dumps(RECORDS["gsm8k"][0] | {"question": "Ann again?"}) + "\n")
    assert opened().startswith("gsm8k.data='")


def test_benchmarks_may_join_a_folder_later(files, scripted, folders, ranks, tmp_path):
    calls = scripted({item.question: item.gold for exam in read_exams(files) for item in exam.items})
    for name in ("gsm8k", "bbeh", "gsm8k"):
        evaluate(settings_for(folders["smollm3"], tmp_path, files={name: files[name]}), ranks)
    assert len(calls) == 2  # gsm8k was there
    assert list(json.loads((tmp_path / "eval.json").read_text())["tasks"]) == ["bbeh", "gsm8k"]
    assert set(json.loads((tmp_path / "eval-settings.json").read_text())["tasks"]) == {"bbeh", "gsm8k"}


@pytest.mark.parametrize("words, said", [
    (["limit=-1"], "limit=-1: must be 0 or more"), (["max_new_tokens=0"], "max_new_tokens=0: must be 1 or more"),
    (["limit=few"], "limit='few': expected a whole number"),
    (["lmit=3"], "lmit=3: unknown key; perhaps limit"),
    (["steps=3"], "steps=3: unknown key"), (["temperature=0"], "temperature=0.0: must be a number above 0"),
    (["question_prompt=Solve!"], "question_prompt='Solve!': must contain {passage} once"),
    (["tasks=gsm9k"], "tasks='gsm9k': 'gsm9k': unknown benchmark; known are mmlu_pro, "),
    (["tasks=gsm8k,gsm8k"], "'gsm8k': named twice"), (["tasks="], "tasks='': name one or more of mmlu_pro, "),
    (["tasks=gsm8k=no_such.jsonl"], "tasks: gsm8k=no_such.jsonl: no such file or folder"),
    (["gsm8k.path=no_such.jsonl"], "tasks: gsm8k=no_such.jsonl: no such file or folder"),
    (["tasks=bbeh", "gsm8k.path=x"], "gsm8k.path='x': gsm8k is not among tasks=bbeh"),
    (["tasks=gsm8k=a", "gsm8k.path=b"], "gsm8k.path='b': gsm8k has a file already"),
    (["gsm8k"], "'gsm8k': expected key=value after the checkpoint"),
])  # fmt: skip
def test_a_bad_word_is_one_line_and_status_2_before_any_model_loads(words, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.py", str(TINY_BASE), *words])
    monkeypatch.setattr(command_module, "start_ranks", None)
    with pytest.raises(SystemExit) as caught:
        command_module.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("config error: ") and said in printed.err
    monkeypatch.setenv("RANK", "1")  # said once
    with pytest.raises(SystemExit):
        command_module.main()
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------- the checkpoint
def test_a_checkpoint_is_a_folder_a_step_of_a_run_or_a_hub_name(folders, tmp_path):
    step = tmp_path / "runs/tiny/checkpoints/step_000100"
    shutil.copytree(folders["smollm3"], step / "hf")
    (step.parent / "latest").symlink_to(step.name)
    for word in (step, step / "hf", step.parent / "latest", step.parent / "latest/hf"):
        settings = read_settings([str(word)])
        assert (settings.checkpoint, settings.out) == (str(step / "hf"), "evals/tiny-step_000100")
    assert settings.engine == Config(model=str(step / "hf"))  # the defaults of training
    assert list(settings.tasks) == list(BENCHMARKS) and settings.max_new_tokens == 8192
    assert read_settings([str(folders["smollm3"])]).out == "evals/smollm3"
    hub = read_settings(["owner/Base-3B"])
    assert (hub.checkpoint, hub.out) == ("owner/Base-3B", "evals/owner--Base-3B")


@pytest.mark.parametrize("content", [None, [], ["config.json"], ["model.safetensors"]])
def test_what_is_no_checkpoint_is_one_line(content, tmp_path):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name in content:
            (folder / name).write_text("{}")
    said = "no such folder" if content is None else "neither it nor its hf/ holds config.json and weights"
    with pytest.raises(ConfigError, match=f"^checkpoint '{folder}': {said}[^\n]*$"):
        read_settings([str(folder)])


def test_a_hub_name_that_cannot_be_read_and_a_folder_without_tokenizer_are_one_line(files, folders, ranks, tmp_path):
    tasks = {"gsm8k": files["gsm8k"]}
    hub = replace(settings_for(TINY_BASE, tmp_path / "a", files=tasks), checkpoint="no-such-owner/no-such-model")
    with pytest.raises(ConfigError, match="^checkpoint 'no-such-owner/no-such-model': cannot be read [^\n]*$"):
        evaluate(hub, ranks)
    bare = tmp_path / "bare"
    shutil.copytree(folders["smollm3"], bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match="^model='.*/bare': no usable tokenizer [^\n]*$"):
        evaluate(settings_for(bare, tmp_path / "b", files=tasks), ranks)


# ------------------------------------------------------------------------------------------------------- the comparison
@pytest.fixture
def outs(tmp_path):
    """Two evaluations' eval.json: gsm8k in both, of another length; in the second bbeh, and MMLU-Pro in part."""
    others = {"bbeh": 3.0, "mmlu_pro": 9.0}
    for name, score, tokens, more in (("first", 12.5, 8192, {}), ("second", 37.25, 512, others)):
        tasks = {
            task: {"score": value, "standard_error": 1.25, "items": 4520, "data": "d", "samples": 1, "prompt": "p"}
            for task, value in ({"gsm8k": score} | more).items()
        }
        settings = {"max_new_tokens": tokens, "seed": 0, "checkpoint": name, "weights": name}
        (tmp_path / name).mkdir()
        text = json.dumps({"checkpoint": name, "tasks": tasks, "means": {"math": score}, "settings": settings})
        (tmp_path / name / "eval.json").write_text(text)
    return [str(tmp_path / "first"), str(tmp_path / "second")]


def test_evaluations_stand_side_by_side_above_the_papers_rows(outs):
    head, gsm8k, bbeh, mmlu_pro, _, differs, _, columns, first, second, *paper = compare_evaluations(outs).splitlines()
    assert head.split()[-2:] == outs
    assert gsm8k.split() == ["gsm8k", "12.50", "+-", "1.25", "37.25", "+-", "1.25"]
    assert bbeh.split() == ["bbeh", "-", "3.00", "+-", "1.25"] and mmlu_pro.split()[:3] == ["mmlu_pro", "-", "9.00"]
    assert differs == "not the same: max_new_tokens (8192, 512)"
    assert columns.split() == ["overall", "math", "supergpqa", "bbeh", "mmlu_pro"]
    assert first.split()[1:] == ["-", "12.50", "-", "-", "-"] and second.split()[1:] == ["-", "37.25", "-", "3.00", "-"]
    assert len(paper) == len(PAPER) and all(line.startswith("paper: ") for line in paper)
    assert paper[0].split()[-5:] == ["16.23", "32.31", "12.62", "3.32", "16.66"]
    assert len({len(line) for line in (columns, first, second, *paper)}) == 1  # columns line up


def test_the_comparison_is_a_command(outs, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["eval.py", "compare", *outs])
    command_module.main()
    assert capsys.readouterr().out == compare_evaluations(outs) + "\n"
    monkeypatch.setattr("sys.argv", ["eval.py", "compare", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as caught:
        command_module.main()
    assert caught.value.code == 2 and "nothing: no eval.json in it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ during training
def test_benchmarks_of_a_training_run_are_asked_once_and_bad_ones_name_the_key(files):
    (exam,) = load_exams(parse_tasks(f"aime24={files['aime24']}", key="eval_tasks"), 0, 1, Config(), print)
    assert (exam.name, len(exam.items), exam.samples) == ("aime24", 1, 1)  # once, greedy
    with pytest.raises(ConfigError, match="^eval_tasks='gsm9k': 'gsm9k': unknown benchmark"):
        parse_tasks("gsm9k", key="eval_tasks")
    with pytest.raises(ConfigError, match="^eval_tasks: gsm8k=no_such.jsonl: no such file"):
        parse_tasks("gsm8k=no_such.jsonl", key="eval_tasks")


def test_the_question_prompt_of_a_run_is_for_maths_alone(files):
    tasks = parse_tasks(f"gsm8k={files['gsm8k']},bbeh={files['bbeh']}")
    asked = load_exams(tasks, 0, 0, Config(question_prompt="Q {passage}"), print)
    assert [exam.prompt == "Q {passage}" for exam in asked] == [True, False]


def test_numbers_during_training_by_hand(build_sampler, folders, scripted, files):
    """Two sums, one right; a text that is wrong."""
    questions = {item.question: item.gold for exam in read_exams(files) for item in exam.items}
    calls = scripted(questions | {"Bob had 1,200 nuts and ate none.": "7", "Sort: c, a, b": "none"})
    tasks = f"gsm8k={files['gsm8k']},bbeh={files['bbeh']},math500={files['math500']}"
    sampler = build_sampler(folders["smollm3"], eval_every=1, eval_tasks=tasks, max_prediction_tokens=5)
    metrics = exams.run_exams(load_exams(parse_tasks(tasks), 0, 1, sampler.config, print), sampler)
    assert metrics["eval/gsm8k"] == 50 and metrics["eval/gsm8k_standard_error"] == pytest.approx(50)
    assert metrics["eval/bbeh"] == 50 and metrics["eval/math500"] == 100
    assert metrics["eval/gsm8k_parse_rate"] == 1 and metrics["eval/gsm8k_length_mean"] == 3
    assert "eval/math500_standard_error" not in metrics  # of one item there is none
    assert [(one.count, one.greedy, one.tokens) for one in calls] == [(1, True, 5)] * 3


def test_a_chat_models_responses_end_themselves_in_training_too(build_sampler, folders, files, monkeypatch):
    asked = []
    monkeypatch.setattr(exams, "generate", lambda sampler, *_, **__: asked.append(sampler.config.stop_at_answer) or [])
    monkeypatch.setattr(exams, "summarise", lambda records: dict.fromkeys(("score", *DETAILS)))
    sampler = build_sampler(folders["smollm3"], eval_every=1, eval_tasks=f"gsm8k={files['gsm8k']}")
    for frame in (None, ("<user>", "<end>")):
        asked_of = load_exams(parse_tasks(sampler.config.eval_tasks), 0, 1, sampler.config, print)
        exams.run_exams(asked_of, replace(sampler, frame=frame))
    assert asked == [True, False] and sampler.config.stop_at_answer


DETAILS = ("standard_error", "parse_rate", "truncation_rate", "length_mean")


def test_two_ranks_share_the_items_during_training(build_sampler, folders, scripted, files, monkeypatch):
    """What each would hand to the gather: together every item once."""
    scripted({item.question: item.gold for exam in read_exams(files) for item in exam.items})
    sampler, handed = build_sampler(folders["smollm3"]), []
    monkeypatch.setattr(exams, "gather", lambda rows: handed.append(rows) or rows)
    asked = load_exams({"gsm8k": str(files["gsm8k"])}, 0, 1, sampler.config, print)
    for rank in range(2):
        exams.run_exams(asked, replace(sampler, ranks=replace(sampler.ranks, rank=rank, world=2)))
    assert [[row["id"] for row in rows] for rows in handed] == [[asked[0].items[0].id], [asked[0].items[1].id]]


def test_conclusions_are_drawn_from_the_files(files, scripted, folders, ranks, tmp_path):
    """An edited verdict moves the score: nothing is kept in memory but what the records say."""
    scripted({item.question: item.gold for exam in read_exams(files) for item in exam.items})
    settings = settings_for(folders["smollm3"], tmp_path, files={"gsm8k": files["gsm8k"]})
    evaluate(settings, ranks)
    path = tmp_path / "gsm8k/chunk_00000.jsonl"
    path.write_text(path.read_text().replace('"score": 1.0', '"score": 0.0', 1))
    conclude(settings, load_exams(settings.tasks, 0, 0, settings.engine, print))
    assert json.loads((tmp_path / "eval.json").read_text())["tasks"]["gsm8k"]["score"] == 50
