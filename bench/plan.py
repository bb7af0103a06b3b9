"""What a run costs before it is run: memory per GPU by part, cache room, ideal seconds, GPU hours.

    python -m bench plan configs/smollm3.yaml gpus=8 gpu=h100 mean_response=1024

Arithmetic only: no weights, no GPU, no network. No kernel can be faster than the ideal (bench/costs.py). Memory by part
is calculated in model.py. Decimal units (1 GB = 1e9 bytes).
"""

from __future__ import annotations

from dataclasses import replace

from bench import costs
from bench.costs import GPUS, Bundle, Gpu, cache_room
from bench.memory import Shape, activation_bytes, gpu_memory, must_recompute, shape_of, value_bytes
from bench.options import Options, complete, phases, split_words, text_table
from config import Config, read_config
from methods import METHODS, answer_samples, tasks_per_passage

GB = 1e9


def ideal_seconds(shape: Shape, config: Config, gpu: Gpu, options: Options) -> dict:
    """One step: {"seconds": {phase: s}, "responses": n, "response_tokens": n, "trained_tokens": n, "recomputing": s}.
    recomputing: one more forward of the layers, in `seconds` only if gradient_checkpointing takes it."""
    config = decided(shape, config, options.gpus, gpu)
    gpus, prompt, width = options.gpus, options.prompt, value_bytes(config)
    whole, bundles, seconds = gpus * gpu.flops, [], {}
    counts, room = {"responses": 0, "response_tokens": 0}, cache_room(shape, config, gpus, gpu)
    for number, phase in enumerate(phases(config)):
        cap = min(phase.cap, options.cap)
        mean, total = min(options.mean_response, cap), phase.prompts * phase.count
        lengths = costs.response_lengths(total, mean, cap, options.sigma, number)
        groups = [lengths[i : i + phase.count] for i in range(0, len(lengths), phase.count)]
        slots = costs.slots_for(room, prompt, lengths, config.max_requests or costs.REQUESTS)
        seconds["prefill"] = seconds.get("prefill", 0.0) + costs.forward_flops(shape, [prompt] * phase.prompts) / whole
        seconds[phase.name] = costs.decode_limit(shape, gpu, prompt, groups, gpus, slots, width)
        counts["responses"] += len(lengths)
        counts["response_tokens"] += sum(lengths)
        if phase.name == "predict" or config.train_generator:
            bundles += [Bundle(prompt, group) for group in groups]
    method = METHODS[config.method]
    if method.samples is answer_samples:  # a few words each
        bundles = [Bundle(prompt, [8])] * sum(tasks_per_passage(config, config.method))
    elif not method.predict:
        bundles = [Bundle(prompt, [])] * config.passages_per_step
    trained = [one.prompt + response for one in bundles for response in one.responses or [0]]
    if not config.share_prompts:
        bundles = [Bundle(one.prompt, [response]) for one in bundles for response in one.responses] or bundles
    scored = costs.forward_flops(shape, trained) * options.kept if config.kl else 0.0
    if method.reference:
        scored += costs.forward_flops(shape, [prompt] * config.passages_per_step)
    if method.reference == "average":  # the policy scores every thought
        scored += costs.forward_flops(shape, trained)
    if scored:
        seconds["scoring"] = scored / whole
    rate, flops = options.kept * config.updates_per_batch / whole, costs.train_flops(shape, bundles)
    seconds["update"] = rate * flops
    recomputing = rate * (flops / 3 - 2 * shape.table * costs.bundle_tokens(bundles))  # the head aside
    if config.gradient_checkpointing:
        seconds["recomputing layers"] = recomputing
    # AdamW reads four and writes three float32 numbers a parameter; refresh reads one and writes the replica
    masters = 0.0 if config.offload else (config.updates_per_batch * 28 + 4) / gpus
    seconds["optimizer, refresh"] = shape.parameters * (masters + width) / gpu.bandwidth
    trained = int(options.kept * costs.bundle_tokens(bundles))
    return {"seconds": seconds, "trained_tokens": trained, "recomputing": recomputing, **counts}


