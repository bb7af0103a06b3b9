"""Try a model on one passage: its masks, each with predictions, thoughts and verdicts.

    python -m play CHECKPOINT [BASE]                     paste a paragraph, end it with Ctrl-D
    python -m play CHECKPOINT [BASE] passage="Text ..."  or file=paragraph.txt
    python -m play CHECKPOINT [BASE] number=3            the fourth held-out passage of the config's corpus
    python -m play explain configs/tiny.yaml             one training step in slow motion

CHECKPOINT: a run directory, one of its checkpoints, a folder made by save_pretrained, or a hub name. Settings come from
config=FILE, else from the checkpoint's run, else from the defaults; key=value changes them. With BASE both models
choose masks, and both predict the masks of the first. Nothing is trained or written.
"""

import gc
import math
import random
import sys
import tempfile
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.distributed as dist

from bench.memory import decide_checkpointing
from checkpoint import exported_model
from config import Config, ConfigError, read_config
from data import Passage, build_index, load_corpus
from grpo import Sample, clipped_loss, group_advantages, keep_group, make_optimizer, pack_samples
from methods import METHODS, Run, Task, make_task, named_masks, predict, reward
from model import build_policy, build_reference, load_replica, load_tokenizer
from prompts import last_answer
from ranks import Ranks, start_ranks
from report.page import split_response
from rollout import Rollout, Sampler, check_prompts, derive_seed, make_sampler, mask_prompt
from text.files import RESERVED, DataError
from train import step

MASKS, RESPONSES_SHOWN, THOUGHT_CHARS, TERMINAL_WIDTH = 8, 4, 300, 100


def plain(text: str) -> str:
    """Text on one line, without the escape sequences that a model may write to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def wrapped(text: str, indent: int = 2, most: int = 0) -> str:
    """Plain text in lines of TERMINAL_WIDTH; most > 0 leaves out the middle of a longer text."""
    text = plain(text)
    if most and len(text) > most:
        text = f"{text[: most // 2]} [...] {text[-most // 2 :]}"
    lines = textwrap.wrap(text, TERMINAL_WIDTH - indent, break_on_hyphens=False) or [""]
    return "\n".join(" " * indent + line for line in lines)


def describe_answer(text: str) -> str:
    """The answer in a response, for a terminal."""
    answer = last_answer(text, "boxed")
    return "no answer" if answer is None else plain(answer) or "(empty)"


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


# ---- one training step in slow motion
@torch.no_grad()
def hand_logprobs(replica, response: Rollout, temperature: float) -> list[float]:
    """Log-prob of each completion token from the model's ordinary logits, with one sequence and no packing."""
    ids = torch.tensor([response.prompt_ids + response.completion_ids], device=replica.device)
    attention, replica.config._attn_implementation = replica.config._attn_implementation, "eager"
    logits = replica(input_ids=ids, use_cache=False).logits[0, len(response.prompt_ids) - 1 : -1].float()
    replica.config._attn_implementation = attention
    rows = (logits / temperature).log_softmax(-1)
    return [rows[n, token].item() for n, token in enumerate(response.completion_ids)]


@torch.no_grad()
def trainer_logprobs(policy, sample: Sample, sampler: Sampler) -> torch.Tensor:
    """Log-prob of each completion token as the update computes it."""
    batch, temperature = pack_samples([[sample]], sampler.ranks.device), sampler.config.temperature
    return policy(predicts=batch.predicts, targets=batch.targets, temperature=temperature, **batch.inputs)[0]


def choose_mask(proposals: list[list[Task]]) -> tuple[list[Task], Task]:
    """The tasks of a passage and the one to follow: unequal rewards first, then a balance of right and wrong, then the
    harder. Raises ConfigError if no mask has both right and wrong answers."""
    ranked = []
    for tasks in proposals:
        unequal = len({task.proposal_reward for task in tasks}) > 1
        shares = [(fmean(task.correct), task) for task in tasks if len(set(task.correct)) > 1]
        ranked += [((unequal, -abs(share - 0.5), -share), tasks, task) for share, task in shares]
    if not ranked:
        raise ConfigError("seed: in this step every mask was solved by all or by none, nothing to learn; try another")
    return max(ranked, key=lambda item: item[0])[1:]


