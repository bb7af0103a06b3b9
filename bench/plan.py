"""What a run costs, by arithmetic alone: memory per GPU (bench/memory.py), cache room, ideal seconds, GPU hours.

No kernel can be faster than the ideal: every byte and FLOP at the full rate of the device. 1 GB = 1e9 bytes.
"""

import heapq
import timeit
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig

from bench.memory import Shape, activation_bytes, decided, gpu_memory, memory_of, shape_of, value_bytes
from bench.options import Options, phases, read_words, response_lengths, text_table
from config import Config, ConfigError
from methods import METHODS, answer_samples, tasks_per_passage
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


def decode_seconds(shape: Shape, gpu: Gpu, prompt: int, lengths: list[int], slots: int, width: int = 2) -> float:
    """Least time in which one GPU decodes responses of these lengths, `slots` at a time, each followed by the next. A
    decode step gives every running response a token. It takes as long as its reads (weights once; keys and values of
    these responses and their prompts) or its multiplications, whichever is longer."""
    waiting, running = deque(lengths), []  # running: a heap of (decode step at which it ends, length)
    now, context, seconds = 0, 0, 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            length = waiting.popleft()
            heapq.heappush(running, (now + length, length))
            context += prompt
        steps = running[0][0] - now  # nothing changes until the first of them ends
        reads = context + len(running) * (steps - 1) / 2  # mean over these steps
        from_memory = (width * shape.read(len(running)) + reads * cache_bytes(shape, width)) / gpu.bandwidth
        multiplying = (2 * shape.read(1) * len(running) + pair_flops(shape) * reads) / gpu.flops
        seconds += steps * max(from_memory, multiplying)
        now, context = now + steps, context + len(running) * steps
        while running and running[0][0] == now:
            context -= prompt + heapq.heappop(running)[1]
    return seconds


def decode_limit(shape: Shape, config: Config, gpu: Gpu, gpus: int, room: int, prompt: int, groups: list) -> float:
    """Least time of a phase: that of the slowest rank. groups: lengths per prompt; rank r samples groups[r::gpus]. As
    many responses run together as a cache of `room` tokens holds, but at most max_requests. A response has on average
    its prompt and half its length in the cache; a long one runs longer, so lengths are weighted by length."""
    lengths = sum(groups, [])
    typical = prompt + sum(length**2 for length in lengths) / (2 * sum(lengths))
    slots = max(1, min(config.max_requests or REQUESTS, int(room / typical)))
    shares = (sum(groups[rank::gpus], []) for rank in range(gpus))
    return max(decode_seconds(shape, gpu, prompt, share, slots, value_bytes(config)) for share in shares)


def cache_room(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> int:
    """Tokens in the sampler's cache on each GPU: its share of the free memory, less the logits of one decode step. The
    sampler also sets aside one layer's worth per token to read from, and 16 bytes of indices."""
    width = value_bytes(config)
    free = config.cache_memory * (gpu.memory - sum(gpu_memory(shape, config, gpus)["rollouts"].values()))
    free -= (config.max_requests or REQUESTS) * (4 * shape.vocab + width * shape.hidden)
    each = cache_bytes(shape, width)
    return max(0, int(free / (each + each / shape.layers + 16)))


# The models of our configs, from the config.json on their hub pages
_SIZES = ("model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
          "num_key_value_heads head_dim tie_word_embeddings").split()  # fmt: skip
ARCHITECTURES = {
    "HuggingFaceTB/SmolLM2-135M": ("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "HuggingFaceTB/SmolLM3-3B-Base": ("smollm3", 128256, 2048, 11008, 36, 16, 4, 128, True),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "Qwen/Qwen3-4B-Base": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "Qwen/Qwen3-8B-Base": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "Qwen/Qwen3-30B-A3B-Base": ("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 128, False),
}
_EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}


def architecture(name: str):
    """The transformers config of a model, from its config.json on disk or ARCHITECTURES; ConfigError without either."""
    try:  # a folder, or a name of the hub in its cache
        return AutoConfig.from_pretrained(Path(name).expanduser(), trust_remote_code=False, local_files_only=True)
    except OSError:
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ConfigError(f"model={name!r}: no config.json at hand, and not one of {known}") from None
    sizes = dict(zip(_SIZES, ARCHITECTURES[name], strict=True))
    return AutoConfig.for_model(**sizes, **(_EXPERTS if sizes["model_type"] == "qwen3_moe" else {}))


