"""From a config to all that a run keeps: text, models, optimizer, sampler, probe; and where an earlier run ended.

Leaves out how each is made (data.py, model.py, grpo.py, rollout.py, probe.py) and the checkpoint's contents
(checkpoint.py).
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch.distributed as dist

from checkpoint import check_same_run, find_checkpoint, resume_notes
from config import Config, ConfigError
from data import build_index, load_corpus
from evidence import describe, keep_rows, open_run, save_prompts
from exams import exams_of
from grpo import make_optimizer
from memory import decide_checkpointing, memory_warnings
from model import Ranks, build_policy, load_replica, load_tokenizer
from probe import make_probe
from reference_model import build_reference, needs_reference
from sampler import check_prompts, make_sampler
from tasks import question_corpus, rlp_frame


def open_or_resume(config: Config, world: int, say) -> tuple[Path, dict] | None:
    """The checkpoint to continue from, if any, and the run directory. For rank 0, before anything is loaded.

    Raises ConfigError before a file is touched if the run there has another config.
    """
    found = find_checkpoint(config, say) if config.steps else None  # a dry run looks at the start
    if found:
        check_same_run(found[1], config)
        if found[1]["step"] >= config.steps and not found[1]["row"]:
            return found
        for line in resume_notes(found[1], config, world):
            say(line)
    open_run(config)
    return found


def set_up(config: Config, ranks: Ranks, facts: dict | None, say) -> tuple:
    """Everything that a run keeps: (corpus, policy, reference, optimizer, sampler, probe)."""
    run = Path(config.run_dir)

    # ---- text
    exams = exams_of(config, say)
    try:
        tokenizer = load_tokenizer(config)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"model={config.model!r}: no usable tokenizer ({reason})") from None
    if config.method == "rlvr":
        corpus = question_corpus(config, say)
    else:
        if ranks.rank == 0:
            build_index(config, tokenizer, run / "cache", say, sorted(run.parent.glob("*/cache")))
        dist.barrier()
        corpus = load_corpus(run / "cache", config)

    # ---- the model: a replica that samples, the sharded policy that learns, a second copy where the method needs one
    if not Path(config.model).expanduser().exists():
        say(f"loading {config.model}; the first time from the hub")
    replica = load_replica(config, ranks)
    trained = decide_checkpointing(replica.config, config, ranks)
    for line in memory_warnings(replica.config, trained, ranks):
        say(line)
    policy = build_policy(replica, trained, ranks)
    reference = build_reference(replica, config, ranks) if needs_reference(config) else None
    optimizer = make_optimizer(policy, config)
    sampler = make_sampler(replica, tokenizer, config, ranks)
    check_prompts(sampler)
    if config.method == "rlp":
        rlp_frame(sampler)  # raises now if its prompt does not fit
    probe = make_probe(corpus, sampler, config)
    probe.exams = exams
    say(describe(trained, ranks, sampler, corpus, probe))

    if ranks.rank == 0:
        last = facts["step"] if facts else -1
        waiting = bool(facts and facts["row"])  # its row, and its probe, come again
        if config.steps:  # a dry run deletes nothing
            keep_rows(run / "samples.jsonl", last)
            keep_rows(run / "metrics.jsonl", last - waiting)
            keep_rows(run / "probes.jsonl", last - waiting)
        if config.method not in ("rlvr", "rlp"):
            save_prompts(run / "prompts.txt", sampler, corpus)
    # Set-up leaves a million objects that never die; the sampler's own garbage collections would walk them every phase
    gc.collect()
    gc.freeze()
    return corpus, policy, reference, optimizer, sampler, probe
