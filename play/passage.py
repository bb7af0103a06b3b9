"""Try a model on one passage: its masks, each with predictions, thoughts and verdicts.

    python -m play CHECKPOINT [BASE]                     paste a paragraph, end it with Ctrl-D
    python -m play CHECKPOINT [BASE] passage="Text ..."  or file=paragraph.txt
    python -m play CHECKPOINT [BASE] number=3            the fourth held-out passage of the config's corpus
    python -m play explain configs/tiny.yaml             one training step in slow motion

CHECKPOINT: a run directory, one of its checkpoints, a folder made by save_pretrained, or a hub name. Settings come from
config=FILE, else from the checkpoint's run, else from the defaults; key=value changes them. With BASE both models
choose masks, and both predict the masks of the first. Nothing is trained or written.
"""

from __future__ import annotations

import gc
import random
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from checkpoint import exported_model
from config import Config, ConfigError, read_config
from data import RESERVED, DataError, Passage, build_index, load_corpus
from methods import METHODS, Run, Task, make_task, named_masks, predict, reward
from model import load_replica, load_tokenizer
from play.explain import describe_answer, explain, plain, wrapped
from ranks import Ranks, start_ranks
from report.page import split_response
from rollout import derive_seed, make_sampler, mask_prompt

MASKS, RESPONSES_SHOWN, THOUGHT_CHARS = 8, 4, 300


def read_arguments(arguments: list[str]) -> tuple[dict[str, str], dict[str, str], Config]:
    """Command line -> (model folders by name, the passage's source, settings). Raises ConfigError."""
    models = [word for word in arguments if "=" not in word]
    keys = dict(word.split("=", 1) for word in arguments if "=" in word)
    source = {key: keys.pop(key) for key in ("passage", "file", "number") if key in keys}
    if not 1 <= len(models) <= 2:
        raise ConfigError(f"{len(models)} models given: expected CHECKPOINT or CHECKPOINT BASE")
    if len(source) > 1:
        raise ConfigError(f"{' and '.join(source)}: only one of them")
    if not source.get("number", "0").isdecimal():
        raise ConfigError(f"number={source['number']!r}: must be a whole number from 0, a held-out passage")
    names = [Path(model).name for model in models]
    names = names if len(set(names)) == len(names) else models
    folders = {}
    for name, model in zip(names, models, strict=True):  # a name that is no folder is left to the hub
        found = exported_model(Path(model)) if Path(model).is_dir() else model
        if found is None:
            why = "no model folder and no run with a checkpoint (no config.json, hf/ or checkpoints/)"
            raise ConfigError(f"{model}: {why}")
        folders[name] = str(found)
    model = folders[names[0]]
    runs = [parent.parent for parent in Path(model).absolute().parents if parent.name == "checkpoints"]
    configs = [str(run / "config.yaml") for run in runs if (run / "config.yaml").is_file()]
    configs = [keys.pop("config")] if "config" in keys else configs[:1]
    settings = {"method": "active", "reward": "exact", "masks_per_passage": MASKS, "model": model}
    if "number" not in source:
        settings["data"] = Config.data  # a run's corpus need not be on this machine
    return folders, source, read_config([*configs, *(f"{key}={value}" for key, value in (settings | keys).items())])


def read_passage(source: dict[str, str], config: Config, tokenizer) -> Passage:
    """The passage of the command line or of stdin. Raises ConfigError for a text that no prompt can hold."""
    if "number" in source:
        with tempfile.TemporaryDirectory() as folder:
            build_index(config, tokenizer, Path(folder), log=lambda line: None)
            heldout = load_corpus(Path(folder), config).heldout
        if int(source["number"]) >= len(heldout):
            raise ConfigError(f"number={source['number']}: must be below {len(heldout)}, the held-out passages")
        return heldout[int(source["number"])]
    if "file" in source:
        try:
            text = Path(source["file"]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"file={source['file']!r}: cannot be read ({type(error).__name__})") from None
    elif "passage" in source:
        text = source["passage"]
    else:
        if sys.stdin.isatty():
            print("Paste a paragraph, then press Ctrl-D on an empty line:", flush=True)
        text = sys.stdin.read()
    text = text.strip()
    marks = [mark for mark in (*RESERVED, *tokenizer.all_special_tokens) if mark in text]
    if not text or marks:
        raise ConfigError("the passage " + (f"contains {marks[0]!r}, a mark of the prompts" if text else "is empty"))
    return Passage("0#0", source.get("file", "your passage"), "", text)