def ideal_seconds(shape: Shape, config: Config, options: Options) -> dict:
    """One step: {"seconds": {phase: s}, "responses": n, "response_tokens": n, "trained_tokens": n, "recomputing": s}.
    recomputing: one more forward of the layers, in `seconds` only if gradient_checkpointing takes it."""
    gpu, gpus, prompt, method = GPUS[options.gpu], options.gpus, options.prompt, METHODS[config.method]
    config, passages, whole = decided(shape, config, gpus, gpu.memory), config.passages_per_step, gpus * gpu.flops
    room, seconds, lengths, bundles = cache_room(shape, config, gpus, gpu), {}, [], []
    for number, (name, *size) in enumerate(phases(config)):
        groups = response_lengths(*size, options, number)
        seconds["prefill"] = seconds.get("prefill", 0.0) + len(groups) * forward_flops(shape, prompt) / whole
        seconds[name] = decode_limit(shape, config, gpu, gpus, room, prompt, groups)
        lengths += sum(groups, [])
        if name == "predict" or config.train_generator:
            bundles += [(prompt, group) for group in groups]
    if method.samples is answer_samples:  # a few words each
        bundles = [(prompt, [8])] * sum(tasks_per_passage(config, config.method))
    elif not method.predict:
        bundles = [(prompt, [])] * passages
    alone = [(prompt, [response]) for prompt, responses in bundles for response in responses] or bundles
    scoring = sum(forward_flops(shape, prompt + sum(response)) for prompt, response in alone)
    scored = scoring * options.kept if config.kl else 0.0
    if method.reference:  # with `average` the policy scores every thought, too
        scored += passages * forward_flops(shape, prompt) + scoring * (method.reference == "average")
    if scored:
        seconds["scoring"] = scored / whole
    bundles = bundles if config.share_prompts else alone
    flops, tokens = train_flops(shape, bundles), sum(prompt + sum(responses) for prompt, responses in bundles)
    rate = options.kept * config.updates_per_batch / whole
    seconds["update"] = rate * flops
    recomputing = rate * (flops / 3 - 2 * shape.vocab * shape.hidden * tokens)  # the head aside
    if config.gradient_checkpointing:
        seconds["recomputing layers"] = recomputing
    # AdamW reads four and writes three float32 numbers a parameter; refresh reads one and writes the replica
    masters = 0.0 if config.offload else (config.updates_per_batch * 28 + 4) / gpus
    seconds["optimizer, refresh"] = shape.parameters * (masters + value_bytes(config)) / gpu.bandwidth
    return {"seconds": seconds, "responses": len(lengths), "response_tokens": sum(lengths),
            "trained_tokens": int(options.kept * tokens), "recomputing": recomputing}  # fmt: skip


def advice(shape: Shape, config: Config, gpus: int, gpu: Gpu) -> str:
    """Whether it fits; if not, the key to change and, where one helps, its largest value that fits."""
    stored, config = config.gradient_checkpointing, decided(shape, config, gpus, gpu.memory)
    longest = config.max_prompt_tokens + max(config.max_mask_tokens, config.max_prediction_tokens)
    memory = gpu_memory(shape, config, gpus)
    # with offload GPUs share nothing but host memory
    more = "change gpu= or model=" if config.offload else "raise gpus=, or change gpu= or model="
    for moment, parts in memory.items():
        fixed = sum(parts.values()) - parts.get("activations", 0)
        if fixed > gpu.memory:
            least = gpu_memory(shape, replace(config, offload=True, gradient_checkpointing=True), gpus)["training"]
            if not config.offload and "second copy" not in least and sum(least.values()) <= gpu.memory:
                more = "set offload=true, " + more
            return f"does not fit: {fixed / 1e9:.0f} GB in {moment} before any activation; {more}"
    if fixed + memory["training"]["activations"] > gpu.memory:
        per_token = {on: activation_bytes(shape, 1, on, value_bytes(config), config.liger) for on in (False, True)}
        if stored is False and fixed + per_token[True] * longest <= gpu.memory:
            return "does not fit: set gradient_checkpointing=true, or lower tokens_per_micro_batch"
        tokens = int((gpu.memory - fixed) / per_token[config.gradient_checkpointing]) // 256 * 256
        if tokens >= longest:
            return f"does not fit: set tokens_per_micro_batch={tokens} or less"
        return (f"does not fit: one sequence of {longest} tokens is too long; {max(tokens, 0)} fit. Lower "
                f"max_prediction_tokens= and max_mask_tokens=, or {more}")  # fmt: skip
    room = cache_room(shape, config, gpus, gpu)
    if room < longest:
        return f"does not fit: cache room of {room:,} tokens, a request of {longest:,}. Raise cache_memory= or {more}"
    return f"fits: {(gpu.memory - sum(memory['training'].values())) / 1e9:.0f} GB to spare in training"


