"""Try a model on one passage: its masks, each with predictions, thoughts and verdicts.

    python -m play CHECKPOINT [BASE]                     paste a paragraph, end it with Ctrl-D; or < FILE
    python -m play CHECKPOINT [BASE] passage="Text ..."
    python -m play CHECKPOINT [BASE] number=3            the fourth held-out passage of the config's corpus
    python -m play explain configs/tiny.yaml             one training step in slow motion

CHECKPOINT: a run directory, one of its checkpoints, a folder made by save_pretrained, or a hub name. Settings come from
config=FILE, else from the checkpoint's run, else from the defaults, but for method, reward and masks_per_passage=8;
key=value changes them. With BASE both models
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
from config import Config, ConfigError, command, read_config
from data import Corpus, Passage, build_index, load_corpus, reserved_marks
from engine.checks import try_sampler
from grpo import Sample, clipped_loss, group_advantages, keep_group, make_optimizer, pack_samples
from methods import METHODS, Run, Task, make_task, named_masks, predict, reward
from model import build_policy, build_reference, load_replica, load_tokenizer
from prompts import check_prompts, last_answer, mask_prompt
from ranks import Ranks, start_ranks
from rollout import Rollout, Sampler, derive_seed, make_sampler
from train import step

RESPONSE_CHARS, TERMINAL_WIDTH = 600, 100


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


def read_corpus(config: Config, tokenizer) -> Corpus:
    """The config's passages, indexed in a folder of no run."""
    with tempfile.TemporaryDirectory() as folder:
        runs = sorted(Path(config.run_dir).parent.glob("*/cache"))  # a run's own index, else read anew
        build_index(config, tokenizer, Path(folder), lambda line: None, runs)
        return load_corpus(Path(folder), config)


# ---- a model on a passage
def read_arguments(arguments: list[str]) -> tuple[dict[str, str], dict[str, str], Config]:
    """Command line -> (model folders by name, the passage's source, settings). Raises ConfigError."""
    names = [word for word in arguments if "=" not in word]
    keys = dict(word.split("=", 1) for word in arguments if "=" in word)
    source = {key: keys.pop(key) for key in ("passage", "number") if key in keys}
    if not 1 <= len(names) <= 2:
        raise ConfigError(f"{len(names)} models given: expected CHECKPOINT or CHECKPOINT BASE")
    if not source.get("number", "0").isdecimal():
        raise ConfigError(f"number={source['number']!r}: must be a whole number from 0, a held-out passage")
    folders = {}
    for name in names:  # a name that is no folder is left to the hub
        found = exported_model(Path(name)) if Path(name).is_dir() else name
        if found is None:
            raise ConfigError(f"{name}: no model folder and no run with a checkpoint")
        folders[name] = str(found)
    above = Path(folders[names[0]]).absolute().parents
    files = [folder.parent / "config.yaml" for folder in above if folder.name == "checkpoints"]
    configs = [keys.pop("config")] if "config" in keys else [str(file) for file in files if file.is_file()][:1]
    settings = {"method": "active", "reward": "exact", "masks_per_passage": 8, "model": folders[names[0]]}
    if "number" not in source:
        settings["data"] = Config.data  # a run's corpus need not be on this machine
    return folders, source, read_config([*configs, *(f"{key}={value}" for key, value in (settings | keys).items())])


def read_passage(source: dict[str, str], config: Config, tokenizer) -> Passage:
    """The passage of the command line or of stdin. Raises ConfigError for a text that no prompt can hold."""
    if "number" in source:
        heldout = read_corpus(config, tokenizer).heldout
        if int(source["number"]) >= len(heldout):
            raise ConfigError(f"number={source['number']}: must be below {len(heldout)}, the held-out passages")
        return heldout[int(source["number"])]
    if "passage" not in source and sys.stdin.isatty():
        print("Paste a paragraph, then press Ctrl-D on an empty line:", flush=True)
    text = (source["passage"] if "passage" in source else sys.stdin.read()).strip()
    marks = [mark for mark in reserved_marks(tokenizer) if mark in text]
    if not text or marks:
        raise ConfigError("the passage " + (f"contains {marks[0]!r}, a mark of the prompts" if text else "is empty"))
    return Passage("0#0", "your passage", "", text)


