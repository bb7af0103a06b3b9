"""The second copy on any number of ranks: `distributed_checks` is called by worker.py, or alone:

    torchrun --standalone --nproc_per_node=2 tests/reference_checks.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from reference import largest_error, load_plain, same_bits, save_model, tiny_config, weights

from grpo import Group, make_optimizer, make_samples, score, update
from methods import Position, information_gain, make_frame
from model import build_policy, build_reference, ema_update, load_replica, load_tokenizer
from ranks import Ranks, gather, start_ranks
from rollout import Rollout

SEQUENCES = [([7], [1, 2, 3]), (list(range(40)), [9]), ([5, 6], list(range(100, 125))), ([9, 9, 9, 200], [1, 1]),
             (list(range(30)), list(range(30)))]  # fmt: skip
"""(prefix, continuation) pairs of uneven lengths, an odd number of them."""
GROUPS = [
    Group("pred", [Rollout([1, 2, 3], [4, 5], [-5.0, -5.0], "", "eos") for _ in range(2)], [0.0, 1.0]),
    Group("pred", [Rollout([9] * 20, [4] * n, [-5.0] * n, "", "eos") for n in (7, 2)], [1.0, 0.0]),
]
"""Something to train on, so that policy and copy part."""


@torch.no_grad()
def naive_score(model, sequences, temperature=1.0) -> list[tuple[list[float], list[float]]]:
    """What `score` returns, one sequence at a time through the ordinary model's whole logits."""
    scores = []
    for prefix, continuation in sequences:
        logits = model(input_ids=torch.tensor([prefix + continuation]), use_cache=False).logits[0] / temperature
        logprobs = logits.log_softmax(-1)[len(prefix) - 1 : -1]
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        scores.append((logprobs[range(len(continuation)), continuation].tolist(), entropies.tolist()))
    return scores


def score_error(found, expected) -> float:
    """Largest absolute difference over all tokens; the lengths must be the same."""
    pairs = [
        (a, b)
        for one, other in zip(found, expected, strict=True)
        for ours, theirs in zip(one, other, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return max((abs(a - b) for a, b in pairs), default=0.0)


def distributed_checks(ranks: Ranks, folder: Path) -> dict:
    """folder holds tiny models by family, as save_model leaves them. Every rank calls it; the values must be:

    own / all: numbers of parameters of this rank's shards and of the model; the ranks' shares sum to all
    equal, frozen: True; errors: below 1e-5; agree: True, every rank got the same lists
    """
    # One sequence's length: as many micro-batches as there are sequences, dummies where the ranks do not divide them
    config = tiny_config(folder / "smollm3", tokens_per_micro_batch=62, learning_rate=1e-2, lr_schedule="constant")
    replica = load_replica(config, ranks)
    policy, reference = build_policy(replica, config, ranks), build_reference(replica, config, ranks)
    plain = load_plain(config.model).eval()
    shares = [parameter.to_local().numel() for parameter in reference.parameters()]
    results = {
        "own": sum(shares),
        "all": sum(parameter.numel() for parameter in replica.parameters()),
        "equal": same_bits(weights(reference), weights(replica)),
        "no_gradients": not any(parameter.requires_grad for parameter in reference.parameters()),
    }

    # Scores, of many sequences, of fewer than ranks and of none, by both models
    scored = {
        f"{name} {count} at {temperature}": (score(model, SEQUENCES[:count], config, ranks, temperature), temperature)
        for name, model in (("reference", reference), ("policy", policy))
        for count, temperature in ((5, 1.0), (5, 0.7), (1, 1.0), (0, 1.0))
    }
    results["score_errors"] = {
        name: score_error(found, naive_score(plain, SEQUENCES[: len(found)], temperature))
        for name, (found, temperature) in scored.items()
    }
    everywhere = gather([scored])
    results["agree"] = all(one == everywhere[0] for one in everywhere)

    # No tags, no instruction, no thought: nothing was gained
    frame = make_frame(load_tokenizer(config), "{passage}", config.max_prompt_tokens)
    positions = [Position(prefix, continuation[0]) for prefix, continuation in SEQUENCES]
    gains = information_gain(policy, reference, positions, [[[]]] * len(positions), frame, config, ranks)
    results["no_thought_gain"] = max(abs(gain) for group in gains for gain in group)

    # The recurrence over three steps of a policy that moves; whole tensors beside the shards
    expected, optimizer = weights(reference), make_optimizer(policy, config)
    for step in range(3):
        update(policy, optimizer, make_samples(GROUPS, config), config, ranks, step)
        ema_update(reference, policy, 0.5)
        expected = {name: 0.5 * expected[name] + 0.5 * one for name, one in weights(policy).items()}
    results["ema_error"] = largest_error(weights(reference), expected)
    results["moved"] = largest_error(weights(reference), weights(replica)) > 1e-3
    plain.load_state_dict(weights(reference), strict=False)  # and it scores with what it now holds
    found = score(reference, SEQUENCES, config, ranks)
    results["moved_score_error"] = score_error(found, naive_score(plain, SEQUENCES))

    # Nothing is sent: one rank can do it alone
    before = weights(reference)
    if ranks.rank == 0:
        ema_update(reference, policy, 0.0)
    after = weights(reference)
    results["alone"] = not same_bits(after, before)
    ema_update(reference, policy, 1.0)
    results["frozen"] = same_bits(weights(reference), after)
    return results


def main() -> None:
    out = Path(sys.argv[1])
    ranks = start_ranks()
    if ranks.rank == 0:
        save_model("smollm3", out / "smollm3")
    dist.barrier()
    for number, results in enumerate(gather([distributed_checks(ranks, out)])):
        if ranks.rank == 0:
            print(f"rank {number}: {json.dumps(results, indent=2)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
