"""Try a model on one passage: eight masks, each with predictions, thoughts and verdicts.

    python -m play CHECKPOINT [BASE]                     paste a paragraph, end it with Ctrl-D
    python -m play CHECKPOINT [BASE] passage="Text ..."  or file=paragraph.txt
    python -m play CHECKPOINT [BASE] number=3            the fourth held-out passage of the config's corpus
    python -m play explain configs/tiny.yaml             one training step in slow motion (play/explain.py)

CHECKPOINT: a run directory, one of its checkpoints, a folder made by save_pretrained, or a hub name. Prompts and limits
come from config=FILE, else from the run that the checkpoint belongs to, else from the defaults; any key=value of
config.py changes them (`seed=1` for other draws). With BASE both models choose masks, and both answer the first one's.
The masks and the verdicts are train.py's own. Nothing is trained and nothing is written.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import textwrap
from collections import Counter
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch.distributed as dist

from config import Config, ConfigError, read_config
from data import RESERVED, DataError, Passage, build_index, load_corpus
from methods import Task, make_task
from model import load_replica, load_tokenizer
from play.explain import COLUMNS, explain, plain, wrapped
from ranks import Ranks, start_ranks
from report.page import parts
from rollout import Sampler, make_sampler, mask_prompt
from train import grade, predict, propose

MASKS, SHOWN, THOUGHT_CHARS = 8, 4, 300
OWN_KEYS = ("passage", "file", "number", "config")


def read_words(words: list[str]) -> tuple[dict[str, str], dict[str, str], Config]:
    """Command-line words -> (folder of each model by its name, play's own keys, the Config for the first model).

    Raises ConfigError.
    """
    models = [word for word in words if "=" not in word]
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    own = {key: keys.pop(key) for key in OWN_KEYS if key in keys}
    if not 1 <= len(models) <= 2:
        raise ConfigError(f"{len(models)} models given: expected CHECKPOINT or CHECKPOINT BASE")
    if len(own.keys() - {"config"}) > 1:
        raise ConfigError(f"{' and '.join(sorted(own.keys() - {'config'}))}: only one of them")
    if not own.get("number", "0").isdecimal():
        raise ConfigError(f"number={own['number']!r}: must be a whole number from 0, a held-out passage of the corpus")
    names = [Path(model).name for model in models]
    names = names if len(set(names)) == len(names) else models
    folders = {name: model_folder(model) for name, model in zip(names, models, strict=True)}
    first = folders[names[0]]
    file = own.get("config") or run_config(Path(first))
    overrides = {"method": "active", "reward": "exact", "masks_per_passage": MASKS, "model": first}
    if "number" not in own:
        overrides["data"] = Config.data  # not read: a run's data need not be on this machine
    words = [f"{key}={value}" for key, value in (overrides | keys).items()]
    return folders, own, read_config([str(file), *words] if file else words)


def model_folder(name: str) -> str:
    """Where from_pretrained finds the model; a name that is no folder is left to the hub."""
    if not Path(name).is_dir():
        return name
    for place in (".", "hf", "checkpoints/latest/hf"):
        if (Path(name) / place / "config.json").exists():
            return str(Path(name) / place)
    raise ConfigError(
        f"{name}: neither a model folder nor a run with a checkpoint (no config.json, hf/ or checkpoints/)"
    )


def run_config(folder: Path) -> Path | None:
    """config.yaml of the run whose checkpoints/ the folder lies in."""
    for parent in folder.absolute().parents:
        if parent.name == "checkpoints" and (parent.parent / "config.yaml").is_file():
            return parent.parent / "config.yaml"
    return None


def read_passage(own: dict[str, str], config: Config, tokenizer) -> Passage:
    """What the user names, or pastes. Raises ConfigError for a text that no prompt could hold."""
    if "number" in own:
        with tempfile.TemporaryDirectory() as folder:
            build_index(config, tokenizer, Path(folder), log=lambda line: None)
            heldout = load_corpus(Path(folder), config).heldout
        if int(own["number"]) >= len(heldout):
            raise ConfigError(f"number={own['number']}: must be below {len(heldout)}, the held-out passages")
        return heldout[int(own["number"])]
    title = "your passage"
    if "passage" in own:
        text = own["passage"]
    elif "file" in own:
        try:
            title, text = own["file"], Path(own["file"]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"file={own['file']!r}: cannot be read ({type(error).__name__})") from None
    else:
        if sys.stdin.isatty():
            print("Paste a paragraph, then press Ctrl-D on an empty line:", flush=True)
        text = sys.stdin.read()
    text = text.strip()
    marks = [mark for mark in (*RESERVED, *tokenizer.all_special_tokens) if mark in text]
    if not text or marks:
        raise ConfigError("the passage " + (f"contains {marks[0]!r}, a mark of the prompts" if text else "is empty"))
    return Passage("0#0", title, "", text)


def load(model: str, config: Config, ranks: Ranks) -> Sampler:
    config = replace(config, model=model)
    return make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks)


def choose_masks(passage: Passage, sampler: Sampler) -> list[Task]:
    """The generator's masks, valid or not. Raises ConfigError where the passage is too long for the prompt."""
    config, length = sampler.config, len(mask_prompt(sampler, passage.text))
    if length > config.max_prompt_tokens:
        raise ConfigError(
            f"max_prompt_tokens={config.max_prompt_tokens}: this passage makes a prompt of {length} tokens"
        )
    return propose([passage], sampler, config, 0)[0]


def answer(tasks: list[Task], sampler: Sampler) -> None:
    """Predictions and their verdicts, by training's own rules."""
    predict(tasks, sampler, sampler.config, 0)
    for task in tasks:
        task.rewards = [grade(task, response, sampler.config) for response in task.predictions]


def different(tasks: list[Task]) -> list[Task]:
    """The valid masks, each once, most often named first."""
    counts = Counter(task.mask.masked for task in tasks if not task.mask.invalid)
    first = {task.mask.masked: task for task in reversed(tasks) if not task.mask.invalid}
    return [first[masked] for masked, _ in counts.most_common()]


def play(passage: Passage, models: dict[str, str], config: Config, ranks: Ranks, say=print) -> list[list[Task]]:
    """Tells what the models (name: folder) do with the passage; returns per model the first one's masks, answered."""
    names = list(models)
    say(f"{plain(passage.title)} {plain(passage.url)}\n{wrapped(passage.text)}\n")
    answered: list[list[Task]] = []
    proposals: list[Task] = []
    for name, model in models.items():  # one after the other: they need not fit into memory together
        sampler = load(model, config, ranks)
        chosen = choose_masks(passage, sampler)
        proposals = proposals or chosen
        say(f"{name} chose, {len(chosen)} times over:")
        seen = Counter((task.mask.words, task.mask.invalid) for task in chosen)
        for (words, invalid), count in seen.most_common():
            cause = f" (invalid: {invalid.replace('_', ' ')})" if invalid else ""
            say(wrapped(f"{count} x {words or 'nothing'}{cause}", 4))
        tasks = [make_task(passage, replace(task.mask), sampler, task.proposal) for task in different(proposals)]
        answer([task for task in tasks if not task.mask.invalid], sampler)
        answered.append(tasks)
        del sampler
        gc.collect()  # Liger ties methods to modules in circles, which del alone leaves in memory
    if not answered[0]:
        say("\nNo mask is valid, so there is nothing to predict.")
    for number, tasks in enumerate(zip(*answered, strict=True), 1):
        mask, proposal = tasks[0].mask, tasks[0].proposal
        count = sum(one.mask.masked == mask.masked for one in proposals)
        label = f" ({mask.label})" if mask.label else ""
        say(f"\nMASK {number}: {plain(mask.target)}{label}, named {count} x\n{wrapped(mask.masked)}")
        say(wrapped(f"{names[0]} wrote: {proposal.text}", 2, THOUGHT_CHARS))
        for line in beside([verdicts(name, task, config) for name, task in zip(names, tasks, strict=True)]):
            say(line)
    return answered


def verdicts(name: str, task: Task, config: Config) -> list[str]:
    """The predictions of one model: how many are right, what the mask would earn, the most frequent answers."""
    if task.mask.invalid:
        return [f"{name}: {task.mask.invalid.replace('_', ' ')}"]
    right = sum(one > 0 for one in task.rewards)
    earned = task.proposal_reward(config.generator_reward)
    lines = [f"{name}: {right} of {len(task.rewards)} right; the mask earns {earned:.3f}"]
    said = Counter(zip((one.text for one in task.predictions), task.rewards, strict=True))
    for (text, reward), count in said.most_common(SHOWN):
        found, thought = parts(text, "boxed")["a"], plain(parts(text, "boxed")["t"])
        shown = "no answer" if found is None else plain(found) or "(empty)"
        lines.append(f"  {count} x {'right' if reward > 0 else 'WRONG'}: {shown}")
        if len(thought) > THOUGHT_CHARS:
            thought = f"{thought[:THOUGHT_CHARS]} [...]"
        lines += [f"      {thought}"] if thought else []
    if len(said) > SHOWN:
        lines.append(f"  and {len(said) - SHOWN} other responses")
    return lines


def beside(blocks: list[list[str]]) -> list[str]:
    """Columns of equal width, together COLUMNS wide; long lines wrapped under their own indent."""
    width = (COLUMNS - 2) // len(blocks) - 2
    columns = []
    for block in blocks:
        column = []
        for line in block:
            indent = " " * (len(line) - len(line.lstrip()))
            column += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)
        columns.append(column)
    rows = zip_longest(*columns, fillvalue="")
    return ["  " + "  ".join(cell.ljust(width) for cell in row).rstrip() for row in rows]


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        raise SystemExit(0 if words else 2)
    try:
        if words[0] == "explain":
            config = read_config(words[1:])
            explain(config, start_ranks())
        else:
            models, own, config = read_words(words)
            play(read_passage(own, config, load_tokenizer(config)), models, config, start_ranks())
    except (ConfigError, DataError, OSError) as error:  # OSError: a model that is not there, several lines long
        print(f"play error: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
