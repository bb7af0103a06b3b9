"""Checkpoints: exact state to continue a run, and a Hugging Face folder with its model card to use the model.

    checkpoints/step_000100/state/            masters and optimizer, sharded, by torch.distributed.checkpoint
    checkpoints/step_000100/hf/               the replica and its model card: from_pretrained, lm-eval, vLLM load it
    checkpoints/step_000100/checkpoint.json   step, seed, world size, config, and all files with their sizes
    checkpoints/latest                        a link to the newest complete one

Data order, learning rate and noise are functions of (seed, step), so the step is all else that a run must remember.
On a CPU with as many ranks a resumed run equals an unbroken one bit for bit; on GPUs flash-attn's backward and the
sampler's scheduling are not repeatable, and with another number of ranks the noise is other noise.

A run that is killed loses the steps after its newest complete checkpoint and makes them again; their rows in
metrics.jsonl and samples.jsonl are dropped at the resume (train.py). After a signal to stop the last finished step is
saved first. Training waits only until everything is copied; threads write the copy beside its place and rename it when
it is whole; `latest` moves last. A save that fails is told at once, and the run goes on: the next may succeed.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from transformers import GenerationConfig

from config import Config, ConfigError, dump_config
from methods import THINK_OPEN, THOUGHT_PROMPT
from metrics import read_rows, unwritten, write_whole
from model import Lender, at_hand, make_lender, to_sampler
from prompts import PREDICT_PROMPT, QUESTION_PROMPT
from rollout import Sampler

DATA_LICENCES = {
    "wikimedia/wikipedia": "CC BY-SA, the licence of Wikipedia's text",
    "openai/gsm8k": "MIT, says its card",
    "HuggingFaceTB/finemath": "ODC-By, says its card",
    "assets/tiny_wiki.jsonl.gz": "MIT, made up by miniature/base.py of the code's repository",
    "assets/tiny_questions.jsonl": "MIT, made up for the code's repository",
}
"""Of the data that the shipped configs name."""
METHODS = {
    "active": "the model chose words to mask in raw text, recovered them by chain of thought, and was trained on both "
    "by GRPO. A prediction earned 1 for an exact match; a mask 1 - accuracy of its predictions, 0 if none was right",
    "random_span": "spans drawn by SpanBERT's law were masked; the model recovered them by chain of thought and was "
    "trained by GRPO on exact matches",
    "random_token": "texts were cut at random tokens; the model found the next one by chain of thought and was trained "
    "by GRPO",
    "entropy_token": "texts were cut where the start model was least sure of the next token; the model found it by "
    "chain of thought and was trained by GRPO",
    "rlvr": "questions with known answers, checked by math-verify; GRPO",
    "rlp": "thoughts before a random position of a text, rewarded by the information that they gave about the next "
    "token (RLP, [arXiv:2510.01265](https://arxiv.org/abs/2510.01265))",
    "sft": "masked words as a question, answered without a thought; cross-entropy on the answers",
    "cpt": "plain next-token loss on the same text (continued pretraining)",
}
EXAMPLES = {"rlvr": "What is 7 times 8?", "rlp": "The Rhine rises in the Alps and", "cpt": "The Rhine rises in the"}
MASKED_EXAMPLE = "The [mask] rises in the Alps and flows into the North Sea at Rotterdam."


def write_card(folder: Path, sampler: Sampler, step: int) -> None:
    """Adds both files to the exported model in `folder`. For rank 0; raises what goes wrong."""
    how = generation_config(sampler)
    how.validate(strict=True)
    text = model_card(sampler, step)
    write_whole(folder / "generation_config.json", how.to_json_string(use_diff=True))
    write_whole(folder / "README.md", text)


def generation_config(sampler: Sampler) -> GenerationConfig:
    """`generate` then samples from what the run sampled from: its temperature, no top-k, no top-p, its ends.

    Not said: the longest response. vLLM would hold every request to it, and lm-eval's own limit would be overruled.
    """
    eos = sorted(sampler.eos_ids)
    pad = sampler.tokenizer.pad_token_id
    if pad is None:
        pad = getattr(sampler.replica.config, "pad_token_id", None)
    return GenerationConfig(
        do_sample=True, temperature=sampler.config.temperature, top_k=0, top_p=1.0, eos_token_id=eos,
        bos_token_id=sampler.tokenizer.bos_token_id, pad_token_id=eos[0] if pad is None else pad,
    )  # fmt: skip


def model_card(sampler: Sampler, step: int) -> str:
    """The text of README.md after `step` updates: YAML front matter, then what a reader asks, in that order."""
    config, run = sampler.config, Path(sampler.config.run_dir)
    base, licence = known_base(config.model)
    front = {
        "base_model": base.get("base_model"),
        **licence,
        "datasets": None if Path(config.data).expanduser().exists() else [config.data],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pretrainzero", "reinforcement-learning", "grpo", config.method.replace("_", "-"), "arxiv:2512.03442"],
    }
    front = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    name = run.resolve().name
    return f"""---
{front}---