def play(passage: Passage, models: dict[str, str], config: Config, ranks: Ranks, say=print) -> list[list[Task]]:
    """Prints what the models (name: folder) do with the passage. Returns, per model, the tasks of the masks that the
    first model chose, with this model's predictions."""
    say(f"{plain(passage.title)} {plain(passage.url)}\n{wrapped(passage.text)}\n")
    predicted, proposals = [], []
    for name, model in models.items():  # one after the other: they need not fit into memory together
        settings = replace(config, model=model)
        sampler = make_sampler(load_replica(settings, ranks), load_tokenizer(settings), settings, ranks)
        length, most = len(mask_prompt(sampler, passage.text)), config.max_prompt_tokens
        if length > most:
            raise ConfigError(f"max_prompt_tokens={most}: this passage makes a prompt of {length} tokens")
        rng = random.Random(derive_seed(config.seed, 0, "mask", 0))
        chosen = named_masks(sampler, [passage], (0, "propose"), [rng])[0]
        proposals = proposals or chosen
        say(f"{name} chose, {len(chosen)} times over:")
        for (words, invalid), count in Counter((task.mask.words, task.mask.invalid) for task in chosen).most_common():
            cause = f" (invalid: {invalid.replace('_', ' ')})" if invalid else ""
            say(wrapped(f"{count} x {words or 'nothing'}{cause}", 4))
        named = Counter(task.mask.masked for task in proposals if not task.mask.invalid)
        first = {task.mask.masked: task for task in reversed(proposals)}
        wanted = [first[masked] for masked, _ in named.most_common()]
        tasks = [make_task(passage, replace(task.mask), sampler, task.proposal) for task in wanted]
        valid = [task for task in tasks if not task.mask.invalid]  # a long prompt of the other model may not fit
        run = Run(settings, ranks, None, sampler, None, None, None)
        predict(run, valid, 0)
        reward(run, METHODS["active"], [valid], valid, 0)
        predicted.append(tasks)
        del sampler, run
        gc.collect()  # Liger makes reference cycles that del leaves in memory
    if not predicted[0]:
        say("\nNo mask is valid, so there is nothing to predict.")
    for number, tasks in enumerate(zip(*predicted, strict=True), 1):
        mask = tasks[0].mask
        label = f" ({mask.label})" if mask.label else ""
        say(f"\nMASK {number}: {plain(mask.target)}{label}, named {named[mask.masked]} x\n{wrapped(mask.masked)}")
        say(wrapped(f"{next(iter(models))} wrote: {tasks[0].proposal.text}", 2, THOUGHT_CHARS))
        for name, task in zip(models, tasks, strict=True):
            if task.mask.invalid:
                say(f"  {name}: {task.mask.invalid.replace('_', ' ')}")
                continue
            right, size = sum(task.correct), len(task.correct)
            say(f"  {name}: {right} of {size} right; the mask earns {task.proposal_reward:.3f}")
            responses = Counter(zip((response.text for response in task.predictions), task.correct, strict=True))
            for (text, correct), count in responses.most_common(RESPONSES_SHOWN):
                say(wrapped(f"{count} x {'right' if correct else 'WRONG'}: {describe_answer(text)}", 4))
                if thought := split_response(text, "boxed")["t"]:
                    say(wrapped(thought, 8, THOUGHT_CHARS))
            if len(responses) > RESPONSES_SHOWN:
                say(f"    and {len(responses) - RESPONSES_SHOWN} other responses")
    return predicted


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        raise SystemExit(0 if arguments else 2)
    try:
        if arguments[0] == "explain":
            explain(read_config(arguments[1:]), start_ranks())
        else:
            models, source, config = read_arguments(arguments)
            play(read_passage(source, config, load_tokenizer(config)), models, config, start_ranks())
    except (ConfigError, DataError, OSError) as error:  # a missing model raises an OSError of several lines
        print(f"play error: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None
    dist.destroy_process_group()
