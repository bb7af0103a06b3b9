"""The sampler as it runs on a GPU, on the CPU: two sets of inputs by turns, batches padded for CUDA graphs.

There the next batch is made before the last one's tokens are known, and kernels leave the rows of padding unwritten.
Streams and events are stood in for, in order, as one stream would run them; unwritten rows hold NaN.
"""

import gzip
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock
from weakref import ref

import pytest
import torch
from reference import ROOT
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner, offloading_manager
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

import ops
import rollout
from bench.step import NEVER, stop_at_limits
from engine import cache
from prompts import MASK_OPENING, mask_prompt

PROMPTS, COUNT, TOKENS, REST = 12, 4, 24, 3
SETTINGS = {
    # every prompt in the first batch: the next one has nothing to do but wait for the forks
    "one prefill": {"page_size": 256, "num_blocks": 200, "max_batch_tokens": 4096, "max_requests_per_batch": 48},
    "prompts in pieces": {"page_size": 16, "num_blocks": 400, "max_batch_tokens": 48, "max_requests_per_batch": 40},
    "requests that wait": {"page_size": 16, "num_blocks": 400, "max_batch_tokens": 512, "max_requests_per_batch": 10},
    # the second batch: prompts that wait for their forks, first in line, and the last tokens (REST) of one prompt
    "a short rest": {"page_size": 256, "num_blocks": 200, "max_requests_per_batch": 48, "q_padding_interval_size": 1},
    "cache taken away": {"page_size": 8, "num_blocks": 40, "max_batch_tokens": 64, "max_requests_per_batch": 16},
}


@pytest.fixture
def prompts(tiny_base):
    with gzip.open(ROOT / "assets/tiny_wiki.jsonl.gz", "rt", encoding="utf-8") as file:
        return [mask_prompt(tiny_base, json.loads(next(file))["text"]) for _ in range(PROMPTS)]


@pytest.fixture
def tiny_base(build_sampler):
    return build_sampler(ROOT / "assets/tiny_base", max_mask_tokens=TOKENS)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Call it, and what follows is sampled the GPU's way; returns counts of what was seen."""
    seen = {"padding": 0, "computed": 0, "taken away": 0, "longest query": 0}

    def per_request(q, k, v, cu_q, cu_k, scale, plain=ops._per_request):
        out, rows, keys = torch.full_like(q, torch.nan), int(cu_q[-1]), int(cu_k[-1])
        seen["padding"] += len(q) - rows
        if rows:
            out[:rows] = plain(q[:rows], k[:keys], v[:keys], cu_q, cu_k, scale)
        return out

    def read_pages(q, k_pages, v_pages, table, lengths, *rest, plain=cache._read_pages_plain):
        seen["padding"] += int((lengths == 0).sum())
        out = plain(q, k_pages, v_pages, table, lengths, *rest)
        return out.masked_fill(lengths[:, None, None] == 0, torch.nan)

    def make_runner(self, *words, make=model_runner.ModelRunner.__init__, **keys):
        make(self, *words, **keys)
        self.pad_inputs = True  # as with CUDA graphs

    def compute(self, *words, compute=model_runner.ModelRunner.compute_batch):
        seen["computed"] += 1
        seen["longest query"] = max(seen["longest query"], words[1]["max_length_q"])
        return compute(self, *words)

    def offload(self, offload=offloading_manager.OffloadingManager.offload_requests):
        seen["taken away"] += 1
        return offload(self)

    def switch():
        monkeypatch.setattr(input_outputs.ContinuousBatchingAsyncIOs, "_supported_device_types", ("cpu",))
        monkeypatch.setattr(input_outputs, "create_device_stream", lambda device: MagicMock())
        monkeypatch.setattr(torch, "Event", lambda *_, **__: MagicMock())
        for module in (input_outputs, model_runner, continuous_api, offloading_manager):
            monkeypatch.setattr(module, "stream_context", lambda stream: nullcontext())
        monkeypatch.setattr(ops, "_per_request", per_request)
        monkeypatch.setattr(cache, "_read_pages_plain", read_pages)
        monkeypatch.setattr(model_runner.ModelRunner, "__init__", make_runner)
        monkeypatch.setattr(model_runner.ModelRunner, "compute_batch", compute)
        monkeypatch.setattr(offloading_manager.OffloadingManager, "offload_requests", offload)
        return seen

    return switch