# {name}, step {step}

A causal language model after {step} steps of `{config.method}`, made with an independent implementation of PretrainZero
([arXiv:2512.03442](https://arxiv.org/abs/2512.03442)): {METHODS[config.method]}.

{table(("", ""), facts(config, sampler, step, licence, base))}

## Held-out numbers

{probe_table(run, step)}

One run, one seed. Masks and passages of the probe are fixed and held out of training. `greedy`: one answer to a mask,
else the mean of {config.probe_samples} sampled ones; `no_thought`: the answer opens at once. Nothing else was measured.

## How it was made

{history(run)}

<details><summary>The resolved config</summary>

{fenced(dump_config(config), "yaml")}
</details>

## Load it

{fenced(load_example(sampler), "python")}
`generation_config.json` has the temperature and the ends of the run; set `max_new_tokens` yourself.

## Serve, score, upload it

In this folder; `text` from above goes to `/v1/completions`:

{fenced(commands(name, config), "")}
## Limits

{limits(sampler)}
"""


def facts(config: Config, sampler: Sampler, step: int, licence: dict, base: dict) -> list[tuple[str, str]]:
    """The card's first table: (what, value)."""
    origin, method = base.get("base_model", config.model), code(config.method)
    if config.warmup_method and config.warmup_method_steps:
        method += f", the first {config.warmup_method_steps} steps {code(config.warmup_method)}"
    method += "" if config.train_generator else ", generator not trained"
    method += ", REWARDS SHUFFLED (a control)" if config.shuffle_rewards else ""
    count = f"{config.passages_per_step} passages"
    if config.method in ("active", "rlvr", "rlp"):  # the other rules draw as many masks as spend active's responses
        count += f" x {config.masks_per_passage} masks" if config.method == "active" else ""
        count += f" x {config.predictions_per_mask} predictions"
    terms = " ".join(map(code, licence.values())) + ", says its card" if licence else "see the base model"
    part = config.data_config if not Path(config.data).expanduser().is_file() else ""
    return [
        ("base model", code(config.model) + (f", made from {code(origin)}" if origin != config.model else "")),
        ("licence of the base model", terms),
        ("data", code(config.data) + (f", {code(part)}" if part else "")),
        ("licence of the data", DATA_LICENCES.get(config.data, "see the data")),
        ("method", method),
        ("steps", f"{step} of {config.steps}, each of {count}"),
        ("seed", str(config.seed)),
        ("parameters", f"{sampler.replica.num_parameters():,}, {config.dtype}"),
    ]


def known_base(model: str) -> tuple[dict, dict]:
    """What the base model's card says: (front matter, with `base_model` set; the keys of it that state a licence).

    A local folder's card, or that of a hub name where it is in the cache already; both empty where there is none.
    base_model must be a name of the hub: of a local folder it is what its own card says.
    """
    folder = Path(model).expanduser()
    cached = folder / "README.md" if folder.exists() else try_to_load_from_cache(model, "README.md")
    said = {}
    if isinstance(cached, str | Path) and Path(cached).is_file():
        try:
            said = ModelCard.load(Path(cached), ignore_metadata_errors=True).data.to_dict()
        except (ValueError, yaml.YAMLError):  # somebody else's card, broken: as good as none
            said = {}
    if not folder.exists():
        said["base_model"] = model
    return said, {key: said[key] for key in ("license", "license_name", "license_link") if said.get(key)}


def probe_table(run: Path, step: int) -> str:
    """Probe and benchmarks at the first and the latest step that has them, up to `step`."""
    told = [row for row in read_rows(run / "metrics.jsonl") if row["step"] <= step and "probe/accuracy" in row]
    if not told:
        return "The run directory has none."
    told = told[:1] + told[1:][-1:]
    keys = sorted(key for key in told[-1] if key.startswith(("probe/", "eval/")) and told[-1][key] is not None)
    rows = [(code(key), *(f"{row.get(key, float('nan')):.3f}" for row in told)) for key in keys]
    return table(("", *(f"step {row['step']}" for row in told)), rows)


def history(run: Path) -> str:
    """Command and revision of every start of the run, from its environment.txt. Of absolute paths that stand alone (the
    script, the config file) only the names: values of keys are the config's own."""
    path = run / "environment.txt"
    blocks = path.read_text(encoding="utf-8").strip().split("\n\n") if path.exists() else []
    starts = []
    for block in blocks:
        said = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        words = [re.sub("^/.*/", "", word) for word in said.get("command", "").split(" ")]
        changes = "" if said.get("git changes") == "none" else ", with changes that were not committed"
        revision = "not recorded" if said.get("git", "none") == "none" else said["git"] + changes
        versions = ", ".join(f"{key} {said[key]}" for key in ("torch", "transformers") if key in said)
        ranks = f"{said.get('world size', '?')} x {said.get('device', '?')}"
        starts.append(fenced(f"{' '.join(words)}\n# git revision {revision}\n# {versions}; {ranks}", ""))
    return "\n".join(dict.fromkeys(starts)).rstrip() or "Command and revision were not recorded."


def load_example(sampler: Sampler) -> str:
    """Python that loads the folder and asks it what the run asked."""
    config, chat = sampler.config, sampler.tokenizer.chat_template
    prompts = {"rlvr": config.question_prompt or QUESTION_PROMPT, "rlp": config.rlp_prompt or THOUGHT_PROMPT}
    prompt = prompts.get(config.method, config.predict_prompt or PREDICT_PROMPT)
    prompt = "{passage}" if config.method == "cpt" else prompt
    lines = "\n".join(f"    {line!r}" for line in prompt.splitlines(keepends=True))
    chat = chat and config.method != "cpt"
    steps = [
        'turn = [{"role": "user", "content": text}]',
        "text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)",
    ] if chat else []  # fmt: skip
    steps += [f"text += {THINK_OPEN!r}"] if config.method == "rlp" else []
    whole = ", add_special_tokens=False" if chat else ""
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # or its name on the hub',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
            f"prompt = (\n{lines}\n)  # as in the run",
            f'text = prompt.replace("{{passage}}", {EXAMPLES.get(config.method, MASKED_EXAMPLE)!r})',
            *steps,
            f'inputs = tokenizer(text, return_tensors="pt"{whole})',
            f"output = model.generate(**inputs, max_new_tokens={config.max_prediction_tokens})",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def commands(name: str, config: Config) -> str:
    """vLLM, transformers' own server, lm-eval, the hub."""
    name = re.sub(r"[^\w.-]", "-", name)
    return f"""vllm serve . --served-model-name {name}
transformers serve .      # needs: pip install "transformers[serving]" accelerate
lm_eval --model hf --model_args pretrained=.,dtype={config.dtype} --tasks gsm8k --batch_size auto
hf upload OWNER/{name} . ."""


def limits(sampler: Sampler) -> str:
    """What it is not good for, and where it differs from the run."""
    config = sampler.config
    lines = [
        "It was trained to recover what texts say, right or wrong, and for nothing else: no instructions, no dialogue, "
        "no safety. What it writes may be false."
    ]
    if config.method == "rlp" or config.stop_at_answer:
        what = "thought" if config.method == "rlp" else "answer"
        lines.append(
            f"The run ended a response where its first {what} closed, `generate` goes on to the end of the sequence: "
            f"nothing after that {what} was ever rewarded."
        )
    if config.dtype != "float32":
        lines.append(f"The weights are the {config.dtype} copy that the run sampled from, not its float32 masters.")
    return "\n".join(f"- {line}" for line in lines)


# ------------------------------------------------------------------------------------------------------------ Markdown


def code(value: str | list[str]) -> str:
    """Inline code that no text breaks out of, a table's cell neither. A list, as cards may have, by commas.

    >>> code("apache-2.0"), code(["mit", "a|b"])
    ('`apache-2.0`', '`mit, a\\\\|b`')
    """
    text = value if isinstance(value, str) else ", ".join(map(str, value))
    text = " ".join(text.split()).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{text}{ticks}" if len(ticks) == 1 else f"{ticks} {text} {ticks}"


def fenced(text: str, language: str) -> str:
    """A block of code that no text ends early."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


MAY_DIFFER = "steps run_dir resume save_every keep_last probe_every samples_per_step rank_timeout".split()
"""Keys that a resumed run may change: how long, where, how often. `steps` moves a cosine's end, and the run says so."""
ENGINE = (
    "tokens_per_micro_batch gradient_checkpointing offload attention liger use_cuda_graph cache_memory max_requests"
).split()
"""Keys that another machine may need. Weights, optimizer and passages stay; rounding and samples may not."""


@dataclass
class Saver:
    """What every save needs, and the one that is being written."""

    policy: nn.Module
    optimizer: object
    sampler: Sampler
    average: nn.Module | None
    """The moving average of `rlp`, the only other copy with a history."""
    lender: Lender
    """Brings masters and moments to the GPU, should they be elsewhere."""
    group: dist.ProcessGroup
    """Of its own: the threads' collectives must not come between those of training."""
    stager: DefaultStager
    thread: ThreadPoolExecutor
    done: int = 0
    """Updates that the policy has had; train.py counts them."""
    row: dict | None = None
    """The metrics of step `done` while they lack the probe's: a run that stops there finishes them when it resumes."""
    pending: Future | None = None
    step: int = 0
    """Of the last save that was begun."""
    saved: bool = True
    """Whether the last save that was finished succeeded."""


def make_saver(
    policy: nn.Module, optimizer, sampler: Sampler, average: nn.Module | None = None, lender: Lender | None = None
) -> Saver:  # fmt: skip
    """Every rank calls it. Removes what killed saves have left."""
    lender = lender or make_lender(policy, optimizer, sampler.replica, sampler.config)
    config, cuda = sampler.config, sampler.ranks.device.type == "cuda"
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.rank_timeout))
    stager = DefaultStager(StagingOptions(cuda, False, False, cuda))  # pinned memory and its faster copies on a GPU
    for part in _folder(config).glob("*.part") if sampler.ranks.rank == 0 else ():
        part.unlink() if part.is_symlink() else shutil.rmtree(part)
    return Saver(policy, optimizer, sampler, average, lender, group, stager, ThreadPoolExecutor(1, "publish"))


