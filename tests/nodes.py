"""One update and a checkpoint, on however many nodes: started by test_nodes.py, under torchrun, and compared there.

    torchrun --nnodes=2 --nproc_per_node=2 ... tests/nodes.py MODEL OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from reference import REWARDS, CaptureGradients, fresh_saver, load_plain, make_groups, same_bits, tiny_config, weights
from worker import digest

from checkpoint import finish_save, load_checkpoint, newest_checkpoint, save_checkpoint
from grpo import make_samples, update
from model import refresh
from ranks import start_ranks


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = start_ranks(60)
    config = tiny_config(folder, run_dir=str(out), learning_rate=1e-2, lr_schedule="constant", max_grad_norm=0.1)
    samples = make_samples(make_groups(load_plain(folder), REWARDS), config)
    saver = fresh_saver(config, ranks)
    captured = CaptureGradients(saver.policy)
    row = update(saver.policy, captured, samples, config, ranks, 0)
    saver.policy.zero_grad(set_to_none=True)
    for step in range(2):
        update(saver.policy, saver.optimizer, samples, config, ranks, step)
        refresh(saver.policy, saver.sampler.replica)
    saver.done = 2
    save_checkpoint(saver)
    saved = finish_save(saver)
    other = fresh_saver(config, ranks)
    load_checkpoint(other, *newest_checkpoint(Path(config.run_dir)))
    own = sum(parameter.to_local().numel() for parameter in saver.policy.parameters())
    facts = {
        "placements": [str(one) for one in next(saver.policy.parameters()).placements],
        "share": own / sum(parameter.numel() for parameter in saver.sampler.replica.parameters()),
        "metrics": row,
        "timeouts": [
            group._get_backend(ranks.device).options._timeout.total_seconds()
            for group in next(saver.policy.parameters()).device_mesh.get_all_groups()
        ],
        "saved": saved,
        "replica": same_bits(weights(saver.sampler.replica), weights(saver.policy)),
        "restored": same_bits(weights(other.policy), weights(saver.policy)),
        "digest": digest(weights(saver.sampler.replica)),
    }
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(facts))
    gradients, after = captured.gradients, weights(saver.policy)
    if ranks.rank == 0:
        torch.save({"gradients": gradients, "weights": after}, out / "tensors.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as train.py leaves: library threads may abort a normal exit


if __name__ == "__main__":
    main()