def explain(config: Config, ranks: Ranks, say=print) -> dict:
    """Runs step 1 of `method=active` on one process, and follows one mask to the end. Prints and returns the code's
    numbers beside the same numbers in plain arithmetic: {name: (by hand, in the code)}."""
    required = {"method": "active", "kl": 0.0, "shuffle_rewards": False, "mask_truncated": False}
    for key, value in (required | {"train_generator": True}).items():
        if getattr(config, key) != value:
            raise ConfigError(f"{key}={getattr(config, key)!r}: must be {value!r} to be explained")

    # ---- step 1 of train.py; `start` and `before` are the plain model and the trainer's as before the step
    tokenizer = load_tokenizer(config)
    with tempfile.TemporaryDirectory() as folder:
        build_index(config, tokenizer, Path(folder), log=lambda line: None)
        corpus = load_corpus(Path(folder), config)
    replica, start = load_replica(config, ranks), load_replica(config, ranks)
    policy = build_policy(replica, decide_checkpointing(replica.config, config, ranks), ranks)
    sampler = make_sampler(replica, tokenizer, config, ranks)
    check_prompts(sampler)
    run = Run(config, ranks, corpus, sampler, policy, None, make_optimizer(policy, config))
    before = build_reference(start, config, ranks)
    done = step(run, 0)
    tasks, task = choose_mask(done.proposals)
    passage, decode = task.passage, tokenizer.decode

    # ---- the passage, both prompts, the masks, and the predictions with their verdicts
    say(f"1. PASSAGE  {plain(passage.title)} {plain(passage.url)}\n{wrapped(passage.text)}")
    say(f"\n2. PROPOSE  the generator reads this, {len(tasks)} times over")
    say(wrapped(decode(mask_prompt(sampler, passage.text)), most=600) + "\n")
    for number, proposed in enumerate(tasks, 1):
        mask = proposed.mask
        state = f"INVALID: {mask.invalid}" if mask.invalid else f"valid, occurs {mask.occurrences} x"
        state += f", {mask.label}" if mask.label else ""
        followed = "  <- followed from here on" if proposed is task else ""
        say(f"   mask {number}: {plain(mask.words) or '(none)'}   [{state}]{followed}")
        say(wrapped(f"it wrote: {proposed.proposal.text}", 11, 300))
    say(f"\n   The passage with the words of that mask hidden:\n{wrapped(task.mask.masked)}")
    say(f"\n3. PREDICT  the predictor reads this, {len(task.predictions)} times over")
    say(f"{wrapped(decode(task.prompt_ids), most=600)}\n")
    verdicts = zip(task.predictions, task.correct, task.rewards, strict=True)
    for number, (response, correct, earned) in enumerate(verdicts, 1):
        say(f"   {number}: {'right' if correct else 'wrong'}, reward {earned:g}: {describe_answer(response.text)}")
        say(wrapped(f"it wrote: {response.text}", 6, 300))

    # ---- rewards of both roles, and the advantages in the groups of this mask and of this passage
    share = sum(task.correct) / len(task.correct)
    by_hand = share * (1 - share) if config.generator_reward == "variance" else 1 - share
    pairs: dict = {"mask reward": (by_hand, task.proposal_reward)}
    say(f"\n4. REWARD  {sum(task.correct)} of {len(task.correct)} are right: accuracy {share:.4f}")
    say(f"   The mask earns {by_hand:.4f} by hand, {task.proposal_reward:.4f} in the code: {config.generator_reward},")
    say("   and 0 where none is right or the mask is invalid.")
    followed = {"predictions of this mask": task.predictions[0], "masks of this passage": tasks[0].proposal}
    for name, response in followed.items():
        group = next(group for group in done.groups if group.rollouts[0] is response)
        mean, std = sum(group.rewards) / len(group.rewards), stdev(group.rewards)  # the latter with n - 1
        rule = "(reward - mean) / (std + 1e-6)" if config.advantage_std else "reward - mean"
        say(f"\n   Group: the {len(group.rewards)} {name}. mean {mean:.4f}, std {std:.4f}")
        say(f"   advantage = {rule}\n      reward   by hand  the code")
        for n, (earned, code) in enumerate(zip(group.rewards, group_advantages(group.rewards, config), strict=True)):
            hand = (earned - mean) / (std + 1e-6 if config.advantage_std else 1)
            say(f"   {earned:9.4f} {hand:9.4f} {code:9.4f}")
            pairs[f"advantage {group.role} {n}"] = (hand, code)
        if not keep_group(group):
            say("   All earned the same: the group is dropped.")

    # ---- the weight of a token, its log-prob in three ways, and its loss
    responses = {id(response) for response in task.predictions}
    sample = next(s for s in done.samples if id(s.rollout) in responses and s.advantage > 0)
    response, length = sample.rollout, len(sample.rollout.completion_ids)
    kept = [group for group in done.groups if keep_group(group)]
    lengths = [len(rollout.completion_ids) for group in kept for rollout in group.rollouts]
    per_token = config.loss_mean == "token"
    weight = 1 / sum(lengths) if per_token else 1 / (len(lengths) * length)
    rule = "1 / all kept tokens" if per_token else "1 / (kept responses x tokens of this response)"
    say(f"\n5. WEIGHTS  {len(kept)} groups are kept: {len(lengths)} responses, {sum(lengths)} tokens.")
    say(f"   Each token of ours weighs {rule}\n   = {weight:.8f} by hand, {sample.weight:.8f} in the code.")
    place = min(range(length), key=lambda n: response.sampler_logprobs[n])  # the least expected token shows most
    hand, sampled = hand_logprobs(start, response, config.temperature)[place], response.sampler_logprobs[place]
    old_logprobs = trainer_logprobs(before, sample, sampler)
    code = old_logprobs[place].item()
    correction = min(math.exp(code - sampled), config.max_importance)
    by_hand = -weight * correction * sample.advantage
    batch, logprobs = pack_samples([[sample]], ranks.device), old_logprobs.clone().requires_grad_()
    batch.weights *= torch.arange(len(batch.weights), device=ranks.device) == place
    loss, _ = clipped_loss(logprobs, old_logprobs, batch, config)
    slope = torch.autograd.grad(loss, logprobs)[0][place].item()
    token = sampler.piece(response.completion_ids[place])
    say(f"\n6. ONE TOKEN  {token!r}, number {place + 1} of {length} in: {plain(response.text)[:60]}")
    say(f"   log p  {hand:.6f} from the plain model's logits, {code:.6f} in the trainer,")
    say(f"          {sampled:.6f} when sampled")
    say("   ratio  exp(log p - old log p) = 1: the first update of a batch, so the clip does nothing")
    say(f"   c      min(exp(trainer - sampler), {config.max_importance:g}) = {correction:.6f}")
    say(f"   loss   - weight x c x ratio x advantage = -{weight:.8f} x {correction:.6f} x 1 x {sample.advantage:.4f}")
    say(f"          = {by_hand:.10f} by hand, {loss.item():.10f} in the code")
    say(f"   slope  d loss / d log p = {by_hand:.10f} by hand, {slope:.10f} in the code: up with this log p")
    pairs |= {"weight": (weight, sample.weight), "log p": (hand, code)}
    pairs |= {"loss": (by_hand, loss.item()), "slope": (by_hand, slope)}

    # ---- the update on the whole batch, and how it changes the log-probs of this mask's responses
    row, samples, ours = done.row, done.samples, [Sample(response, 0.0) for response in task.predictions]
    logprobs = [[trainer_logprobs(model, one, sampler).sum().item() for one in ours] for model in (before, policy)]
    changes = [new - old for old, new in zip(*logprobs, strict=True)]
    total = -sum(s.weight * s.advantage * len(s.rollout.completion_ids) for s in samples)
    say(f"\n7. UPDATE  AdamW on all {len(samples)} kept responses of both roles, learning rate {row['lr']:g}")
    say(f"   loss of the step: {total:.8f} by hand with c = 1, {row['loss']:.8f} in the code")
    say(f"   norm of the gradient {row['grad_norm']:.4f}; trainer - sampler {row['mismatch_abs']:.1e} nats a token")
    say("\n   log p of whole responses to our mask:\n      verdict   before    after   change")
    for correct, old, new, change in zip(task.correct, *logprobs, changes, strict=True):
        say(f"      {'right' if correct else 'wrong'}  {old:9.4f}{new:9.4f}{change:+9.4f}")
    for verdict, name in ((1, "right"), (0, "wrong")):
        mean = fmean(change for change, correct in zip(changes, task.correct, strict=True) if correct == verdict)
        say(f"   {name} answers: {mean:+.4f} on average")
    return pairs | {"loss of the step": (total, row["loss"]), "changes": (changes, task.correct)}


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
