"""What a trained model does with words that nothing trained it for: three sets of 512, answered greedily.

    torchrun --nproc_per_node=2 -m miniature.transfer "active 10=runs/smollm2-135m/checkpoints/latest/hf" ... KEY=VALUE

NAME=MODEL, and keys of configs/smollm2-135m.yaml: `data` for the held-out articles, other.data and other.text_field for
a text of another kind. A line of miniature/transfer.jsonl for each model, the share that is right in each set:

    last_word    held-out passages up to their last word, as plain text without a prompt: does the model write it?
    heldout      masks in held-out passages
    other        masks in the other text
"""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch.distributed as dist

from config import ConfigError, command, read_config
from eval import make_probe
from metrics import append_row
from miniature.real import TRANSFERS
from model import load_replica, load_tokenizer
from prompts import BOXED_OPENING, encode, last_answer, predict_prompt
from play.passage import read_corpus
from ranks import start_ranks
from rewards import exact_match
from rollout import Sampler, make_sampler, rollout

KEYS = ["configs/smollm2-135m.yaml", "seed=99", "probe_passages=512"]
LAST_WORD = re.compile(r"(.*\s)(\w+)\W*", re.DOTALL)


def greedy_answers(sampler: Sampler, prompts: list[list[int]], name: str) -> list[str]:
    """The text of the greedy response to each prompt; every rank calls it."""
    longest = sampler.config.max_prediction_tokens
    return [one.text for (one,) in rollout(sampler, prompts, 1, longest, BOXED_OPENING, (0, name), greedy=True)]


def last_words(sampler: Sampler, texts: list[str]) -> list[float]:
    """1 or 0 for each text that has words: is the first word of the continuation its last word? Case counts."""
    pairs = [match.groups() for match in map(LAST_WORD.fullmatch, texts) if match]
    written = greedy_answers(sampler, [encode(sampler.tokenizer, text.rstrip()) for text, _ in pairs], "last word")
    firsts = [re.match(r"\W*(\w*)", text)[1] for text in written]
    return [float(first == word) for first, (_, word) in zip(firsts, pairs, strict=True)]


def masked_words(sampler: Sampler, probe) -> list[float]:
    """1 or 0 for each mask of the probe: does the predictor recover it?"""
    texts = greedy_answers(sampler, [predict_prompt(sampler, mask.masked) for mask in probe.masks], "masks")
    return [exact_match(last_answer(text, "boxed"), mask.target) for text, mask in zip(texts, probe.masks, strict=True)]


def main(words: list[str], record: Path = TRANSFERS) -> None:
    """The command. Raises ConfigError for a bad key."""
    names = dict(word.rsplit("=", 1) for word in words if Path(word.rpartition("=")[2], "config.json").is_file())
    if not names:
        raise ConfigError("NAME=MODEL: no word names a folder with config.json")
    keys = [word for word in words if word.rpartition("=")[0] not in names]
    others = [word.removeprefix("other.") for word in keys if word.startswith("other.")]
    config = read_config(KEYS + [word for word in keys if not word.startswith("other.")])
    settings = {"heldout": config, "other": read_config([*KEYS, "heldout=0.49", *others])}
    ranks, probes = start_ranks(), {}
    for name, model in names.items():
        own = replace(config, model=model)
        sampler = make_sampler(load_replica(own, ranks), load_tokenizer(own), own, ranks)
        for part, asked in settings.items():
            probes[part] = probes.get(part) or make_probe(read_corpus(asked, sampler.tokenizer), sampler, asked)
        scores = {"last_word": last_words(sampler, [one.text for one in probes["heldout"].passages])}
        scores |= {part: masked_words(sampler, probe) for part, probe in probes.items()}
        row = {"model": name} | {part: [round(fmean(values), 4), len(values)] for part, values in scores.items()}
        if ranks.rank == 0:
            append_row(record, row)
            print(row, flush=True)
    dist.destroy_process_group()
    os._exit(0)  # as train.py leaves: library threads may abort a normal exit


if __name__ == "__main__":
    with command(__doc__):
        main(sys.argv[1:])
