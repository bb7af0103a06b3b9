"""What a run costs, by arithmetic alone: memory per GPU (bench/memory.py), cache room, ideal seconds, GPU hours.

No kernel can be faster than the ideal: every byte and FLOP at the full rate of the device. 1 GB = 1e9 bytes.
"""

import json
import random
import timeit
from collections import deque
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from transformers import AutoConfig

from bench.memory import Shape, decided, gpu_memory, memory_of, shape_of, value_bytes
from config import Config, ConfigError, parse_words, read_config, typed
from methods import METHODS, answer_samples, needs_reference, tasks_per_passage
from ranks import Ranks


class Gpu(NamedTuple):  # the data sheet of a card
    name: str  # as torch.cuda.get_device_name() gives it
    flops: float  # FLOP/s: bfloat16 with float32 accumulation, dense
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes


REQUESTS = 512  # that rollout.py lets run together on a GPU, unless config.max_requests says otherwise
# NVIDIA's data sheets of H100, H200, A100, L40S and DGX B200 (an eighth of it); they print tensor FLOPs with sparsity,
# halved here. RTX: the white papers of the Ada and GA102 architectures, rows "BF16 with FP32 accumulate".
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989.5e12, 3.35e12, 80e9),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 756.5e12, 2.0e12, 80e9),
    "h200": Gpu("NVIDIA H200", 989.5e12, 4.8e12, 141e9),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12, 40e9),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12, 80e9),
    "a100-80-pcie": Gpu("NVIDIA A100 80GB PCIe", 312e12, 1.935e12, 80e9),
    "l40s": Gpu("NVIDIA L40S", 362e12, 864e9, 48e9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165.2e12, 1.008e12, 24e9),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 71e12, 936e9, 24e9),
    "b200": Gpu("NVIDIA B200", 2250e12, 8.0e12, 180e9),
}


def measure_cpu(ranks: int) -> Gpu:
    """What each of `ranks` ranks has of this machine's CPU, measured in a second with all cores: float32 products of
    matrices of 1,024 rows, copies of 256 MB, and the memory that is free."""
    matrix, (values, target) = torch.ones(1024, 1024), torch.ones(2, 64 * 2**20)
    flops = 2 * 1024**3 / min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=8))
    bandwidth = 8 * values.numel() / min(timeit.repeat(lambda: target.copy_(values), number=1, repeat=8))
    return Gpu("rank on this CPU", flops / ranks, bandwidth / ranks, memory_of(Ranks(0, ranks, torch.device("cpu"))))


# ------------------------------------------------------------------------------------------------- the work of a step


@dataclass
class Work:
    """Prompts and responses of a made-up step, by words that are no keys of the config."""

    prompt: int = 0  # tokens of a prompt; 0: 400, or a third of max_prompt_tokens if that is less
    mean_response: float = 0.0  # mean tokens of a response; 0: three eighths of the longest, at most 1024
    sigma: float = 0.6  # standard deviation of the logarithm of the lengths; 0: all equal


@dataclass
class PlanOptions(Work):
    gpus: int = 8  # of a node
    gpu: str = "h100"  # a key of GPUS, or cpu: this machine, measured; gpus is then the number of ranks
    kept: float = 1.0  # share of responses that is trained on; the rest is in groups with equal rewards
    decode_share: float = 0.5  # of the decode limit, for the estimate of hours
    mfu: float = 0.4  # in training, for the estimate of hours


