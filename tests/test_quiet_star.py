"""quiet_star: the mixture, its gradients against a plain loop, two ranks, its parameters in a checkpoint, a run.
Two ranks: torchrun --nproc_per_node=2 tests/test_quiet_star.py OUT MODEL
"""

import copy
import json
import shutil
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from reference import CaptureGradients, largest_error, load_plain, make_run, tiny_config, wiki_passages
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo import Group, bundle, make_micro_batches, score
from methods import METHODS
from metrics import read_rows
from model import load_replica, load_tokenizer, refresh
from ranks import start_ranks
from relatives.quiet_star import Quiet, Thought, grade_thoughts, pack_thoughts, talk, thought_samples
from relatives.rlp import Position
from rollout import Rollout, make_sampler

METHOD = METHODS["quiet_star"]
SIZES = {"max_prompt_tokens": 100, "max_prediction_tokens": 5, "ahead_tokens": 3, "max_grad_norm": 1e9}


def quiet_run(folder: Path, ranks, budget: int = 400, **changes):
    """A run whose marks and mixing head are far from their start, and its replica alike."""
    keys = SIZES | {"method": "quiet_star", "share_prompts": True, "tokens_per_micro_batch": budget} | changes
    config = tiny_config(folder, **keys)
    run = make_run(make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks), wiki_passages(3))
    noise = torch.Generator().manual_seed(1)
    for own in run.policy.extra.parameters():
        whole = torch.randn(own.shape, generator=noise) * 0.15
        own.data.copy_(torch.distributed.tensor.distribute_tensor(whole, own.device_mesh, own.placements))
    refresh(run.policy, run.sampler.replica)
    return run


def thought_tasks(run, places: int | None = None):
    """Tasks with thoughts of random tokens, whose sampler was off by noise; the last place has one token ahead."""
    tasks = [task for group in METHOD.propose(run, run.corpus.train, 0) for task in group][:places]
    tasks[-1].position.ahead_ids = tasks[-1].position.ahead_ids[:1]
    noise = torch.Generator().manual_seed(2)
    for task in tasks:
        for _ in range(4):
            ids = torch.randint(256, (5,), generator=noise).tolist()
            logprobs = (-6 + torch.randn(5, generator=noise)).tolist()
            task.predictions.append(Rollout(task.prompt_ids, ids, logprobs, "", "length"))
    return tasks


def hidden_states(model, quiet: Quiet, prefix: list[int], thought: list[int], ahead: list[int]):
    """Of the ordinary model on text, mark, thought, mark, text; (tokens, H)."""
    text, said, rest = (model.get_input_embeddings()(torch.tensor(ids)) for ids in (prefix, thought, ahead))
    row = torch.cat([text, quiet.marks[:1], said, quiet.marks[1:], rest])[None]
    return model.model(inputs_embeds=row).last_hidden_state[0]


def plain_loss(model, quiet: Quiet, tasks, config):
    """(loss, rewards) by the equations of quiet_star.py, a thought at a time; it mixes log-probs, not logits."""
    rewards, terms = [], []
    for task in tasks:
        prefix, ahead, rows = task.position.prefix_ids, task.position.ahead_ids, []
        before = model.model(input_ids=torch.tensor([prefix + ahead])).last_hidden_state[0, len(prefix) - 1 : -1]
        for thought in task.predictions:
            ids = thought.completion_ids
            hidden = hidden_states(model, quiet, prefix, ids, ahead)
            after = hidden[-len(ahead) - 1 : -1]
            weight = torch.sigmoid((torch.cat([before, after], -1) @ quiet.inner.T).relu() @ quiet.outer)[:, None]
            one, two = (model.lm_head(states).log_softmax(-1) for states in (before, after))
            mixed = ((1 - weight) * one + weight * two).log_softmax(-1)[range(len(ahead)), ahead]
            own = model.lm_head(hidden[len(prefix) : len(prefix) + 5]).log_softmax(-1)[range(5), ids]
            importance = (own.detach() - torch.tensor(thought.sampler_logprobs)).exp().clamp(max=config.max_importance)
            rows.append((mixed.mean(), (importance * own).sum()))
        rewards.append([one.item() for one, _ in rows])
        terms += [one + max(0.0, one.item() - sum(rewards[-1]) / 4) * own for one, own in rows]
    return -torch.stack(terms).mean(), rewards