def save_checkpoint(saver: Saver) -> None:
    """Copy the state after saver.done updates and begin to write it; every rank calls it. Waits for the save before."""
    finish_save(saver)
    config, ranks, replica = saver.sampler.config, saver.sampler.ranks, saver.sampler.replica
    part = _folder(config) / f"step_{saver.done:06d}.part"
    saver.optimizer.zero_grad(set_to_none=True)  # a step that was abandoned may have left some
    trained = bool(saver.optimizer.state)
    # What is staged is on the CPU. By default DCP would copy ahead on a GPU: on GPU 0, from a thread of every rank
    writer = dcp.FileSystemWriter(part / "state", per_thread_copy_ahead=0)
    options = {"storage_writer": writer, "process_group": saver.group, "async_stager": saver.stager}
    with at_hand(saver.lender):  # afterwards the replica is whole, too
        written = dcp.async_save(_state(saver, trained), **options)
    saver.step, saver.pending = saver.done, written
    if ranks.rank == 0:
        # The next refresh changes the replica in place. Its memo makes deepcopy put copies on the CPU, tied ones tied
        memo = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in replica.parameters()}
        facts = {"step": saver.done, "seed": config.seed, "world_size": ranks.world, "config": asdict(config)}
        facts |= {"optimizer": trained, "row": saver.row}
        rows_wait = unwritten()
        frozen = copy.deepcopy(replica, memo)
        saver.pending = saver.thread.submit(_publish, written, part, frozen, saver.sampler, facts, rows_wait)


