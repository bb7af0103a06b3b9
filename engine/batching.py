"""What rollout.py changes in transformers' continuous batching: its settings, and habits of a phase.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers.generation import ContinuousBatchingConfig

from config import Config
from engine.cache import table_reader
from ops import VARLEN


def decoding(replica: nn.Module) -> str:
    """How a decoding step reads the paged cache: `flash-attn`, `block table`, or `gathered: ` and why not in place."""
    shape = replica.config.get_text_config()
    if shape._attn_implementation != VARLEN:
        return "flash-attn"
    heads = shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    dim = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    trouble = table_reader(replica.device, replica.dtype, heads, kv_heads, dim)[1]
    return f"gathered: {trouble}" if trouble else "block table"


def describe_attention(replica: nn.Module) -> str:
    """What a user is told: the kernels, and how a decoding step reads the cache."""
    return f"attention {replica.config._attn_implementation}, decoding: {decoding(replica)}"


def batching_settings(
    config: Config, replica, prompts: list[list[int]], max_tokens: int, requests: int, seed: int
) -> ContinuousBatchingConfig:
    """The sampler's settings. On a GPU the cache takes its share of free memory; on a CPU just what the phase needs."""
    # NCCL graph mixing is for tensor-parallel samplers; ours runs no collective
    options = {"return_logprobs": True, "seed": seed, "auto_switch_to_flash": False, "disable_nccl_graph_mixing": False}
    if replica.device.type == "cuda":
        # A graph needs kernels that ask the CPU for nothing. None for prefill: hardly two batches have the same shape
        how = decoding(replica)
        able = how == "flash-attn" or (how == "block table" and replica.dtype != torch.float32)
        at_once, graphs = config.max_requests or 512, (False, able and config.use_cuda_graph)  # (prefill, decoding)
        options |= {"max_memory_percent": config.cache_memory, "use_cuda_graph": graphs, "use_async_batching": True}
    else:
        at_once, page = config.max_requests or 256, 32
        pages = sorted((-(-(len(prompt) + max_tokens) // page) + 1 for prompt in prompts), reverse=True)
        count = requests // len(prompts)
        # The longest that may run at once, and a quarter more for shared prompts and forks; the rest waits its turn
        most = count * sum(pages[: -(-2 * at_once // count)])
        # Room for many prompts in one forward: one that mixes prompts and decoding is the slow case of ops.py
        room = max(at_once, min(8192, sum(map(len, prompts)) + requests))
        options |= {"page_size": page, "num_blocks": most * 5 // 4 + 8, "max_batch_tokens": room}
    return ContinuousBatchingConfig(max_requests_per_batch=min(at_once, requests), **options)


LEAST_ROWS = 16  # of a decoding step in a CUDA graph: fewer take as long, and would be more graphs to capture


def adapt(manager, requests: int) -> None:
    """Makes the sampler's objects for one phase, and changes their habits.

    A batch of padding alone (while prompts wait to be forked) is not computed: it would draw from rows that no kernel
    wrote, and NaN there kills the process. Decoding is padded to LEAST_ROWS, any other batch to the places: with fewer
    rows than requests the last ones would be cut off. Its longest query is the true one, not all of its rows, so that
    the kernel starts no blocks in vain. Where requests outnumber places, new ones wait until an eighth of the places is
    free: one prompt in a batch sends all others down the slow path. Block tables on the host are filled without tensor
    operations, three a request, which would take a third of the host's time in a step.
    """
    processor = manager.batch_processor = manager._create_batch_processor()
    runner, scheduler, buffers = processor.model_runner, processor.scheduler, processor.inputs_and_outputs
    compute, pad, schedule = runner.compute_batch, runner.maybe_pad_inputs, scheduler.schedule_batch
    places, asynchronous = scheduler.max_requests_per_batch, hasattr(buffers, "io_pairs")  # then two sets take turns

    def compute_batch(model, batch_data):
        pair = buffers.io_pairs[buffers.current_pair] if asynchronous else None
        if pair and not buffers.use_block_table:
            batch_data["max_length_q"] = max(2, pair.host_io.max_length_q)
        if (pair.device_io if pair else buffers).total_seqlen_q:
            compute(model, batch_data)

    def maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path):
        least = (runner.least_rows if use_decode_fast_path else places) if runner.pad_inputs else 0
        return pad(max(num_q_tokens, least), max_kv_read, use_decode_fast_path)

    def schedule_batch(*budgets):
        blocked, full = scheduler.block_new_requests, len(scheduler.active_requests) > places - places // 8
        scheduler.block_new_requests = blocked or (requests > places and full)
        batch = schedule(*budgets)
        scheduler.block_new_requests = blocked
        return batch

    def fill_row(allocator, request_id, past_length, query_length, row):
        stride = allocator.block_physical_stride // allocator.tokens_per_page
        pages = [page * stride for page in allocator.block_table[request_id]]
        row.numpy()[: len(pages)] = pages

    for allocator in processor.cache.cache_allocators.values() if asynchronous else ():
        allocator.fill_block_table = partial(fill_row, allocator)
    runner.compute_batch, runner.maybe_pad_inputs, runner.least_rows = compute_batch, maybe_pad_inputs, LEAST_ROWS
    scheduler.schedule_batch = schedule_batch


@torch.no_grad()
def capture_graphs(manager) -> bool:
    """Captures decoding in each number of rows that the phase can meet, for both sets of buffers. False if one fails,
    which the sampler only logs. Captured while it decodes, a graph has died under torchrun (transformers#48312)."""
    cache, runner = manager.batch_processor.cache, manager.batch_processor.model_runner
    buffers, places = runner.inputs_and_outputs, runner.cb_config.max_requests_per_batch
    if not runner.use_cuda_graph_decode or cache.max_decode_fast_path_length <= 0:
        return True
    stream = torch.cuda.current_stream() if manager.model.device.type == "cuda" else None
    sizes = [places, *(rows for rows in (LEAST_ROWS << n for n in range(16)) if rows < places)]  # the largest first
    for pair in buffers.io_pairs:
        for runner.least_rows in sizes:
            runner.run_one_warmup(manager.model, 1, None)  # one request, the rest padding: a small cache will do
            buffers.compute_stream.synchronize()  # the next one writes to the same inputs
            if pair.device_io.graphs.get_graph((runner.least_rows,)) is None:
                if stream:  # a capture that fails leaves its own stream current
                    torch.cuda.set_stream(stream)
                return False
        buffers.swap_io_pairs()
    cache.reset()
    runner.least_rows = LEAST_ROWS
    return True
