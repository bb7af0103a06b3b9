"""What a run costs before it is run: memory per GPU by part, cache room, ideal seconds, GPU hours.

    python -m bench plan configs/smollm3.yaml gpus=8 gpu=h100 mean_response=1024

Arithmetic only: no weights, no GPU, no network. The ideal is what no kernel can avoid (bench/limits.py). Left out,
because they depend on the machine and not on the method: start-up of the sampler, traffic between GPUs, recomputation,
handling of text. Memory by part is model.py's. Decimal units (1 GB = 1e9 bytes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.limits import (
    GPUS,
    Gpu,
    bundle_tokens,
    cache_bytes,
    cache_room,
    checkpoint_bytes,
    decode_limit,
    forward_flops,
    host_bytes,
    loading_bytes,
    requests_at_once,
    response_lengths,
    slots_for,
    train_flops,
)
from config import Config, ConfigError
from methods import GIVEN, tasks_per_passage
from model import Shape, activation_bytes, checkpointing, moments, value_bytes

# ---- what a step consists of


@dataclass(frozen=True)
class Phase:
    """One call of `rollout`."""

    name: str
    prompts: int
    count: int
    """Responses to each prompt."""
    cap: int
    """Longest response, tokens."""


def phases(config: Config) -> list[Phase]:
    """The rollouts of a step of config.method, every mask taken as valid; none where completions are given.

    >>> [(p.name, p.prompts * p.count) for p in phases(Config())]
    [('propose', 256), ('predict', 2048)]
    """
    passages, count, cap = config.passages_per_step, config.predictions_per_mask, config.max_prediction_tokens
    if config.method in GIVEN:
        return []
    if config.method == "active":
        masks = config.masks_per_passage
        propose = Phase("propose", passages, masks, config.max_mask_tokens)
        return [propose, Phase("predict", passages * masks, count, cap)]
    if config.method in ("rlvr", "rlp"):
        return [Phase("predict", passages, count, cap)]
    return [Phase("predict", sum(tasks_per_passage(config, config.method)), count, cap)]


# ---- the report


@dataclass
class PlanOptions:
    """Words of the command that are no keys of the config."""

    gpus: int = 8
    gpu: str = "h100"
    prompt: int = 0
    """Tokens of a prompt; 0: 400, or a third of max_prompt_tokens if that is less."""
    mean_response: float = 0
    """Tokens of a response, mean; 0: 1024, or three eighths of the longest if that is less."""
    sigma: float = 0.6
    """Of the lengths' logarithm."""
    cap: int = 0
    """Longest response; 0: the config's."""
    kept: float = 1.0
    """Share of responses that is trained on; the rest is in groups without contrast."""
    decode_share: float = 0.5
    """Of the decode limit, for the second estimate of hours."""
    mfu: float = 0.4
    """In training, for the second estimate of hours."""