def compare(run, tasks) -> dict:
    """One update and one grading of the run against the plain loop: largest errors."""
    plain = load_plain(run.config.model)
    plain.extra = copy.deepcopy(run.sampler.replica.extra).requires_grad_()
    found, expected = CaptureGradients(run.policy), CaptureGradients(plain)
    loss, rewards = plain_loss(plain, plain.extra, tasks, run.config)
    loss.backward()
    expected.step()
    grade_thoughts(run, tasks)
    samples = thought_samples(run, [Group("pred", task.predictions, task.rewards) for task in tasks], tasks, [])
    metrics = METHOD.update(run.policy, found, samples, run.config, run.ranks, 0)
    flat = zip(sum((task.rewards for task in tasks), []), sum(rewards, []), strict=True)
    return {
        "rewards": max(abs(one - other) for one, other in flat),
        "gradients": largest_error(found.gradients, expected.gradients),
        "own": [one.abs().max().item() for name, one in expected.gradients.items() if "extra." in name],
        "sizes": [len(batch.thoughts) for batch in make_micro_batches(samples, run.config, run.ranks, pack_thoughts)],
        "graded": [*sum(rewards, []), metrics["quiet/gain"], metrics["quiet/mix"], metrics["entropy"]],
    }


def test_passages_that_begin_alike_share_no_text_behind_the_position(folders, ranks):
    """Each thought is scored by the text of its own passage, also where a prompt is computed once."""
    run = quiet_run(folders["smollm3"], ranks)
    ends = [Position([5, 6], ahead) for ahead in ([10, 11], [20, 21], [10, 11])]
    samples = [Thought(Rollout([5, 6, 7], [8], [0.0], "", "length"), 0.0, place=place) for place in ends]
    assert [[one.place.ahead_ids[0] for one in part] for part in bundle(samples, run.config)] == [[10, 10], [20]]


@pytest.mark.parametrize(("family", "budget"), [("smollm3", 140), ("smollm3", 10_000), ("qwen3_untied", 140)])
def test_rewards_and_gradients_equal_the_plain_loop(folders, ranks, family, budget):
    run = quiet_run(folders[family], ranks, budget)
    result = compare(run, thought_tasks(run))
    assert result["rewards"] < 1e-5 and result["gradients"] < 1e-4
    assert len(result["own"]) == 3 and min(result["own"]) > 1e-4  # each of its own parameters is trained


@torch.no_grad()
def test_at_weight_0_the_mixture_is_the_plain_model(folders, ranks):
    run = quiet_run(folders["smollm3"], ranks, 10_000)
    thoughts = [Thought(one, 0.0, place=task.position) for task in thought_tasks(run) for one in task.predictions]
    (batch,) = make_micro_batches(thoughts, run.config, ranks, pack_thoughts)
    texts = [(one.place.prefix_ids, one.place.ahead_ids) for one in batch.thoughts]
    expected = torch.tensor(sum((logprobs for logprobs, _ in score(run.policy, texts, run.config, ranks)), []))
    *_, mixed, mix, plain = run.policy(forward=talk, batch=batch, temperature=1.0, **batch.inputs)
    assert 0.1 < mix.min() and mix.max() < 0.9 and (mixed - plain).abs().max() > 0.1
    run.policy.extra.outer.data.to_local().fill_(-1e6)
    *_, mixed, mix, _ = run.policy(forward=talk, batch=batch, temperature=1.0, **batch.inputs)
    assert mix.max() == 0 and (mixed - plain).abs().max() < 1e-6  # in the same row; other rows round otherwise:
    assert ((mixed - expected) / expected).abs().max() < 1e-6