def _publish(written: Future, part: Path, frozen, sampler: Sampler, facts: dict, rows_wait: list[Path]) -> None:
    """In a thread of rank 0: wait for the shards of all ranks, add the rest, and give the folder its name."""
    folder, final = part.parent, part.with_suffix("")
    try:
        written.result()
        if rows_wait:  # a run that resumes here would miss them
            raise OSError(f"{rows_wait[0]} could not be written")
        frozen.save_pretrained(part / "hf")
        sampler.tokenizer.save_pretrained(part / "hf")
        _describe(part / "hf", sampler, facts["step"])
        files = sorted(path for path in part.rglob("*") if path.is_file())
        facts["files"] = {str(path.relative_to(part)): path.stat().st_size for path in files}
        write_whole(part / "checkpoint.json", json.dumps(facts))
        rows = [folder.parent / name for name in ("metrics.jsonl", "samples.jsonl")]
        for path in (*files, part / "checkpoint.json", *filter(Path.exists, rows)):
            with path.open("rb") as file:  # on the disk, should the machine itself go down
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        link = folder / "latest.part"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, folder / "latest")
        if sampler.config.keep_last:
            # not those of a later step, which a rewound `latest` may have left: the one just saved must stay
            done = sorted(path for path in folder.glob("step_??????") if path.name <= final.name)
            for old in done[: -sampler.config.keep_last]:
                shutil.rmtree(old)
    except (Exception, CheckpointException) as error:
        what = f"WARNING: THE CHECKPOINT OF STEP {facts['step']} WAS NOT SAVED ({_cause(error)})"
        print(f"{what}; the next save tries again", file=sys.stderr, flush=True)
        raise