def print_plan(words: list[str]) -> None:
    """The command. Raises ConfigError for a bad word."""
    options, config = read_words(words, "plan")
    if options.gpu == "cpu":  # measured now; Liger's kernels are for GPUs
        GPUS["cpu"], config = measure_cpu(options.gpus), replace(config, liger=False)
    if options.gpu not in GPUS:
        raise ConfigError(f"gpu={options.gpu!r}: must be one of {', '.join(GPUS)}")
    gpu, gpus, shape = GPUS[options.gpu], options.gpus, shape_of(architecture(config.model))
    n, width, method = shape.parameters, value_bytes(config), METHODS[config.method]
    print(f"{config.model}: {n:,} parameters; {gpus} x {gpu.name}; method {config.method}")
    if shape.experts:
        share = f"{shape.experts_per_token} of {shape.experts} experts a layer"
        print(f"a token is multiplied with {shape.read(1):,} of them: {share}")

    # ---- memory of a GPU in training, of the host, on disk
    ways = [gpu_memory(shape, replace(config, gradient_checkpointing=on), gpus)["training"] for on in (False, True)]
    rows = [(f"  {name}", *(f"{way[name] / 1e9:.2f}" for way in ways)) for name in ways[0]]
    rows.append(("  all of it, in training", *(f"{sum(way.values()) / 1e9:.2f}" for way in ways)))
    lines = text_table([("memory per GPU, GB", "stored", "recomputed"), *rows], 32, 12)
    print("", *lines, sep="\n", end=f"   of {gpu.memory / 1e9:.0f}, if live all at once\n")
    asked = str(config.gradient_checkpointing).lower()
    taken = "recomputed" if decided(shape, config, gpus, gpu.memory).gradient_checkpointing else "stored"
    print(f"gradient_checkpointing={asked}: activations of {config.tokens_per_micro_batch:,} tokens are {taken}")
    # float32 masters, Adam's two moments, a moving average (rlp), the Hugging Face model
    checkpoint = n * (12 + 4 * (method.reference == "average") + width)
    # with offload masters, gradients and Adam; what a checkpoint is written from
    host = n * 16 * config.offload + (config.save_every > 0) * checkpoint
    moved = f"; a micro-batch moves {12 * n / gpus / 1e9:.0f} GB per GPU there and back" if config.offload else ""
    print(f"host memory per node of {gpus} GPUs: {host / 1e9:.0f} GB in the run, {gpus * width * n / 1e9:.0f} GB while "
          f"the model is loaded{moved}")  # fmt: skip
    if config.save_every:
        most = f"{config.keep_last + 1} of them at most" if config.keep_last else "none is deleted"
        print(f"disk: {checkpoint / 1e9:.0f} GB a checkpoint, {most}")
    verdict = advice(shape, config, gpus, gpu)
    print(f"  {verdict}")
    if not verdict.startswith("fits"):
        return

    # ---- work and seconds of a step, hours of a run
    ideal = ideal_seconds(shape, config, options)
    print()
    if ideal["responses"]:
        room, request = cache_room(shape, config, gpus, gpu), options.prompt + options.mean_response
        print(f"sampler's cache per GPU: {room * cache_bytes(shape, width) / 1e9:.1f} GB, {room:,} tokens, "
              f"{int(room / request):,} requests of {request:.0f} tokens; max_requests lets "
              f"{config.max_requests or REQUESTS:,} run")  # fmt: skip
        print(f"a step: {ideal['responses']:,} responses, mean {options.mean_response:.0f} tokens after prompts of "
              f"{options.prompt}: {ideal['response_tokens']:,} response tokens")  # fmt: skip
    print(f"tokens trained in a step: {ideal['trained_tokens']:,}\n")
    shares = dict.fromkeys(("propose", "predict", "optimizer, refresh"), options.decode_share)
    times = {name: (s, s / shares.get(name, options.mfu)) for name, s in ideal["seconds"].items()}
    times["step"] = whole = [sum(column) for column in zip(*times.values(), strict=True)]
    if "recomputing layers" not in times:
        times["recomputing layers would add"] = ideal["recomputing"], ideal["recomputing"] / options.mfu
    source = "a rate measured now" if options.gpu == "cpu" else "the data sheet's rate"
    unit, each = ("minutes", 1 / 60) if options.gpu == "cpu" else ("GPU hours", gpus / 3600)
    rows = [(f"  {name}", *(f"{value:.2f}" for value in pair)) for name, pair in times.items()]
    rows.append((f"  {unit}, {config.steps} steps", *(f"{total * config.steps * each:.0f}" for total in whole)))
    print(*text_table([("seconds a step", "ideal", "estimate"), *rows], 32, 10), sep="\n")
    print(f"\nideal: every byte and FLOP at {source}. "
          f"estimate: {options.decode_share:.0%} of it in decoding, {options.mfu:.0%} elsewhere.")  # fmt: skip
    print("Not counted: start-up of the sampler, traffic between GPUs and with the host, probes, checkpoints, "
          "a warm-up method" + (", the optimizer on the host." if config.offload else "."))  # fmt: skip
    if options.kept == 1 and ideal["responses"]:
        print("kept=1: every group is trained on. A run drops groups with equal rewards: lower it.")
    if config.dtype == "float32" and options.gpu != "cpu":
        print("dtype=float32: the times are those of bfloat16 tensor cores; float32 takes several times longer.")