def test_thoughts_of_one_length_are_sampled_behind_the_learned_mark_at_places_of_the_text(folders, ranks):
    """Also where an end of sequence is among their tokens."""
    run = quiet_run(folders["smollm3"], ranks, predictions_per_mask=20)
    run.sampler.eos_ids = set(range(128))
    tasks = [group[0] for group in METHOD.propose(run, run.corpus.train, 0)]
    METHOD.predict(run, tasks, 0)
    plain, quiet = load_plain(run.config.model), run.sampler.replica.extra
    for task in tasks:
        prefix, ahead = task.position.prefix_ids, task.position.ahead_ids
        assert task.prompt_ids == [*prefix, 257] and 8 <= len(prefix) <= 100 - 2 * 3 and 1 <= len(ahead) <= 3
        assert run.sampler.tokenizer.decode(prefix + ahead) in task.passage.text
        for thought in task.predictions:
            assert len(thought.completion_ids) == 5 and max(thought.completion_ids) < 257
            hidden = hidden_states(plain, quiet, prefix, thought.completion_ids, [1])[len(prefix) : len(prefix) + 5]
            own = plain.lm_head(hidden).log_softmax(-1)[range(5), thought.completion_ids]
            assert (own - torch.tensor(thought.sampler_logprobs)).abs().max() < 1e-4


def test_thoughts_below_the_mean_of_their_position_are_left_out(folders, ranks):
    tasks, rewards = thought_tasks(quiet_run(folders["smollm3"], ranks), 2), [[-1.0, -4.0, -1.0, -2.0], [-2.0] * 4]
    groups = [Group("pred", task.predictions, earned) for task, earned in zip(tasks, rewards, strict=True)]
    samples = thought_samples(None, groups, tasks, [])
    assert [one.advantage / 5 for one in samples] == [1.0, 0.0, 1.0, *[0.0] * 5]  # 5 tokens share a thought's weight
    assert sum(one.weight * 5 for one in samples) == pytest.approx(1)


@pytest.mark.slow
def test_two_ranks_equal_the_plain_loop_and_one_rank(command, folders, ranks, tmp_path):
    """Rewards, gradients and metrics; one rank has nothing to do in one of its micro-batches."""
    assert not (ended := command([__file__, tmp_path, folders["smollm3"]], limit=120, ranks=2)).returncode, ended.stderr
    alone = compare(run := quiet_run(folders["smollm3"], ranks, 125), thought_tasks(run, 3))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    sizes = [result.pop("sizes") for result in (first, second)]
    assert first == second and first["rewards"] < 1e-5 and first["gradients"] < 1e-4
    assert first["graded"] == pytest.approx(alone["graded"], abs=1e-5)
    assert sorted(sizes[0] + sizes[1]) == [0, 4, 4, 4]


@pytest.mark.slow
def test_a_run_of_three_steps_resumes_bit_for_bit_and_exports_its_parameters(command, tmp_path):
    words = "steps=3 save_every=1 passages_per_step=2 predictions_per_mask=3 probe_passages=4 probe_samples=1".split()
    words = ["train.py", "configs/tiny-quiet-star.yaml", *words, f"run_dir={tmp_path}"]
    steps, kept = tmp_path / "checkpoints", ["extra.safetensors", "hf/model.safetensors"]

    def train():
        ended = command(words, limit=120)
        assert ended.returncode == 0, ended.stderr[-3000:]
        *_, row = read_rows(tmp_path / "metrics.jsonl")
        row = {key: row[key] for key in row if not key.startswith(("time/", "tokens_per", "peak_"))}
        files = [*(steps / "step_000003/state").glob("*.distcp"), *(steps / "step_000003" / name for name in kept)]
        return row, [path.read_bytes() for path in files]

    first = train()
    assert first[0]["step"] == 3 and first[0]["grad_norm"] > 0 and 0.2 < first[0]["quiet/mix"] < 0.8
    shutil.rmtree(steps / "step_000003")
    assert train() == first and len(first[1]) == 3
    own, before = (load_file(steps / f"step_00000{step}" / kept[0]) for step in (3, 2))
    assert len(own) == 3 and not any(torch.equal(own[name], before[name]) for name in own)
    model, told = AutoModelForCausalLM.from_pretrained(steps / "step_000003/hf", output_loading_info=True)
    assert not any(told.values()) and model.num_parameters() == 478_080
    card = (steps / "step_000003/hf/README.md").read_text()
    assert "`extra.safetensors`, beside this folder" in card and "478,080 parameters" in card


def main(out: Path, model: Path) -> None:
    ranks = start_ranks()
    result = compare(run := quiet_run(model, ranks, 125), thought_tasks(run, 3))
    (out / f"{ranks.rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
    os._exit(0)  # as train.py leaves: library threads may abort a normal exit


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
