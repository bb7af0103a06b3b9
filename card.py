"""The model card of an exported model, and how it is to be sampled: README.md and generation_config.json of `hf/`.

The card says what an upload must: base model, data and their licences where they are known, method, held-out numbers of
the first and the latest probe, command, revision, resolved config, how to load and serve it, what it is not good for.
It tells only what stands in the run directory and the config, so it names no path of the machine that these do not
name. A licence comes from the base model's own card or from DATA_LICENCES, else the reader is sent to look; nothing is
fetched for it. Leaves out the weights and the tokenizer (checkpoint.py).

Alone:  python card.py RUN/checkpoints/latest/hf      prints the card of an exported model, checked as the hub reads it
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from transformers import GenerationConfig

from config import Config, dump_config
from evidence import read_rows, write_whole
from prompts import PREDICT_PROMPT, QUESTION_PROMPT
from rlp import THINK_OPEN, THOUGHT_PROMPT
from sampler import Sampler

DATA_LICENCES = {
    "wikimedia/wikipedia": "CC BY-SA, the licence of Wikipedia's text",
    "openai/gsm8k": "MIT, says its card",
    "HuggingFaceTB/finemath": "ODC-By, says its card",
    "assets/tiny_wiki.jsonl.gz": "MIT, made up by tiny.py of the code's repository",
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
    if config.method == "rlp" or (config.stop_at_answer and not sampler.tokenizer.chat_template):
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


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "README.md").is_file():
        raise SystemExit("usage: python card.py FOLDER      (with a README.md in it)")
    card = ModelCard.load(Path(sys.argv[1]) / "README.md")
    print(card)
    GenerationConfig.from_pretrained(sys.argv[1]).validate(strict=True)


if __name__ == "__main__":
    main()