def read_words(words: list[str], kind: type[Work]) -> tuple:
    """Words of a command line -> (a `kind` from those that name its fields, the Config of the others). Raises
    ConfigError with key and value for one that is impossible."""
    known = {field.name: field.type.__name__ for field in fields(kind)}
    own = [word for word in words if word.partition("=")[0] in known]
    config = read_config([word for word in words if word not in own])
    options = kind(**typed(parse_words(own, "the config file"), known))
    for key, most in {"gpus": 10**4, "kept": 1, "decode_share": 1, "mfu": 1}.items():
        if not 0 < (value := getattr(options, key, 1)) <= most:
            raise ConfigError(f"{key}={value}: must be above 0, at most {most}")
    longest = max((cap for *_, cap in phases(config)), default=config.max_prediction_tokens)
    options.mean_response = options.mean_response or min(1024, 0.375 * longest)
    options.prompt = options.prompt or min(400, config.max_prompt_tokens // 3)
    return options, config


def phases(config: Config) -> list[tuple[str, int, int, int]]:
    """The calls of `rollout` in a step if every mask is valid: (name, prompts, responses to each, longest response in
    tokens)."""
    method, tasks, calls = METHODS[config.method], config.passages_per_step, []
    if method.generator:
        calls.append(("propose", tasks, config.masks_per_passage, config.max_mask_tokens))
        tasks *= config.masks_per_passage
    elif method.predict and not method.one_task:
        tasks = sum(tasks_per_passage(config, config.method))
    if method.predict:
        calls.append(("predict", tasks, config.predictions_per_mask, config.max_prediction_tokens))
    return calls


def response_lengths(prompts: int, count: int, longest: int, work: Work, seed: int) -> list[list[int]]:
    """Tokens of `count` responses to each prompt: lognormal, cut at `longest`, scaled by bisection so that their mean
    is work.mean_response or, if that is less, `longest`."""
    rng, mean = random.Random(seed), min(work.mean_response, longest)
    draws = [rng.lognormvariate(0.0, work.sigma) for _ in range(prompts * count)]
    low, high, lengths = 0.0, longest / min(draws), [longest] * len(draws)
    for _ in range(60):
        scale = (low + high) / 2
        scaled = [min(longest, max(1, round(scale * draw))) for draw in draws]
        if fmean(scaled) < mean:
            low = scale
        else:
            high, lengths = scale, scaled
    return [lengths[i : i + count] for i in range(0, len(lengths), count)]


# --------------------------------------------------------------------------------------------------- FLOPs and seconds


def forward_flops(shape: Shape, tokens: int) -> float:
    """One causal pass over a sequence: 2 N T for the weights, half of T^2 pairs for attention."""
    return 2.0 * shape.read(1) * tokens + pair_flops(shape) * tokens**2 / 2


def pair_flops(shape: Shape) -> int:
    """Attention of one query to one key, all layers: 2 FLOPs for the score and 2 for the sum per head and dimension."""
    return 4 * shape.layers * shape.heads * shape.head_dim


def train_flops(shape: Shape, bundles: list[tuple[int, list[int]]]) -> float:
    """Forward and backward, without recomputation: 6 N T + 6 L H d T^2 where each response has a prompt of its own.
    bundles: tokens of a prompt, which is computed once, and of each response, which attends to it."""
    flops = 0.0
    for prompt, responses in bundles:
        alone = forward_flops(shape, prompt)
        flops += alone + sum(forward_flops(shape, prompt + response) - alone for response in responses)
    return 3 * flops


def cache_bytes(shape: Shape, width: int = 2) -> int:
    """Bytes of one token in the sampler's cache: a key and a value per layer and key-value head."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width


def cache_room(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> int:
    """Tokens in the sampler's cache on each GPU: its share of the free memory, less the logits of one decode step. The
    sampler also sets aside one layer's worth per token to read from, and 16 bytes of indices."""
    width = value_bytes(config)
    free = config.cache_memory * (gpu.memory - sum(gpu_memory(shape, config, gpus)["rollouts"].values()))
    free -= (config.max_requests or REQUESTS) * (4 * shape.vocab + width * shape.hidden)
    each = cache_bytes(shape, width)
    return max(0, int(free / (each + each / shape.layers + 16)))


def decode_seconds(shape: Shape, gpu: Gpu, prompt: int, lengths: list[int], slots: int, width: int = 2) -> float:
    """Least time in which one GPU decodes responses of these lengths, `slots` at a time, each followed by the next. A
    decode step gives every running response a token. It takes as long as its reads (weights once; keys and values of
    these responses and their prompts) or its multiplications, whichever is longer."""
    waiting, running, seconds = deque(lengths), [], 0.0  # running: (tokens in the cache, tokens to come)
    while waiting or running:
        while waiting and len(running) < slots:
            running.append((prompt, waiting.popleft()))
        context = sum(cached for cached, _ in running)
        from_memory = (width * shape.read(len(running)) + context * cache_bytes(shape, width)) / gpu.bandwidth
        multiplying = (2 * shape.read(1) * len(running) + pair_flops(shape) * context) / gpu.flops
        seconds += max(from_memory, multiplying)
        running = [(cached + 1, left - 1) for cached, left in running if left > 1]
    return seconds


def decode_limit(shape: Shape, config: Config, gpu: Gpu, gpus: int, prompt: int, groups: list[list[int]]) -> float:
    """Least time of a phase: that of the slowest rank. groups: lengths per prompt; rank r samples groups[r::gpus]. As
    many responses run together as the cache holds, but at most max_requests. A response has on average its prompt and
    half its length in the cache; a long one runs longer, so lengths are weighted by length."""
    lengths = sum(groups, [])
    typical = prompt + sum(length**2 for length in lengths) / (2 * sum(lengths))
    slots = max(1, min(config.max_requests or REQUESTS, int(cache_room(shape, config, gpus, gpu) / typical)))
    shares = (sum(groups[rank::gpus], []) for rank in range(gpus))
    return max(decode_seconds(shape, gpu, prompt, share, slots, value_bytes(config)) for share in shares)


def ideal_seconds(shape: Shape, config: Config, work: Work, gpu: Gpu, gpus: int, kept: float = 1.0) -> dict:
    """One step: {"seconds": {phase: s}, "recomputing": s, where layers are or would be, "responses": n,
    "response_tokens": n, "trained_tokens": n}. config must have its gradient_checkpointing decided."""
    prompt, passages, method, whole = work.prompt, config.passages_per_step, METHODS[config.method], gpus * gpu.flops
    seconds, lengths, bundles = {}, [], []
    for number, (name, *size) in enumerate(phases(config)):
        groups = response_lengths(*size, work, number)
        seconds["prefill"] = seconds.get("prefill", 0.0) + len(groups) * forward_flops(shape, prompt) / whole
        seconds[name] = decode_limit(shape, config, gpu, gpus, prompt, groups)
        lengths += sum(groups, [])
        if name == "predict" or config.train_generator:
            bundles += [(prompt, group) for group in groups]
    if method.samples is answer_samples:  # a few words each
        bundles = [(prompt, [8])] * sum(tasks_per_passage(config, config.method))
    elif not method.predict:
        bundles = [(prompt, [])] * passages
    alone = [(prompt, [response]) for prompt, responses in bundles for response in responses] or bundles
    scoring = train_flops(shape, alone) / 3
    scored = scoring * kept if config.kl else 0.0
    if method.reference:  # with `average` the policy scores every thought, too
        scored += passages * forward_flops(shape, prompt) + scoring * (method.reference == "average")
    if scored:
        seconds["scoring"] = scored / whole
    bundles = bundles if config.share_prompts else alone
    tokens, flops = sum(prompt + sum(responses) for prompt, responses in bundles), train_flops(shape, bundles)
    rate = kept * config.updates_per_batch / whole
    seconds["update"] = rate * flops
    again = rate * (flops / 3 - 2 * shape.vocab * shape.hidden * tokens)  # one more forward of the layers, not the head
    if config.gradient_checkpointing:
        seconds["recomputing layers"] = again
    # AdamW reads four and writes three float32 numbers a parameter; refresh reads one and writes the replica
    masters = 0.0 if config.offload else (config.updates_per_batch * 28 + 4) / gpus
    seconds["optimizer, refresh"] = shape.parameters * (masters + value_bytes(config)) / gpu.bandwidth
    counts = {"responses": len(lengths), "response_tokens": sum(lengths), "trained_tokens": int(kept * tokens)}
    return {"seconds": seconds, "recomputing": again} | counts


# ------------------------------------------------------------------------------------------------------------ the plan

# The models of our configs: what their config.json on the hub says of sizes
ARCHITECTURES = json.loads((Path(__file__).parent / "architectures.json").read_text())


def architecture(name: str):
    """The transformers config of a model, from its config.json on disk or ARCHITECTURES; ConfigError without either."""
    try:  # a folder, or a name of the hub in its cache
        return AutoConfig.from_pretrained(Path(name).expanduser(), trust_remote_code=False, local_files_only=True)
    except OSError:
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ConfigError(f"model={name!r}: no config.json at hand, and not one of {known}") from None
    return AutoConfig.for_model(**ARCHITECTURES[name])


def advice(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> str:
    """Whether it fits. If not: what is too large, and the keys of which each alone can make it fit."""
    longest = config.max_prompt_tokens + max(config.max_mask_tokens, config.max_prediction_tokens)

    def shortage(config: Config) -> str:
        for moment, parts in gpu_memory(shape, config, gpus).items():
            if (need := sum(parts.values())) > gpu.memory:
                return f"{need / 1e9:.0f} GB in {moment}"
        room = cache_room(shape, config, gpus, gpu)
        return "" if room >= longest else f"a cache for {room:,} tokens, a request of {longest:,}"

    if not (short := shortage(config)):
        need = sum(gpu_memory(shape, config, gpus)["training"].values())
        return f"fits: {(gpu.memory - need) / 1e9:.0f} GB to spare in training"
    extremes = {"gradient_checkpointing": True, "tokens_per_micro_batch": longest, "cache_memory": 0.9}
    extremes |= {} if needs_reference(config) else {"offload": True}
    keys = [key for key, value in extremes.items() if not shortage(replace(config, **{key: value}))]
    return f"does not fit: {short}; change {', '.join([*keys, 'gpus, gpu or model'])}"


def print_plan(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word."""
    options, config = read_words(words, PlanOptions)
    if options.gpu not in (*GPUS, "cpu"):
        raise ConfigError(f"gpu={options.gpu!r}: must be one of {', '.join(GPUS)}, cpu")
    cpu, gpus, shape = options.gpu == "cpu", options.gpus, shape_of(architecture(config.model))
    gpu, config = (measure_cpu(gpus), replace(config, liger=False)) if cpu else (GPUS[options.gpu], config)
    asked, config = str(config.gradient_checkpointing).lower(), decided(shape, config, gpus, gpu.memory)
    n, width, method = shape.parameters, value_bytes(config), METHODS[config.method]
    print(f"{config.model}: {n:,} parameters; {gpus} x {gpu.name}; method {config.method}\n")

    # ---- memory of a GPU in training, of the host, on disk
    ways = [gpu_memory(shape, replace(config, gradient_checkpointing=on), gpus)["training"] for on in (False, True)]
    print(f"{'memory per GPU, GB':32}{'stored':>12}{'recomputed':>12}")
    for name in ways[0]:
        print(f"  {name:30}" + "".join(f"{way[name] / 1e9:12.2f}" for way in ways))
    total = "".join(f"{sum(way.values()) / 1e9:12.2f}" for way in ways)
    print(f"  {'all of it, in training':30}{total}   of {gpu.memory / 1e9:.0f}, if live all at once")
    taken = "recomputed" if config.gradient_checkpointing else "stored"
    print(f"gradient_checkpointing={asked}: activations of {config.tokens_per_micro_batch:,} tokens are {taken}")
    # float32 masters, Adam's two moments, a moving average (rlp), the Hugging Face model
    checkpoint = n * (12 + 4 * (method.reference == "average") + width)
    # with offload masters, gradients and Adam; what a checkpoint is written from
    host = n * 16 * config.offload + (config.save_every > 0) * checkpoint
    print(f"host memory per node of {gpus} GPUs: {host / 1e9:.0f} GB in the run, {gpus * width * n / 1e9:.0f} GB while "
          f"the model is loaded; a checkpoint: {checkpoint / 1e9:.0f} GB")  # fmt: skip
    verdict = advice(shape, config, gpus, gpu)
    print(f"  {verdict}")
    if not verdict.startswith("fits"):
        return

    # ---- work and seconds of a step, hours of a run
    ideal = ideal_seconds(shape, config, options, gpu, gpus, options.kept)
    print()
    if ideal["responses"]:
        room = cache_room(shape, config, gpus, gpu)
        print(f"sampler's cache per GPU: {room * cache_bytes(shape, width) / 1e9:.1f} GB, {room:,} tokens")
        print(f"a step: {ideal['responses']:,} responses, mean {options.mean_response:.0f} tokens after prompts of "
              f"{options.prompt}: {ideal['response_tokens']:,} response tokens")  # fmt: skip
    print(f"tokens trained in a step: {ideal['trained_tokens']:,}\n")
    print(f"{'seconds a step':32}{'ideal':>10}{'estimate':>10}")
    shares = dict.fromkeys(("propose", "predict", "optimizer, refresh"), options.decode_share)
    times = {name: (least, least / shares.get(name, options.mfu)) for name, least in ideal["seconds"].items()}
    times["step"] = [sum(column) for column in zip(*times.values(), strict=True)]
    for name, (least, estimate) in times.items():
        print(f"  {name:30}{least:10.2f}{estimate:10.2f}")
    if not config.gradient_checkpointing:
        least = ideal["recomputing"]
        print(f"  {'recomputed layers would add':30}{least:10.2f}{least / options.mfu:10.2f}")
    unit, each = ("minutes", 1 / 60) if cpu else ("GPU hours", gpus / 3600)
    whole = "".join(f"{total * config.steps * each:10.0f}" for total in times["step"])
    print(f"  {f'{unit}, {config.steps} steps':30}{whole}")
    rates = "measured now" if cpu else "of the data sheet (bfloat16; float32 takes several times longer)"
    print(f"\nideal: every byte and FLOP at the rates {rates}. estimate: {options.decode_share:.0%} of it in decoding, "
          f"{options.mfu:.0%} elsewhere.\nkept={options.kept}: a run drops groups with equal rewards. Not counted: "
          "traffic between GPUs and with the host, probes, checkpoints, a warm-up method.")  # fmt: skip