def play(passage: Passage, models: dict[str, str], config: Config, ranks: Ranks, say=print) -> list[list[Task]]:
    """Prints what the models (name: folder) do with the passage. Returns, per model, the tasks of the masks that the
    first model chose, with this model's predictions. Raises ConfigError if a prompt is too long."""
    say(f"{plain(passage.title)} {plain(passage.url)}\n{wrapped(passage.text)}\n")
    most, proposals, predicted = config.max_prompt_tokens, [], []
    for name, model in models.items():  # one after the other: they need not fit into memory together
        settings = replace(config, model=model)
        sampler = make_sampler(load_replica(settings, ranks), load_tokenizer(settings), settings, ranks)
        try_sampler(sampler, [passage])
        if (length := len(mask_prompt(sampler, passage.text))) > most:
            raise ConfigError(f"max_prompt_tokens={most}: this passage makes a prompt of {length} tokens")
        rng = random.Random(derive_seed(config.seed, 0, "mask", 0))
        chosen = named_masks(sampler, [passage], (0, "propose"), [rng])[0]
        proposals = proposals or chosen
        say(f"{name} chose, {len(chosen)} times over:")
        for (words, invalid), count in Counter((task.mask.words, task.mask.invalid) for task in chosen).most_common():
            cause = f" (invalid: {invalid.replace('_', ' ')})" if invalid else ""
            say(wrapped(f"{count} x {words or 'nothing'}{cause}", 4))
        wanted = {task.mask.masked: task for task in proposals if not task.mask.invalid}.values()
        tasks = [make_task(passage, replace(task.mask), sampler, task.proposal) for task in wanted]
        if any(task.mask.invalid for task in tasks):
            raise ConfigError(f"max_prompt_tokens={most}: a prediction of {name} has a longer prompt")
        run = Run(settings, ranks, None, sampler, None, None, None)
        predict(run, tasks, 0)
        reward(run, METHODS["active"], [tasks], tasks, 0)
        predicted.append(tasks)
        del sampler, run
        gc.collect()  # Liger makes reference cycles that del leaves in memory
    if not predicted[0]:
        say("\nNo mask is valid, so there is nothing to predict.")
    for number, tasks in enumerate(zip(*predicted, strict=True), 1):
        mask = tasks[0].mask
        say(f"\nMASK {number}: {plain(mask.target)} {mask.label}\n{wrapped(mask.masked)}")
        say(wrapped(f"{next(iter(models))} wrote: {tasks[0].proposal.text}", 2, RESPONSE_CHARS))
        for name, task in zip(models, tasks, strict=True):
            right, size = sum(task.correct), len(task.correct)
            say(f"  {name}: {right} of {size} right; the mask earns {task.proposal_reward:.3f}")
            responses = Counter(zip((response.text for response in task.predictions), task.correct, strict=True))
            for (text, correct), count in responses.most_common():
                say(wrapped(f"{count} x {'right' if correct else 'WRONG'}: {describe_answer(text)}", 4))
                say(wrapped(f"it wrote: {text}", 8, RESPONSE_CHARS))
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

    def teaches(pair: tuple[list[Task], Task]) -> tuple:
        share = fmean(pair[1].correct)
        return len({task.proposal_reward for task in pair[0]}) > 1, -abs(share - 0.5), -share

    mixed = [(tasks, task) for tasks in proposals for task in tasks if len(set(task.correct)) > 1]
    if not mixed:
        raise ConfigError("seed: in this step every mask was solved by all or by none, nothing to learn; try another")
    return max(mixed, key=teaches)


