"""The model card beside an exported model: what it was trained from, on, how, and what the probe said."""

import re
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from transformers import GenerationConfig

from config import dump_config
from methods import METHODS
from metrics import read_rows
from rollout import Sampler

DATA_LICENCES = {  # of the data that the shipped configs name
    "wikimedia/wikipedia": "CC BY-SA, the licence of Wikipedia's text", "openai/gsm8k": "MIT, says its card",
    "HuggingFaceTB/finemath": "ODC-By, says its card", "assets/tiny_wiki.jsonl.gz": "MIT, made up for this code",
    "assets/tiny_questions.jsonl": "MIT, made up for this code",
}  # fmt: skip


def write_card(folder: Path, sampler: Sampler, step: int) -> None:
    """Adds README.md and generation_config.json to the exported model in `folder`. For rank 0; raises OSError.

    `generate` then samples as the run did: its temperature, no top-k, no top-p, its ends. The longest response is not
    set: vLLM would hold every request to it, and lm-eval's own limit would be overruled.
    """
    eos, tokenizer = sorted(sampler.eos_ids), sampler.tokenizer
    pads = (tokenizer.pad_token_id, getattr(sampler.replica.config, "pad_token_id", None), eos[0])
    ids = {"eos_token_id": eos, "bos_token_id": tokenizer.bos_token_id}
    ids["pad_token_id"] = next(pad for pad in pads if pad is not None)
    how = GenerationConfig(do_sample=True, temperature=sampler.config.temperature, top_k=0, top_p=1.0, **ids)
    how.save_pretrained(folder)
    model_card(sampler, step).save(folder / "README.md")


def model_card(sampler: Sampler, step: int) -> ModelCard:
    """README.md of the exported model after `step` updates."""
    config, run = sampler.config, Path(sampler.config.run_dir)
    base, licence = known_base(config.model)
    data = None if Path(config.data).expanduser().exists() else [config.data]
    tags = ["pretrainzero", "reinforcement-learning", "grpo", config.method.replace("_", "-"), "arxiv:2512.03442"]
    front = ModelCardData(base_model=base.get("base_model"), datasets=data, library_name="transformers", tags=tags,
                          pipeline_tag="text-generation", **licence)  # fmt: skip
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] <= step and "probe/accuracy" in row]
    probes = rows[:1] + rows[1:][-1:]
    record, starts = run / "environment.txt", []
    for block in record.read_text(encoding="utf-8").strip().split("\n\n") if record.exists() else ():
        said = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        # of absolute paths that stand alone (the script, the config file) only the names
        command = " ".join(re.sub("^/.*/", "", word) for word in said.get("command", "").split(" "))
        changed = "" if said.get("git changes", "none") == "none" else ", with changes that were not committed"
        ranks = f"{said.get('world size', '?')} x {said.get('device', '?')}"
        starts.append(f"{command}\n# git revision {said.get('git', 'not recorded')}{changed}; {ranks}")
    method = METHODS[config.method]
    prompt, replica = method.template(config), sampler.replica
    parameters = sum(one.numel() for name, one in replica.named_parameters() if not name.startswith("extra."))
    resolved = dump_config(config)
    longest = max(map(len, re.findall("`+", "\n".join([resolved, prompt, *starts]))), default=0)
    return ModelCard.from_template(
        front, template_path=str(Path(__file__).parent.parent / "assets/model_card.md"), config=config, step=step,
        name=run.resolve().name, served=re.sub(r"[^\w.-]", "-", run.resolve().name), line=method.help,
        origin=front.base_model if front.base_model != config.model else None, probes=probes, nan=float("nan"),
        keys=sorted(key for key in (probes or [{}])[-1] if key.startswith(("probe/", "eval/"))),
        terms=", ".join(map(str, licence.values())) + ", says its card" if licence else "see the base model",
        data_terms=DATA_LICENCES.get(config.data, "see the data"), parameters=f"{parameters:,}",
        starts=list(dict.fromkeys(starts)), resolved=resolved, ticks="`" * max(3, longest + 1), prompt=repr(prompt),
        example=method.example, chat=sampler.frame and prompt != "{passage}", opening=method.opening,
        extra=method.extra, ends_early=method.opening or config.stop_at_answer,
    )  # fmt: skip


def known_base(model: str) -> tuple[dict, dict]:
    """(front matter of the base model's card, with `base_model` set for a hub name; its keys that state a licence). The
    card of a hub name is read from the cache, if it is there. Both are empty for a local folder without a card."""
    folder, said = Path(model).expanduser(), {}
    cached = folder / "README.md" if folder.exists() else try_to_load_from_cache(model, "README.md")
    if isinstance(cached, str | Path) and Path(cached).is_file():
        with suppress(ValueError, yaml.YAMLError):  # a broken card counts as none
            said = ModelCard.load(Path(cached), ignore_metadata_errors=True).data.to_dict()
    if not folder.exists():
        said["base_model"] = model
    return said, {key: said[key] for key in ("license", "license_name", "license_link") if said.get(key)}
