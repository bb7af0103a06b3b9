"""Shared by all tests: one thread, no network, tiny models, the process group of one, commands with a limit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # of a launcher around pytest
    os.environ.pop(name, None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)

from reference import FAMILIES, ROOT, save_model, tiny_config  # noqa: E402

from model import load_replica, load_tokenizer  # noqa: E402
from ranks import start_ranks  # noqa: E402
from rollout import Sampler, make_sampler  # noqa: E402


@pytest.fixture(scope="session")
def ranks():
    """This process as the only rank."""
    yield start_ranks()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folder of a tiny random model per family, as save_pretrained leaves it."""
    base = tmp_path_factory.mktemp("models")
    return {family: save_model(family, base / family) for family in FAMILIES}


@pytest.fixture
def build_sampler(ranks):
    """(model folder, config keys) -> a Sampler on a fresh replica."""

    def build(folder: Path, **changes) -> Sampler:
        config = tiny_config(folder, **changes)
        return make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks)

    return build


@pytest.fixture(scope="session")
def command():
    """(words after `python`, limit in seconds, ranks=1) -> the ended process with its output; torchrun for two."""

    def run(words: list, limit: float, ranks: int = 1) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        return run_limited([sys.executable, *launcher, *map(str, words)], limit)

    return run


def run_limited(words: list[str], limit: float) -> subprocess.CompletedProcess:
    """Run in the root. After `limit` seconds the process group is ended and AssertionError raised.

    First by SIGTERM, on which torchrun ends its ranks (they have process groups of their own), then by SIGKILL.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        raise AssertionError(f"{words} did not end within {limit} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(words, process.returncode, out, err)