def _describe(folder: Path, sampler: Sampler, step: int) -> None:
    """Add the model card. Whatever goes wrong in it, the checkpoint is not lost for it."""
    try:
        write_card(folder, sampler, step)
    except Exception as error:
        print(f"WARNING: no model card in the checkpoint of step {step} ({_cause(error)})", file=sys.stderr, flush=True)
        for half in folder.glob("*.part"):
            half.unlink()


def finish_save(saver: Saver) -> bool:
    """Wait for the save that is being written; every rank calls it. Whether the last save succeeded, on all ranks."""
    if saver.pending is not None:
        failed = False
        try:
            saver.pending.result()
        except (Exception, CheckpointException):  # rank 0 has said which
            failed = True
        parts = [None] * saver.sampler.ranks.world
        dist.all_gather_object(parts, failed)  # not model.gather: it may be a signal to stop that wants this save
        saver.pending, saver.saved = None, not any(parts)
        if not saver.saved and saver.sampler.ranks.rank == 0:
            shutil.rmtree(_folder(saver.sampler.config) / f"step_{saver.step:06d}.part", ignore_errors=True)
    return saver.saved


def _cause(error: BaseException) -> str:
    """The failures of all ranks in one line."""
    if not isinstance(error, CheckpointException):
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "; ".join(f"rank {rank}: {_cause(one)}" for rank, (one, _) in sorted(error.failures.items()))


