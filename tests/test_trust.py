"""What others wrote is data: no model folder, tokenizer, template, config or answer can run code or fetch more."""

import ast
import json
import os
import pickle
import re
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import math_verify.parser
import pytest
import torch
from jinja2.exceptions import SecurityError
from reference import ROOT, tiny_config

from benchmarks import verify
from benchmarks.judge import check_answers
from config import ConfigError, read_config
from model import load_replica, load_tokenizer

FOLDERS = (".", "benchmarks", "report", "play", "bench", "miniature", "engine")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
BASE = ROOT / "assets/tiny_base"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def mark(tmp_path):
    """A file that exists when somebody's code has run."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def folder_with(tmp_path: Path, file: str, **changes) -> Path:
    """A copy of the tiny base with some keys of a JSON file changed."""
    folder = shutil.copytree(BASE, tmp_path / "model")
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))
    return folder


def test_the_payload_of_these_tests_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["payload", "plain tensors"])
def test_a_model_of_pickles_is_refused(kind, tmp_path, mark, ranks):
    folder = folder_with(tmp_path, "config.json")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(mark) if kind == "payload" else torch.ones(96)},
               folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no file named model.safetensors"):
        load_replica(tiny_config(folder), ranks)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_custom_code_is_refused_and_nobody_is_asked(part, tmp_path, mark, ranks, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if part == "model":
        classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
        folder = folder_with(tmp_path, "config.json", model_type="own", auto_map=classes)
    else:
        folder = folder_with(tmp_path, "tokenizer_config.json", tokenizer_class="Own",
                             auto_map={"AutoTokenizer": ["own.Own", None]})
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ValueError, match="custom code"):
        (load_replica(tiny_config(folder), ranks) if part == "model" else load_tokenizer(tiny_config(folder)))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_a_model_names_is_not_fetched(key, tmp_path, ranks):
    folder = folder_with(tmp_path, "config.json", **{key: "somebody/kernel"})
    assert load_replica(tiny_config(folder), ranks).config._attn_implementation == "flash_varlen"


def test_a_local_model_needs_no_network(ranks, monkeypatch):
    def refuse(*words):
        raise AssertionError(f"a connection to {words}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_tokenizer(tiny_config(BASE))
    load_replica(tiny_config(BASE), ranks)
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"


@pytest.mark.parametrize("expression", ["''.__class__.__mro__", "cycler.__init__.__globals__.os.system('touch MARK')"])
def test_a_chat_template_runs_in_a_sandbox(expression, tmp_path, mark):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ " + expression.replace("MARK", str(mark)) + " }}")
    tokenizer = load_tokenizer(tiny_config(BASE, chat_template=str(file)))
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_a_config_makes_no_objects(tmp_path, mark):
    (tmp_path / "a.yaml").write_text(f"steps: !!python/object/apply:pathlib.Path.touch [{mark}]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_config([str(tmp_path / "a.yaml")])


# ---------------------------------------------------------------------------------------------- what a model writes
def hostile_answers(path: Path) -> list[str]:
    codes = [f"__import__('pathlib').Path('{path}').touch()", f"open('{path}','w')", f"exec(\"open('{path}','w')\")"]
    frames = ["%s", "$%s$", r"\text{%s}", r"\operatorname{%s}", "1+%s", "2*(%s)", r"\frac{%s}{2}", "[%s]", "x=%s",
              "\n%s\n"]
    return [frame % code for frame in frames for code in codes] + [f"{{{{ {codes[0]} }}}}", f"%({codes[0]})s",
                                                                   f"1/2\n{codes[0]}"]


def test_an_answer_is_never_run(mark):
    answers = hostile_answers(mark)
    assert check_answers([("1/2", answer) for answer in answers], seconds=5) == [0.0] * len(answers)
    check_answers([(answer, "1/2") for answer in answers], seconds=5)


def test_only_digits_and_operators_reach_sympys_own_parser(mark, monkeypatch):
    """That one evaluates Python. In a box math-verify asks it nothing; else what a pattern without letters matched."""
    seen, parse_expr = [], math_verify.parser.parse_expr

    def watched(text, **options):
        seen.append(text)
        return parse_expr(text, **options)

    monkeypatch.setattr(math_verify.parser, "parse_expr", watched)
    for answer in [*hostile_answers(mark), "1/2+1/3", "2*(3+4)", "(1+2)**3", "answer: 3*4 = 12", "7/9 __import__ 1/3"]:
        verify._verdict("1/2", answer)
        math_verify.parse(answer, parsing_timeout=None)
    assert len(seen) >= 3 and not [text for text in seen if re.search(r"[^\d\s.+\-*×/^()÷]", text)]


# ---------------------------------------------------------------------------------------------- the scripts themselves
FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "runpy", "ctypes"}
RISKY = "eval exec compile __import__ importlib.import_module os.system os.popen os.execv torch.load dcp.load".split()
RISKY += "np.load np.fromfile yaml.load yaml.unsafe_load yaml.full_load torch.hub.load torch.jit.load".split()
ALLOWED = {  # a call that reads or runs more than data, and the one script that may make it
    ("checkpoint.py", "dcp.load"),  # the run's own state
    ("metrics.py", "subprocess.run"),  # git
    ("miniature/runs.py", "subprocess.run"),  # train.py, by words of its own table
    ("ops.py", "importlib.import_module"),  # flash-attn, by one of two constant names
    ("benchmarks/verify.py", "subprocess.Popen"),  # the checker's child
}


def calls(script: Path):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def place(script: Path) -> str:
    """Its path in the repository."""
    return script.relative_to(ROOT).as_posix()


def test_no_script_reads_pickles_or_runs_text():
    for script in SCRIPTS:
        tree = ast.parse(script.read_text(encoding="utf-8"))
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in imported} & FORBIDDEN, place(script)
        for name, words in calls(script):
            risky = name in RISKY or name.startswith("subprocess.")
            assert not risky or (place(script), name) in ALLOWED, (place(script), name)
            assert words.get("shell", "False") == words.get("allow_pickle", "False") == "False", (place(script), name)
            assert words.get("weights_only", "True") == "True", (place(script), name)


def test_every_model_and_tokenizer_is_loaded_as_data():
    loads = [(place(script), name, words) for script in SCRIPTS for name, words in calls(script)]
    loads = [(file, name, words) for file, name, words in loads if name.startswith("Auto") and "from_" in name]
    assert len(loads) >= 5
    for file, name, words in loads:
        assert words.get("trust_remote_code") == "False", (file, name)
        assert "Model" not in name or "from_config" in name or words.get("use_safetensors") == "True", (file, name)


@pytest.mark.parametrize(("file", "changes", "reason"), [
    ("config.json", {"num_hidden_layers": 5, "layer_types": 5 * ["full_attention"], "no_rope_layers": [1] * 5},
     "9 are missing or of another shape"),
    ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights cannot be trained"),
    ("config.json", {"vocab_size": 800}, "of another shape than config.json says: model.embed_tokens.weight"),
    ("config.json", {"model_type": "nonesuch"}, "no usable weights"), ("tokenizer.json", {"model": 1}, "tokenizer"),
    ("model.safetensors", None, "no usable weights"),
])  # fmt: skip
def test_a_model_that_cannot_be_loaded_whole_is_one_line(file, changes, reason, tmp_path, ranks):
    folder = folder_with(tmp_path, file, **changes) if changes else shutil.copytree(BASE, tmp_path / "model")
    if not changes:
        os.truncate(folder / file, 1000)
    with pytest.raises(ConfigError, match=f"^model='.*{reason}[^\n]*$"):
        load_tokenizer(tiny_config(folder))
        load_replica(tiny_config(folder), ranks)
