"""The configuration: one line says what is wrong, before anything is loaded; what is dumped reads back the same."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest
from reference import ROOT

from config import RANGES, Config, ConfigError, dump_config, parse_command_line, read_config
from relatives.rlp import MIN_PREFIX

LOCAL = ["model=assets/tiny_base", "data=assets/tiny_wiki.jsonl.gz"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# ----------------------------------------------------------------------------------------------- where values come from
def test_defaults_are_the_papers():
    config = read_config([])
    assert (config.passages_per_step, config.masks_per_passage, config.predictions_per_mask) == (32, 8, 8)
    assert (config.learning_rate, config.temperature, config.steps) == (5e-7, 1.0, 2000)
    assert config.run_dir == "runs/run"


def test_words_override_the_file_and_later_words_win():
    config = read_config(["configs/tiny.yaml", "steps=7", "learning_rate=1e-4", "steps=9"])
    assert (config.steps, config.learning_rate) == (9, 1e-4)
    assert config.passages_per_step == 8  # the file's
    assert config.run_dir == "runs/tiny"  # named after the file


def test_a_number_without_a_dot_is_a_number_though_yaml_reads_text(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning_rate: 5e-7\ntemperature: 1\n")
    config = read_config([str(file)])
    assert config.learning_rate == 5e-7 and isinstance(config.learning_rate, float)
    assert config.temperature == 1.0 and isinstance(config.temperature, float)
    assert read_config(["learning_rate=5e-7"]).learning_rate == 5e-7


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_config_is_valid(file):
    assert read_config([f"configs/{file}"]).run_dir == f"runs/{file.removesuffix('.yaml')}"


def write(folder, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_says_only_what_differs_from_its_base(tmp_path):
    write(tmp_path, top="steps: 1\nseed: 1\nclip_low: 0.1\n", middle="base: top.yaml\nsteps: 2\nseed: 2\n",
          child="base: middle.yaml\nsteps: 3\n", same="base: top.yaml\n")  # fmt: skip
    config = read_config([str(tmp_path / "child.yaml"), "keep_last=5"])
    assert (config.steps, config.seed, config.clip_low, config.keep_last) == (3, 2, 0.1, 5)
    assert config.run_dir == "runs/child"
    assert read_config([str(tmp_path / "child.yaml"), "steps=4"]).steps == 4  # words win over all files
    assert read_config([str(tmp_path / "same.yaml")]).seed == 1


@pytest.mark.parametrize(("bases", "named", "reason"), [
    ({"a": "a.yaml"}, "a.yaml", "must name another file and not lead back"),
    ({"a": "b.yaml", "b": "a.yaml"}, ".yaml", "must name another file and not lead back"),
    ({"a": "7"}, "a.yaml", "base=7 must name another file"), ({"a": "[b.yaml]"}, "a.yaml", "must name another file"),
    ({"a": "missing.yaml"}, "missing.yaml", "cannot be read (FileNotFoundError)"),
    ({"a": "."}, "", "cannot be read (IsADirectoryError)"),
])  # fmt: skip
def test_a_base_that_leads_nowhere_is_one_line(tmp_path, bases, named, reason):
    write(tmp_path, **{name: f"base: {base}\n" for name, base in bases.items()})
    with pytest.raises(ConfigError) as caught:
        read_config([str(tmp_path / "a.yaml")])
    line = str(caught.value)
    assert line.startswith("config file ") and named in line and reason in line and "\n" not in line


def test_a_bad_key_of_a_base_is_found_and_base_is_no_key_of_the_command_line(tmp_path):
    write(tmp_path, top="stepz: 1\n", child="base: top.yaml\n")
    with pytest.raises(ConfigError, match="stepz=1: unknown key"):
        read_config([str(tmp_path / "child.yaml")])
    with pytest.raises(ConfigError, match="base='configs/tiny.yaml': unknown key"):
        read_config(["base=configs/tiny.yaml"])


def test_a_dumped_config_reads_back_equal(tmp_path):
    words = ["learning_rate=5e-7", r'mask_prompt="a: {passage}\n\\mask{é}"', "resume=never", "liger=no", "clip_low=0"]
    config = read_config([*LOCAL, *words, "run_dir=elsewhere"])
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert read_config([str(tmp_path / "again.yaml")]) == config


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("word, allowed", [
    ("stepz=1", "unknown key; perhaps steps"), ("qqq=1", "unknown key; known are adam_beta1, "),
    ("top_p=0.9", "unknown key"),
    ("steps=many", "expected a whole number"), ("steps=1.5", "expected a whole number"),
    ("steps=true", "expected a whole number"), ("learning_rate=fast", "expected a finite number"),
    ("learning_rate=.nan", "expected a finite number"), ("temperature=.inf", "expected a finite number"),
    ("liger=1", "expected true or false"), ("gradient_checkpointing=sometimes", "expected true, false or auto"),
    ("gradient_checkpointing=1", "expected true, false or auto"), ("model=[a]", "expected text"),
    ("masks_per_passage=1", "2 or more, a group of one has no advantage"),
    ("predictions_per_mask=1", "2 or more, a group of one has no advantage"), ("max_mask_tokens=-1", "1 or more"),
    ("steps=-1", "0 or more"), ("temperature=0", "above 0"), ("learning_rate=-1e-6", "0 or more"),
    ("clip_low=1.5", "between 0 and 1"), ("max_importance=0.5", "1 or more"),
    ("heldout=0", "above 0 and below 0.5"), ("loss_mean=none", "one of token, sequence"),
    ("dtype=float16", "one of bfloat16, float32"),
    ("min_passage_tokens=2000", "must not exceed max_passage_tokens=1024"),
    ("tokens_per_micro_batch=5631", "at least 5632"),  # 1536 of the prompt and 4096 of the response
    ("mask_prompt=Choose!", "must contain {passage} once"),
    ("predict_prompt='{passage}{passage}'", "must contain {passage} once"),
    ("model=./no_such_folder", "no such file or folder"), ("data=no_such.jsonl", "no such file or folder"),
    ("data=''", "no such file or folder"), ("question_prompt=Solve!", "must contain {passage} once"),
    ("rlp_prompt='{passage} {passage}'", "must contain {passage} once"),
    ("sft_answer=box", "must contain {answer}"), ("warmup_method_steps=-1", "0 or more"),
    ("generator_reward=hard", "one of one_minus_accuracy, variance"), ("mini_batches=0", "1 or more"),
    ("kl=-1", "0 or more"), ("ema_decay=1.1", "between 0 and 1"), ("entropy_share=0", "above 0, at most 1"),
    ("verify_seconds=0", "a number above 0"), ("chat_template=no_such.jinja", "none, auto or the path"),
    ("eval_every=5", "needs eval_tasks"), ("eval_tasks=gsm8k", "never asked without eval_every"),
    ("eval_limit=-1", "0 or more"), ("steps=[", "not valid YAML"),
])  # fmt: skip
def test_a_bad_value_is_one_line_with_key_value_and_what_is_allowed(word, allowed):
    with pytest.raises(ConfigError) as caught:
        read_config([*LOCAL, word])
    line = str(caught.value)
    key, value = word.split("=", 1)
    assert line.startswith(f"{key}=") and value.strip("[]'").lstrip(".+")[:4].lower() in line.lower()
    assert allowed in line and "\n" not in line


@pytest.mark.parametrize(("words", "line"), [
    (["method=magic"], "method='magic': must be one of active, "),
    (["method="], "method='': must be one of active, "),
    (["warmup_method=magic"], "warmup_method='magic': must be one of active, "),
    *(([f"method={name}", f"warmup_method={first}"],
       f"warmup_method='{first}': cannot be combined with rlvr, rlp or quiet_star")
      for name, first in (("rlp", "random_span"), ("rlvr", "sft"), ("quiet_star", "sft"), ("active", "rlvr"))),
    (["method=quiet_star"], "share_prompts=False: must be true with quiet_star"),
    (["method=quiet_star", "ahead_tokens=0"], "ahead_tokens=0: must be 1 or more"),
    (["method=quiet_star", "share_prompts=true", "max_prompt_tokens=23"], "max_prompt_tokens=23: must be at least 24"),
    (["method=quiet_star", "min_passage_tokens=8"], "min_passage_tokens=8: must be 9 or more with quiet_star"),
    *(([f"{key}={name}", "kl=0.1"], "kl=0.1: must be 0 with star, rlp, quiet_star, sft, cpt")
      for key, name in (("method", "rlp"), ("method", "quiet_star"), ("method", "sft"), ("method", "cpt"),
                        ("warmup_method", "sft"))),
    *(([*words, "offload=true"], "offload=True: must be false with rlp, entropy_token and kl, which keep a second copy")
      for words in (["method=rlp"], ["method=entropy_token"], ["warmup_method=entropy_token"], ["kl=1"])),
    (["method=random_span", "reward=prefix"],
     "reward='prefix': for random_token and entropy_token only, not random_span"),
    (["method=random_token", "warmup_method=random_span", "reward=prefix"],
     "reward='prefix': for random_token and entropy_token only, not random_span, random_token"),
])  # fmt: skip
def test_keys_that_do_not_go_with_a_method_are_refused_in_one_line_that_names_the_key(words, line):
    with pytest.raises(ConfigError) as caught:
        read_config([*LOCAL, *words])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [
    ["tokens_per_micro_batch=5632"], ["method=sft", "kl=0"], ["offload=true"], ["method=random_span", "kl=0.1"],
    ["mini_batches=2"], ["method=entropy_token", "warmup_method=random_token", "reward=prefix"],
])  # fmt: skip
def test_keys_that_go_with_each_other_are_accepted(words):
    read_config([*LOCAL, *words])


def test_rlp_needs_texts_that_have_a_position():
    with pytest.raises(ConfigError, match="^min_passage_tokens=8: must be 9 or more with rlp"):
        read_config([*LOCAL, "method=rlp", "min_passage_tokens=8"])
    assert read_config([*LOCAL, "method=rlp", "min_passage_tokens=9"]).min_passage_tokens == 1 + MIN_PREFIX


def test_a_dry_run_has_a_folder_of_its_own():
    assert read_config(["configs/tiny.yaml", "steps=0"]).run_dir == "runs/tiny-dry"
    assert read_config(["configs/tiny.yaml", "steps=0", "run_dir=here"]).run_dir == "here"


@pytest.mark.parametrize("text, reason",
                         [(None, "cannot be read"), ("- a\n- b\n", "expected lines of"), ("a: [\n", "not valid YAML")])
def test_a_bad_config_file_is_one_line_with_its_name(tmp_path, text, reason):
    file = tmp_path / "bad.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config([str(file)])
    assert "bad.yaml" in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- the command line
def test_a_bad_command_line_exits_with_status_2_and_one_line(command):
    ended = command(["train.py", "configs/tiny.yaml", "temperature=0"], limit=60)
    assert ended.returncode == 2
    assert ended.stderr == "config error: temperature=0.0: must be a number above 0\n"
    assert ended.stdout == ""


@pytest.mark.parametrize("words, status", [(["--help"], 0), ([], 2)])
def test_help_prints_the_usage(monkeypatch, capsys, words, status):
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(SystemExit) as caught:
        parse_command_line("how to use it")
    assert caught.value.code == status and capsys.readouterr().out == "how to use it\n"


def test_under_torchrun_only_the_first_rank_complains(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "steps=-1"])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        parse_command_line("")
    assert caught.value.code == 2 and capsys.readouterr().err == ""


def test_a_file_whose_name_has_an_equals_sign_and_begins_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "lr=1.yaml"
    path.write_text("\ufeffmodel: assets/tiny_base\ndata: assets/tiny_wiki.jsonl.gz\nsteps: 7\n", encoding="utf-8")
    assert read_config([str(path)]).steps == 7 and read_config([str(path)]).run_dir == "runs/lr=1"


@pytest.mark.parametrize("value", ["no", "2026-11-21", "12", "1.5"])
def test_what_yaml_takes_for_another_type_is_to_be_quoted(value):
    with pytest.raises(ConfigError, match="run_dir=.*expected text; YAML reads .* quotes"):
        read_config([*LOCAL, f"run_dir={value}"])
    assert read_config([*LOCAL, f"run_dir='{value}'"]).run_dir == value


# ------------------------------------------------------------------------------------------------- the dataclass itself
def test_every_number_has_a_range_and_every_default_passes():
    numbers = {name for name, value in asdict(Config()).items() if type(value) in (int, float)}
    assert numbers <= set(RANGES) <= {field.name for field in fields(Config)}
    assert all(test(getattr(Config(), key)) for key, (_, test) in RANGES.items())


@pytest.mark.parametrize(("word", "methods"), [
    *((word, "rlp star quiet_star sft cpt") for word in ("advantage_std=false", "loss_mean=sequence")),
    ("mask_truncated=true", "rlp star quiet_star sft cpt"), ("shuffle_rewards=true", "sft cpt"),
    *((word, "star sft cpt rlp") for word in ("generator_reward=variance", "train_generator=false", "random_masks=1")),
])  # fmt: skip
def test_a_key_that_a_method_does_not_read_is_refused(word, methods):
    for method in methods.split():
        with pytest.raises(ConfigError, match=f"^{word.split('=')[0]}=.*: changes nothing with {method}$"):
            read_config(["configs/tiny.yaml", f"method={method}", word])
    read_config(["configs/tiny.yaml", "method=active", "warmup_method=sft", "warmup_method_steps=5", word])


@pytest.mark.parametrize(("word", "reason"), [
    ("steps=010", "YAML reads 010"), ("learning_rate=1:30.5", "YAML reads 1:30.5"), ("steps==5", "expected key=value"),
    ("run_dir=a #1", "YAML reads 'a'"), ("mask_prompt=Hide\n{passage}", "YAML reads 'Hide"),
    ("run_dir={a: 1, a: 2}", "the key a stands twice"),
])  # fmt: skip
def test_what_yaml_would_change_in_silence_is_refused(word, reason):
    with pytest.raises(ConfigError, match=reason):
        read_config([*LOCAL, word])
    assert read_config([*LOCAL, "run_dir=~/a b"]).run_dir == str(Path.home() / "a b")