def default_prompt(config: Config) -> int:
    """Tokens of a prompt where none are given."""
    return min(400, config.max_prompt_tokens // 3)


def ideal_seconds(shape: Shape, config: Config, gpu: Gpu, options: PlanOptions) -> dict:
    """Of one step by phase, with responses and tokens: {"propose": s, ..., "responses": n, ...}."""
    gpus, prompt, width = options.gpus, options.prompt, value_bytes(config)
    whole, trained, bundles, seconds = gpus * gpu.flops, [], [], {}
    counts = {"responses": 0, "response_tokens": 0}
    for number, phase in enumerate(phases(config)):
        cap = min(phase.cap, options.cap or phase.cap)
        mean = min(options.mean_response, cap)
        lengths = response_lengths(phase.prompts * phase.count, mean, cap, options.sigma, number)
        groups = [lengths[i : i + phase.count] for i in range(0, len(lengths), phase.count)]
        slots = slots_for(cache_room(shape, config, gpus, gpu), prompt, lengths, requests_at_once(config))
        seconds["prefill"] = seconds.get("prefill", 0.0) + forward_flops(shape, [prompt] * phase.prompts) / whole
        seconds[phase.name] = decode_limit(shape, gpu, prompt, groups, gpus, slots, width)
        counts["responses"] += len(lengths)
        counts["response_tokens"] += sum(lengths)
        if phase.name == "predict" or config.train_generator:
            trained += [prompt + length for length in lengths]
            bundles += [(prompt, group) for group in (groups if config.share_prompts else [[one] for one in lengths])]
    if config.method == "sft":  # an answer of a few words
        trained = [prompt + 8] * sum(tasks_per_passage(config, "sft"))
        bundles = [(prompt, [8])] * len(trained)
    elif config.method == "cpt":
        trained = [prompt] * config.passages_per_step
        bundles = [(prompt, [])] * len(trained)
    scored = forward_flops(shape, trained) * options.kept if config.kl else 0.0
    if config.method in ("rlp", "entropy_token"):
        scored += forward_flops(shape, [prompt] * config.passages_per_step)
    if config.method == "rlp":  # the policy scores every thought
        scored += forward_flops(shape, trained)
    if scored:
        seconds["scoring"] = scored / whole
    seconds["update"] = options.kept * config.updates_per_batch * train_flops(shape, bundles) / whole
    # AdamW reads four and writes three float32 numbers a parameter; refresh reads one and writes the replica
    seconds["optimizer, refresh"] = (
        shape.parameters * (config.updates_per_batch * 28 / gpus + 4 / gpus + width) / gpu.bandwidth
    )
    return {"seconds": seconds, "trained_tokens": int(options.kept * bundle_tokens(bundles)), **counts}


def advice(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> str:
    """Whether it fits; if not, the key to change and, where one helps, its largest value that fits.

    Compares the sum of all parts of a moment, some of which are not live together: what fits here fits.
    """
    stored = config.gradient_checkpointing
    config = decided(shape, config, gpus, gpu)
    spare, longest = [], config.max_prompt_tokens + max(config.max_mask_tokens, config.max_prediction_tokens)
    for moment, parts in moments(shape, config, gpus).items():
        fixed = sum(parts.values()) - parts.get("activations", 0)
        if fixed > gpu.memory:
            more = _more(shape, config, gpus, gpu)
            return f"does not fit: {fixed / 1e9:.0f} GB in {moment} before any activation. {more}"
        if fixed + parts.get("activations", 0) > gpu.memory:
            per_token = {
                on: activation_bytes(shape, 1, on, value_bytes(config), config.liger) for on in (False, True)
            }
            if stored is False and fixed + per_token[True] * longest <= gpu.memory:
                return "does not fit: set gradient_checkpointing=true, or lower tokens_per_micro_batch"
            tokens = int((gpu.memory - fixed) / per_token[config.gradient_checkpointing]) // 256 * 256
            if tokens >= longest:
                return f"does not fit: set tokens_per_micro_batch={tokens} or less"
            return (
                f"does not fit: one sequence of {longest} tokens is too long. Lower max_prediction_tokens= and "
                "max_mask_tokens=, or more gpus="
            )
        spare.append(f"{(gpu.memory - fixed - parts.get('activations', 0)) / 1e9:.0f} GB to spare in {moment}")
    room = cache_room(shape, config, gpus, gpu)
    if room < longest:
        return f"does not fit: cache room of {room:,} tokens for a request of {longest:,}. Raise cache_memory= or gpus="
    return "fits: " + ", ".join(spare[1:])


def _more(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> str:
    """What helps where even the weights do not fit."""
    lent = replace(config, offload=True, gradient_checkpointing=True)
    if not config.offload and all(
        sum(parts.values()) <= gpu.memory for parts in moments(shape, lent, gpus).values()
    ):
        return "Set offload=true, raise gpus=, or change gpu= or model="
    return "Raise gpus=, or change gpu= or model="


def decided(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> Config:
    """The config with gradient_checkpointing=auto replaced by what a run would take."""
    return replace(config, gradient_checkpointing=checkpointing(shape, config, gpus, gpu.memory))


def memory_table(shape: Shape, config: Config, options: PlanOptions) -> list[str]:
    """Lines: parts of memory against the moments of a run that may be its largest; host memory; disk."""
    gpu, gpus, gb = GPUS[options.gpu], options.gpus, 1e9
    auto = config.gradient_checkpointing == "auto"
    config = decided(shape, config, gpus, gpu)
    when = moments(shape, config, gpus)
    if not config.offload:
        when = {"": when["training"]}
    lines = ["memory per GPU, GB"]
    if config.offload:
        lines.append(f"  {'':30}" + "".join(f"{name:>11}" for name in when))
    for name in dict.fromkeys(part for parts in when.values() for part in parts):
        note = ""
        if name == "activations":
            tokens = config.tokens_per_micro_batch
            both = [activation_bytes(shape, tokens, on, value_bytes(config), config.liger) / gb for on in (True, False)]
            note = f"   {tokens:,} tokens; with checkpointing {both[0]:.1f}, without {both[1]:.1f}"
            note += f"; auto: {'with' if config.gradient_checkpointing else 'without'}" if auto else ""
        lines.append(f"  {name:30}" + _cells([parts.get(name) for parts in when.values()], config) + note)
    sums = _cells([sum(parts.values()) for parts in when.values()], config)
    host = (
        f"host memory per node of {gpus} GPUs: {host_bytes(shape, config) / gb:.0f} GB in the run, "
        f"{loading_bytes(shape, config, gpus) / gb:.0f} GB while the model is loaded"
    )
    if config.offload:
        lines.append(f"  {'all of it':30}{sums}   of {gpu.memory / gb:.0f}; in rollouts the cache takes the rest")
        host += f"; a step moves {12 * shape.parameters / gpus / gb:.0f} GB per GPU there and back"
    else:
        lines.append(f"  {'all of it, in training':30}{sums}   of {gpu.memory / gb:.0f}, if live all at once")
    lines.append(host)
    if config.save_every:
        each = checkpoint_bytes(shape, config) / gb
        most = f"{config.keep_last + 1} of them at most" if config.keep_last else "none is deleted"
        lines.append(f"disk: {each:.0f} GB a checkpoint, {most}")
    return lines


def _cells(sizes: list, config: Config) -> str:
    width = 11 if config.offload else 9
    return "".join(" " * width if size is None else f"{size / 1e9:{width}.2f}" for size in sizes)


def check_options(options: PlanOptions, config: Config) -> None:
    """Fills in what was left at 0. Raises ConfigError, one line with key and value."""
    if options.gpu not in GPUS:
        raise ConfigError(f"gpu={options.gpu!r}: must be one of {', '.join(GPUS)}")
    longest = max((phase.cap for phase in phases(config)), default=config.max_prediction_tokens)
    options.prompt = options.prompt or default_prompt(config)
    options.mean_response = options.mean_response or min(1024, 0.375 * min(longest, options.cap or longest))
    for key in ("gpus", "prompt", "mean_response"):
        if getattr(options, key) < 1:
            raise ConfigError(f"{key}={getattr(options, key)}: must be 1 or more")
    for key in ("kept", "decode_share", "mfu"):
        if not 0 < getattr(options, key) <= 1:
            raise ConfigError(f"{key}={getattr(options, key)}: must be above 0, at most 1")
    if not options.sigma >= 0:
        raise ConfigError(f"sigma={options.sigma}: must be 0 or more")


def report(shape: Shape, config: Config, options: PlanOptions) -> str:
    """Everything above for one config on these GPUs, as text. check_options comes first."""
    gpu, gpus, width, gb = GPUS[options.gpu], options.gpus, value_bytes(config), 1e9
    lines = [f"{config.model}: {shape.parameters:,} parameters; {gpus} x {gpu.name}; method {config.method}", ""]
    if shape.experts:
        own = f"{shape.experts_per_token} of {shape.experts} experts a layer"
        lines.insert(1, f"a token is multiplied with {shape.multiplied:,} of them: {own}")
    lines += memory_table(shape, config, options)
    verdict = advice(shape, config, gpus, gpu)
    lines.append(f"  {verdict}")
    if not verdict.startswith("fits"):
        return "\n".join(lines)
    ideal = ideal_seconds(shape, config, gpu, options)
    lines.append("")
    if phases(config):
        room, one = cache_room(shape, config, gpus, gpu), options.prompt + options.mean_response
        lines.append(
            f"sampler's cache per GPU: {room * cache_bytes(shape, width) / gb:.1f} GB, {room:,} tokens, "
            f"{int(room / one):,} requests of {one:.0f} tokens; max_requests lets {requests_at_once(config):,} run"
        )
        lines.append(
            f"a step: {ideal['responses']:,} responses, mean {options.mean_response:.0f} tokens after prompts of "
            f"{options.prompt}: {ideal['response_tokens']:,} response tokens"
        )
    lines += [f"tokens trained in a step: {ideal['trained_tokens']:,}", ""]
    lines.append(f"{'seconds a step':32} {'ideal':>8} {'estimate':>10}")
    shares = dict.fromkeys(("propose", "predict", "optimizer, refresh"), options.decode_share)
    totals = [0.0, 0.0]
    for name, seconds in ideal["seconds"].items():
        slower = seconds / shares.get(name, options.mfu)
        totals = [totals[0] + seconds, totals[1] + slower]
        lines.append(f"  {name:30} {seconds:8.2f} {slower:10.2f}")
    lines.append(f"  {'step':30} {totals[0]:8.2f} {totals[1]:10.2f}")
    hours = [total * config.steps * gpus / 3600 for total in totals]
    lines.append(f"  {f'GPU hours, {config.steps} steps':30} {hours[0]:8.0f} {hours[1]:10.0f}")
    lines += [
        "",
        f"ideal: every byte and FLOP at the data sheet's rate. estimate: {options.decode_share:.0%} of it in decoding, "
        f"{options.mfu:.0%} elsewhere.",
        "Not counted: start-up of the sampler, traffic between GPUs and with the host, probes, checkpoints, a warm-up "
        "method.",
    ]
    if options.kept == 1 and phases(config):
        lines.append("kept=1: every group is trained on. A run drops those without contrast: lower it (1 is the most).")
    if config.dtype == "float32":
        lines.append("dtype=float32: the times are those of bfloat16 tensor cores; float32 takes several times longer.")
    return "\n".join(lines)