def decided(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> Config:
    """The config with gradient_checkpointing=auto replaced by what a run on these GPUs would take."""
    return replace(config, gradient_checkpointing=must_recompute(shape, config, gpus, gpu.memory))


def advice(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> str:
    """Whether it fits; if not, the key to change and, where one helps, its largest value that fits. Some of the parts
    that are added up are never live together, so what fits here fits."""
    stored, config = config.gradient_checkpointing, decided(shape, config, gpus, gpu)
    longest = config.max_prompt_tokens + max(config.max_mask_tokens, config.max_prediction_tokens)
    memory, more = gpu_memory(shape, config, gpus), "raise gpus=, or change gpu= or model="
    if config.offload:  # then GPUs share nothing but host memory
        more = "change gpu= or model="
    for moment, parts in memory.items():
        fixed = sum(parts.values()) - parts.get("activations", 0)
        if fixed > gpu.memory:
            least = gpu_memory(shape, replace(config, offload=True, gradient_checkpointing=True), gpus)["training"]
            if not config.offload and "second copy" not in least and sum(least.values()) <= gpu.memory:
                more = "set offload=true, " + more
            return f"does not fit: {fixed / GB:.0f} GB in {moment} before any activation; {more}"
    width, auto = value_bytes(config), config.gradient_checkpointing
    if fixed + memory["training"]["activations"] > gpu.memory:
        per_token = {on: activation_bytes(shape, 1, on, width, config.liger) for on in (False, True)}
        if stored is False and fixed + per_token[True] * longest <= gpu.memory:
            return "does not fit: set gradient_checkpointing=true, or lower tokens_per_micro_batch"
        tokens = int((gpu.memory - fixed) / per_token[auto]) // 256 * 256
        if tokens >= longest:
            return f"does not fit: set tokens_per_micro_batch={tokens} or less"
        return (f"does not fit: one sequence of {longest} tokens is too long; {max(tokens, 0)} fit. Lower "
                f"max_prediction_tokens= and max_mask_tokens=, or {more}")  # fmt: skip
    room = cache_room(shape, config, gpus, gpu)
    if room < longest:
        return f"does not fit: cache room of {room:,} tokens, a request of {longest:,}. Raise cache_memory= or {more}"
    return f"fits: {(gpu.memory - sum(memory['training'].values())) / GB:.0f} GB to spare in training"


def checkpoint_bytes(shape: Shape, config: Config) -> float:
    """On disk: float32 masters, Adam's two moments, a moving average (rlp), the Hugging Face model."""
    return shape.parameters * (12 + 4 * (METHODS[config.method].reference == "average") + value_bytes(config))


def host_bytes(shape: Shape, config: Config) -> float:
    """Host memory of a node: with offload masters, gradients and Adam; what a checkpoint is written from."""
    return shape.parameters * 16 * config.offload + (config.save_every > 0) * checkpoint_bytes(shape, config)


def memory_lines(shape: Shape, config: Config, options: Options) -> list[str]:
    """The parts of GPU memory in training, with layers stored and recomputed; host memory; disk."""
    gpu, gpus, width = GPUS[options.gpu], options.gpus, value_bytes(config)
    ways = [replace(config, gradient_checkpointing=on) for on in (False, True)]
    stored, recomputed = (gpu_memory(shape, way, gpus)["training"] for way in ways)
    rows = [("memory per GPU, GB", "stored", "recomputed")]
    rows += [(f"  {name}", f"{stored[name] / GB:.2f}", f"{recomputed[name] / GB:.2f}") for name in stored]
    sums = (f"{sum(way.values()) / GB:.2f}" for way in (stored, recomputed))
    lines = text_table([*rows, ("  all of it, in training", *sums)], 32, 12)
    lines[-1] += f"   of {gpu.memory / GB:.0f}, if live all at once"
    key = f"gradient_checkpointing={str(config.gradient_checkpointing).lower()}"
    taken = "recomputed" if decided(shape, config, gpus, gpu).gradient_checkpointing else "stored"
    lines.append(f"{key}: activations of {config.tokens_per_micro_batch:,} tokens are {taken}")
    host = f"host memory per node of {gpus} GPUs: {host_bytes(shape, config) / GB:.0f} GB in the run, "
    host += f"{gpus * width * shape.parameters / GB:.0f} GB while the model is loaded"
    if config.offload:
        host += f"; a micro-batch moves {12 * shape.parameters / gpus / GB:.0f} GB per GPU there and back"
    lines.append(host)
    if config.save_every:
        most = f"{config.keep_last + 1} of them at most" if config.keep_last else "none is deleted"
        lines.append(f"disk: {checkpoint_bytes(shape, config) / GB:.0f} GB a checkpoint, {most}")
    return lines


def plan_text(shape: Shape, config: Config, options: Options) -> str:
    """Everything above for one config on these GPUs. The options must be complete."""
    gpu, gpus = GPUS[options.gpu], options.gpus
    lines = [f"{config.model}: {shape.parameters:,} parameters; {gpus} x {gpu.name}; method {config.method}"]
    if shape.experts:
        share = f"{shape.experts_per_token} of {shape.experts} experts a layer"
        lines.append(f"a token is multiplied with {shape.multiplied:,} of them: {share}")
    verdict = advice(shape, config, gpus, gpu)
    lines += ["", *memory_lines(shape, config, options), f"  {verdict}"]
    if not verdict.startswith("fits"):
        return "\n".join(lines)
    ideal, lines = ideal_seconds(shape, config, gpu, options), [*lines, ""]
    if phases(config):
        room, request = cache_room(shape, config, gpus, gpu), options.prompt + options.mean_response
        size, most = room * costs.cache_bytes(shape, value_bytes(config)) / GB, config.max_requests or costs.REQUESTS
        lines += [
            f"sampler's cache per GPU: {size:.1f} GB, {room:,} tokens, {int(room / request):,} requests of "
            f"{request:.0f} tokens; max_requests lets {most:,} run",
            f"a step: {ideal['responses']:,} responses, mean {options.mean_response:.0f} tokens after prompts of "
            f"{options.prompt}: {ideal['response_tokens']:,} response tokens",
        ]
    lines += [f"tokens trained in a step: {ideal['trained_tokens']:,}", ""]
    shares = dict.fromkeys(("propose", "predict", "optimizer, refresh"), options.decode_share)
    times = [(name, s, s / shares.get(name, options.mfu)) for name, s in ideal["seconds"].items()]
    totals = [sum(column) for column in list(zip(*times, strict=True))[1:]]
    rows = [("seconds a step", "ideal", "estimate")]
    times.append(("step", *totals))
    if "recomputing layers" not in ideal["seconds"]:
        times.append(("recomputing layers would add", ideal["recomputing"], ideal["recomputing"] / options.mfu))
    rows += [(f"  {name}", f"{least:.2f}", f"{guess:.2f}") for name, least, guess in times]
    unit, each = ("minutes", 1 / 60) if options.gpu == "cpu" else ("GPU hours", gpus / 3600)
    whole = [f"{total * config.steps * each:.0f}" for total in totals]
    lines += text_table([*rows, (f"  {unit}, {config.steps} steps", *whole)], 32, 10)
    source = "a rate measured now" if options.gpu == "cpu" else "the data sheet's rate"
    lines += [
        "",
        f"ideal: every byte and FLOP at {source}. "
        f"estimate: {options.decode_share:.0%} of it in decoding, {options.mfu:.0%} elsewhere.",
        "Not counted: start-up of the sampler, traffic between GPUs and with the host, probes, checkpoints, a warm-up "
        "method" + (", the optimizer on the host." if config.offload else "."),
    ]
    if options.kept == 1 and phases(config):
        lines.append("kept=1: every group is trained on. A run drops groups with equal rewards: lower it.")
    if config.dtype == "float32" and options.gpu != "cpu":
        lines.append("dtype=float32: the times are those of bfloat16 tensor cores; float32 takes several times longer.")
    return "\n".join(lines)


def print_plan(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word."""
    options, rest = split_words(words, "plan")
    config = read_config(rest)
    if options.gpu == "cpu":  # measured now; Liger's kernels are for GPUs
        GPUS["cpu"], config = costs.measure_cpu(options.gpus), replace(config, liger=False)
    print(plan_text(shape_of(costs.architecture(config.model)), config, complete(options, config, "plan")))