def explain(config: Config, ranks: Ranks, say=print) -> dict:
    """Runs step 1 of `method=active` on one process, and follows one mask to the end. Prints and returns the code's
    numbers beside the same numbers in plain arithmetic: {name: (by hand, in the code)}. Raises ConfigError."""
    required = {"method": "active", "kl": 0.0, "shuffle_rewards": False, "mask_truncated": False,
                "train_generator": True, "generator_reward": "one_minus_accuracy", "advantage_std": True,
                "loss_mean": "token", "warmup_method": "", "random_masks": 0, "mini_batches": 1,
                "updates_per_batch": 1}  # fmt: skip
    for key, value in required.items():
        if getattr(config, key) != value:
            raise ConfigError(f"{key}={getattr(config, key)!r}: must be {value!r} to be explained")
    pairs: dict = {}

    def both(name: str, hand: float, code: float, digits: int) -> None:
        pairs[name] = (hand, code)
        same = math.isclose(hand, code, rel_tol=0.01, abs_tol=1e-6)
        end = "" if same else "   <- DIFFERENT: the code has another rule, or less precision"
        say(f"   {name}  {hand:.{digits}f} by hand, {code:.{digits}f} in the code{end}")

    # ---- step 1 of train.py; `start` and `before` are the plain model and the trainer's as before the step
    tokenizer = load_tokenizer(config)
    replica, start = load_replica(config, ranks), load_replica(config, ranks)
    policy = build_policy(replica, decide_checkpointing(replica.config, config, ranks), ranks)
    sampler = make_sampler(replica, tokenizer, config, ranks)
    corpus, optimizer = read_corpus(config, tokenizer), make_optimizer(policy, config)
    check_prompts(sampler)
    try_sampler(sampler, corpus.train)
    before = build_reference(start, config, ranks)
    done = step(Run(config, ranks, corpus, sampler, policy, None, optimizer), 0)
    tasks, task = choose_mask(done.proposals)
    passage, kept = task.passage, [group for group in done.groups if keep_group(group)]

    # ---- the passage, both prompts, the masks, and the predictions with their verdicts
    say(f"1. PASSAGE  {plain(passage.title)} {plain(passage.url)}\n{wrapped(passage.text)}")
    say(f"\n2. PROPOSE  the generator reads this, {len(tasks)} times over (line ends are shown as spaces)")
    say(wrapped(tokenizer.decode(mask_prompt(sampler, passage.text)), most=RESPONSE_CHARS) + "\n")
    for number, proposed in enumerate(tasks, 1):
        mask = proposed.mask
        state = f"INVALID: {mask.invalid}" if mask.invalid else f"valid, occurs {mask.occurrences} x, {mask.label}"
        followed = "  <- followed from here on" if proposed is task else ""
        say(f"   mask {number}: {plain(mask.words) or '(none)'}   [{state}]{followed}")
        say(wrapped(f"it wrote: {proposed.proposal.text}", 11, RESPONSE_CHARS))
    say(f"\n3. PREDICT  the predictor reads this, {len(task.predictions)} times over")
    say(f"{wrapped(tokenizer.decode(task.prompt_ids), most=RESPONSE_CHARS)}\n")
    verdicts = zip(task.predictions, task.correct, task.rewards, strict=True)
    for number, (response, correct, earned) in enumerate(verdicts, 1):
        say(f"   {number}: {'right' if correct else 'wrong'}, reward {earned:g}: {describe_answer(response.text)}")
        say(wrapped(f"it wrote: {response.text}", 6, RESPONSE_CHARS))

    # ---- rewards of both roles, and the advantages in the groups of this mask and of this passage
    say("\n4. REWARD  a mask earns 1 - accuracy of its predictions; 0 where none is right or it is invalid")
    say(f"   {sum(task.correct)} of {len(task.correct)} are right")
    both("mask reward", 1 - sum(task.correct) / len(task.correct), task.proposal_reward, 4)
    for name, response in (("answers to this mask", task.predictions[0]), ("masks of this passage", tasks[0].proposal)):
        group = next(group for group in done.groups if group.rollouts[0] is response)
        mean, std = sum(group.rewards) / len(group.rewards), stdev(group.rewards)  # the latter with n - 1
        say(f"\n   The {name}, rewards {' '.join(f'{earned:g}' for earned in group.rewards)}")
        say(f"   advantage = (reward - mean) / (std + 1e-6), mean {mean:.4f}, std {std:.4f}")
        for n, (earned, code) in enumerate(zip(group.rewards, group_advantages(group.rewards, config), strict=True), 1):
            both(f"advantage {group.role} {n}", (earned - mean) / (std + 1e-6), code, 4)

    # ---- the weight of a token, its log-prob in three ways, and its loss
    responses = {id(response) for response in task.predictions}
    sample = next(s for s in done.samples if id(s.rollout) in responses and s.advantage > 0)
    response, lengths = sample.rollout, [len(rollout.completion_ids) for group in kept for rollout in group.rollouts]
    weight = 1 / sum(lengths)
    say(f"\n5. WEIGHT  of a token: 1 / the {sum(lengths)} tokens of the {len(kept)} groups whose rewards differ")
    both("weight", weight, sample.weight, 8)
    # the least expected token shows most
    place = min(range(len(response.completion_ids)), key=lambda n: response.sampler_logprobs[n])
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
    say(f"\n6. ONE TOKEN  {token!r}, number {place + 1} of: {plain(response.text)[:60]}")
    say("   log p by hand from the plain model's logits, in the code as the update computes it")
    both("log p", hand, code, 6)
    say(f"   {sampled:.6f} when sampled. c = min(exp(trainer - sampler), {config.max_importance:g}) = {correction:.6f}")
    say("   ratio = exp(log p - old log p) = 1: the first update of a batch, so the clip does nothing")
    say(f"   loss = - weight x c x ratio x advantage = -{weight:.8f} x {correction:.6f} x 1 x {sample.advantage:.4f}")
    say("   slope = d loss / d log p")
    both("loss", by_hand, loss.item(), 10)
    both("slope", by_hand, slope, 10)

    # ---- the update on the whole batch, and how it changes the log-probs of this mask's responses
    total = -sum(s.weight * s.advantage * len(s.rollout.completion_ids) for s in done.samples)
    say(f"\n7. UPDATE  AdamW on all {len(done.samples)} kept responses of both roles, learning rate {done.row['lr']:g}")
    say("   loss = - sum over the responses of weight x advantage x tokens, with c = 1 by hand")
    both("loss of the step", total, done.row["loss"], 8)
    ours = [Sample(response, 0.0) for response in task.predictions]
    logprobs = [[trainer_logprobs(model, one, sampler).sum().item() for one in ours] for model in (before, policy)]
    change = (trainer_logprobs(policy, sample, sampler) - old_logprobs)[place].item()
    say(f"   log p of the token above {change:+.4f}")
    say("\n   log p of whole responses to our mask:\n      verdict   before    after   change")
    for correct, old, new in zip(task.correct, *logprobs, strict=True):
        say(f"      {'right' if correct else 'wrong'}  {old:9.4f}{new:9.4f}{new - old:+9.4f}")
    return pairs | {"changes": ([new - old for old, new in zip(*logprobs, strict=True)], task.correct)}


def main() -> None:
    words = sys.argv[1:]
    with command(__doc__):
        if words[0] == "explain":
            explain(read_config(words[1:]), start_ranks())
        else:
            models, source, config = read_arguments(words)
            play(read_passage(source, config, load_tokenizer(config)), models, config, start_ranks())
    dist.destroy_process_group()
