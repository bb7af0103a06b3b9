"""Two nodes compute what one does. Both are torchrun agents of two ranks on this machine; the update is in nodes.py."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from reference import ROOT, largest_error, save_model

pytestmark = pytest.mark.slow


def run_nodes(nodes: int, per_node: int, words: list) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={per_node}",
                "--master_addr=127.0.0.1", f"--master_port={port}"]  # fmt: skip
    agents = [
        subprocess.Popen([*launcher, f"--node_rank={node}", "tests/nodes.py", *map(str, words)], cwd=ROOT,
                         env=os.environ.copy(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in range(nodes)
    ]  # fmt: skip
    try:
        printed = [agent.communicate(timeout=200)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0] * nodes, "\n".join(printed)
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()  # ends its ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """nodes -> (what each of the four ranks found, whole gradients and weights)."""
    base, found = tmp_path_factory.mktemp("nodes"), {}
    save_model("smollm3", base / "model")
    for nodes in (1, 2):
        out = base / str(nodes)
        out.mkdir()
        run_nodes(nodes, 4 // nodes, [base / "model", out])
        facts = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(4)]
        found[nodes] = facts, torch.load(out / "tensors.pt")
    return found


def test_a_node_holds_the_whole_model_cut_over_its_ranks(results):
    one, two = results[1][0], results[2][0]
    assert [facts["placements"] for facts in one] == [["S(0)"]] * 4
    assert [facts["placements"] for facts in two] == [["R", "S(0)"]] * 4
    assert sum(facts["share"] for facts in one) == pytest.approx(1)
    assert sum(facts["share"] for facts in two[:2]) == pytest.approx(1) == sum(facts["share"] for facts in two[2:])


def test_every_group_waits_as_long_as_the_config_says(results):
    """Those inside and between nodes too, which torch would give its own default."""
    assert [facts["timeouts"] for facts in results[2][0]] == [[7200.0, 7200.0]] * 4


def test_gradients_and_metrics_equal_those_of_one_node(results):
    (one, tensors), (two, others) = results[1], results[2]
    assert largest_error(others["gradients"], tensors["gradients"]) < 1e-6
    for facts in two:
        assert facts["metrics"] == pytest.approx(one[0]["metrics"], rel=1e-5)
    assert one[0]["metrics"]["grad_norm"] > 0.1  # the clip acted, by the norm over all shards
    assert largest_error(others["weights"], tensors["weights"]) < 1e-4  # after two steps of Adam, which divides


def test_replica_and_checkpoint_are_whole_on_two_nodes(results):
    for facts in results[1][0] + results[2][0]:
        assert facts["saved"] and facts["replica"] and facts["restored"]
    for nodes in (1, 2):  # the nodes sum gradients, and must not drift apart
        assert len({facts["digest"] for facts in results[nodes][0]}) == 1