def _folder(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def find_checkpoint(config: Config, say=print) -> tuple[Path, dict] | None:
    """(folder, what its checkpoint.json says) of the newest whole checkpoint up to `latest`, or None. For one rank.

    A damaged one is told, and passed over for the one before. Raises ConfigError if there are only damaged ones: the
    run would begin again and forget its rows.
    """
    folder, found = _folder(config), []
    if config.resume == "auto":
        found = sorted(folder.glob("step_??????"), reverse=True)
    if (folder / "latest").is_symlink():  # where a user, or a kill before it could move, has left it
        found = [path for path in found if path.name <= os.readlink(folder / "latest")]
    for path in found:
        problem = damage(path)
        if not problem:
            return path, json.loads((path / "checkpoint.json").read_text())
        say(f"WARNING: {path} is damaged ({problem}); going back to the one before")
    if found:
        raise ConfigError(f"resume='auto': every checkpoint in {folder} is damaged; resume=never starts afresh")
    return None


def damage(path: Path) -> str:
    """What of a checkpoint is missing or cut short, by the sizes in its checkpoint.json; empty: nothing."""
    try:
        files = json.loads((path / "checkpoint.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"checkpoint.json: {type(error).__name__}"
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != size:
            return f"{name} has {found} bytes of {size}"
    return ""


def check_same_run(facts: dict, config: Config) -> None:
    """Raises ConfigError, one line, if a key differs that makes it another run: MAY_DIFFER and ENGINE may."""
    now = asdict(config)
    kept = {key: value for key, value in facts["config"].items() if key not in (*MAY_DIFFER, *ENGINE)}
    other = [f"{key}={now[key]!r} (saved: {old!r})" for key, old in kept.items() if key in now and now[key] != old]
    if other:
        raise ConfigError(
            f"{', '.join(other)}: the run in {config.run_dir} cannot be continued with another value; "
            "resume=never starts afresh and moves it aside"
        )


def resume_notes(facts: dict, config: Config, world: int) -> list[str]:
    """What an unbroken run would have had otherwise, a line each."""
    saved, notes = facts["config"], []
    if facts["world_size"] != world:
        notes.append(
            f"saved by {facts['world_size']} ranks, resumed by {world}: the same weights, optimizer and passages, "
            "other samples, since noise is drawn per rank"
        )
    changed = [f"{key}={getattr(config, key)!r} (was {saved[key]!r})" for key in ENGINE
               if key in saved and saved[key] != getattr(config, key)]  # fmt: skip
    if changed:
        notes.append(f"{', '.join(changed)}: the same run up to rounding and what that changes in the samples")
    if saved["steps"] != config.steps and config.lr_schedule == "cosine":
        notes.append(
            f"steps={config.steps} (was {saved['steps']}): from here on the cosine ends at the new last step, "
            "so the learning rate is not that of either run from its start"
        )
    return notes


def _state(saver: Saver, trained: bool) -> dict:
    """Masters, and the optimizer unless no update was made yet: asked for its state, it would make a step up."""
    if trained:
        model, optimizer = get_state_dict(saver.policy, saver.optimizer)
        state = {"model": model, "optimizer": optimizer}
    else:
        state = {"model": get_model_state_dict(saver.policy)}
    return state if saver.average is None else state | {"average": get_model_state_dict(saver.average)}


def load_checkpoint(saver: Saver, path: Path, facts: dict) -> None:
    """Restore masters, optimizer, average and replica; every rank calls it. There may be more or fewer than saved it.

    Raises RuntimeError if a file has the right size and the wrong content.
    """
    with at_hand(saver.lender):
        state = _state(saver, facts["optimizer"])
        try:
            dcp.load(state, checkpoint_id=str(path / "state"), process_group=saver.group)
        except CheckpointException as error:  # no Exception, and a traceback per rank
            raise RuntimeError(f"{path} cannot be loaded: {_cause(error)}") from None
        set_model_state_dict(saver.policy, state["model"])
        if facts["optimizer"]:
            set_state_dict(
                saver.policy, saver.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        if saver.average is not None:
            set_model_state_dict(saver.average, state["average"])
    to_sampler(saver.lender)
    saver.done = saver.step = facts["step"]
    saver.row = facts["row"]


def settle(path: Path, facts: dict) -> None:
    """The row that the checkpoint had waiting is complete and on disk. For rank 0."""
    write_whole(path / "checkpoint.json", json.dumps(facts | {"row": None}))