def likeliest(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
    """In place of a draw, whose noise would depend on the rows of padding; refuses what CUDA's multinomial refuses."""
    assert not probs.isnan().any(), "CUDA would end the process"
    return probs.argmax(-1, keepdim=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gpus_order_of_events_changes_no_response(tiny_base, prompts, as_on_a_gpu, monkeypatch, name):
    monkeypatch.setattr(torch, "multinomial", likeliest)
    asynchronous = False

    def batching(*_):
        options = {"return_logprobs": True, "auto_switch_to_flash": False, "disable_nccl_graph_mixing": False}
        options |= {"max_batch_tokens": sum(map(len, prompts)) - PROMPTS - REST, "use_async_batching": asynchronous}
        return ContinuousBatchingConfig(**options | SETTINGS[name])

    monkeypatch.setattr(rollout, "batching_settings", batching)
    limits = [[2 + (7 * row + 5 * column) % (TOKENS - 1) for column in range(COUNT)] for row in range(PROMPTS)]
    words = (tiny_base, prompts, COUNT, TOKENS, MASK_OPENING, 0)
    with stop_at_limits(limits):
        plain = rollout.generate(*words)
    asynchronous, seen = True, as_on_a_gpu()
    with stop_at_limits(limits):
        found = rollout.generate(*words)
    assert seen["padding"] and bool(seen["taken away"]) == (name == "cache taken away")
    assert 2 < seen["longest query"] <= max(map(len, prompts)) + TOKENS  # of one request: a kernel's grid
    for responses, others in zip(plain, found, strict=True):
        for one, other in zip(responses, others, strict=True):
            assert (one.completion_ids, one.text, one.finish) == (other.completion_ids, other.text, other.finish)
            assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=1e-4)


def test_a_batch_of_padding_alone_is_made_and_not_computed(tiny_base, prompts, as_on_a_gpu, monkeypatch):
    """Were it computed, its rows would be drawn from memory that nobody wrote."""
    made, prepare = [], input_outputs.ContinuousBatchingIOs.prepare_batch_tensors

    def noted(self, requests, *words):
        made.append(sum(request.query_length for request in requests))
        return prepare(self, requests, *words)

    options = {"return_logprobs": True, "auto_switch_to_flash": False, "disable_nccl_graph_mixing": False}
    settings = ContinuousBatchingConfig(use_async_batching=True, **SETTINGS["one prefill"], **options)
    monkeypatch.setattr(rollout, "batching_settings", lambda *_: settings)
    monkeypatch.setattr(torch, "multinomial", likeliest)
    monkeypatch.setattr(input_outputs.ContinuousBatchingIOs, "prepare_batch_tensors", noted)
    seen = as_on_a_gpu()
    rollout.generate(tiny_base, prompts, COUNT, TOKENS, MASK_OPENING, 0)
    assert made[:2] == [sum(map(len, prompts)) - PROMPTS, 0]  # of a prompt to be forked the last token comes after
    assert seen["computed"] == sum(tokens > 0 for tokens in made)


# ---- CUDA graphs, stood in for by closures that run again on the same buffers


@pytest.fixture
def graphs(as_on_a_gpu, monkeypatch):
    """Call it, and decoding runs in graphs of up to 40 rows; the capture of that number fails. Returns their rows."""
    captured: list[int] = []

    def switch(broken: int | None = None):
        as_on_a_gpu()
        monkeypatch.setattr(f"{continuous_api.__package__}.initialization.get_accelerator_graph_name", lambda: "any")
        monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))

        def capture(self, forward, stream, *args):
            captured.append(len(args[1]["input_ids"][0]))
            if len(captured) == broken:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            forward(*args)
            self.inputs_and_outputs.set_graph(SimpleNamespace(replay=lambda: forward(*args), reset=lambda: None))

        monkeypatch.setattr(model_runner.ModelRunner, "_capture_graph", capture)
        monkeypatch.setattr(torch, "multinomial", likeliest)
        monkeypatch.setattr(rollout, "batching_settings", batching)
        return captured

    def batching(config, *_):
        assert not [one for one in caches if one() is not None]  # each has the memory to itself
        options = {"return_logprobs": True, "auto_switch_to_flash": False, "disable_nccl_graph_mixing": False}
        options |= {"use_async_batching": True, "use_cuda_graph": (False, config.use_cuda_graph)}
        return ContinuousBatchingConfig(**options, **SETTINGS["prompts in pieces"])

    caches, original = [], continuous_api.PagedAttentionCache
    monkeypatch.setattr(
        continuous_api, "PagedAttentionCache", lambda **keys: (one := original(**keys), caches.append(ref(one)))[0]
    )
    return switch


def test_every_size_that_a_phase_can_meet_is_captured_before_it_decodes(tiny_base, prompts, graphs):
    captured, words = graphs(), (tiny_base, prompts, COUNT, TOKENS, MASK_OPENING, 0)
    found = [[one.completion_ids for one in group] for group in rollout.generate(*words)]
    assert captured == [40, 16, 32] * 2  # and no more while it decodes; 48 responses, 40 places
    tiny_base.config = replace(tiny_base.config, use_cuda_graph=False)
    assert [[one.completion_ids for one in group] for group in rollout.generate(*words)] == found
    assert len(captured) == 6


@pytest.mark.parametrize("broken", [1, 5])
def test_where_a_capture_fails_the_phase_is_repeated_without_graphs(tiny_base, prompts, graphs, capfd, broken):
    captured, words = graphs(broken), (tiny_base, prompts, COUNT, TOKENS, MASK_OPENING, 0)
    copied, found = replace(tiny_base, frame=None), rollout.generate(*words)
    assert len(captured) == broken
    for sampler in (tiny_base, copied):  # and for the rest of the run, in a copy made before, too
        assert rollout.generate(sampler, *words[1:]) == found and len(captured) == broken
    assert capfd.readouterr().err.count("rank 0: CUDA graphs cannot be captured; sampling without") == 1


@pytest.mark.parametrize("held, slow, steps", [(True, 34, 94), (False, 66, 90)])
def test_new_prompts_wait_until_an_eighth_of_the_places_is_free(tiny_base, prompts, monkeypatch, held, slow, steps):
    """Of 192 responses in 32 places; each response ends at another step."""
    batches, schedule = [], FIFOScheduler.schedule_batch

    def noted(self, *budgets):
        if not held:
            self.block_new_requests = False
        batch = schedule(self, *budgets)
        batches.append(batch[1])
        return batch

    monkeypatch.setattr(FIFOScheduler, "schedule_batch", noted)
    tiny_base.config.max_requests, tiny_base.eos_ids = 32, {10**6}
    limits = [[2 + (5 * row) % (TOKENS - 1)] for row in range(16 * PROMPTS)]
    with stop_at_limits(limits):
        groups = rollout.generate(tiny_base, prompts * 16, 1, TOKENS, NEVER, 0)
    assert [len(one.completion_ids) for (one,) in groups] == sum(limits, [])
    assert (batches.count(False), len(batches)) == (slow, steps)
