"""The model card beside an exported model: what it was trained from, on, how, and what the probe measured."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from transformers import GenerationConfig

from config import dump_config
from methods import METHODS
from metrics import read_rows, write_whole
from rollout import Sampler


def write_card(folder: Path, sampler: Sampler, step: int) -> None:
    """Adds README.md and generation_config.json to the exported model in `folder`, and keys for transformers 4. For
    rank 0. If that fails, it warns, and the checkpoint is kept without a card.

    `generate` then samples as the run did: its temperature, no top-k, no top-p, its ends. The longest response is not
    set: vLLM would hold every request to it, and lm-eval's own limit would be overruled.
    """
    try:
        eos, tokenizer = sorted(sampler.eos_ids), sampler.tokenizer
        pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = {"eos_token_id": eos, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": pad}
        how = GenerationConfig(do_sample=True, temperature=sampler.config.temperature, top_k=0, top_p=1.0, **ids)
        how.save_pretrained(folder)
        for name in ("config.json", "tokenizer_config.json"):
            facts = json.loads((folder / name).read_text(encoding="utf-8"))
            write_whole(folder / name, json.dumps(for_transformers_4(facts), indent=2, ensure_ascii=False) + "\n")
        model_card(sampler, step).save(folder / "README.md")
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        print(f"WARNING: no model card in the checkpoint of step {step} ({cause})", file=sys.stderr, flush=True)
        (folder / "README.md").unlink(missing_ok=True)


def for_transformers_4(facts: dict) -> dict:
    """A saved config or tokenizer config with the keys that transformers 4, which vLLM may bring, reads: it would take
    a default rope_theta without a word, and refuse the tokenizer's class. Version 5 reads its own keys first."""
    rope = facts.get("rope_parameters") or {}
    if "rope_theta" in rope:
        facts["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            facts["rope_scaling"] = rope
    if facts.get("backend") == "tokenizers":
        facts["tokenizer_class"] = "PreTrainedTokenizerFast"
        if extra := facts.pop("extra_special_tokens", None):
            facts["additional_special_tokens"] = extra
    return facts


def model_card(sampler: Sampler, step: int) -> ModelCard:
    """README.md of the exported model after `step` updates."""
    config, run, method = sampler.config, Path(sampler.config.run_dir), METHODS[sampler.config.method]
    base, licence = known_base(config.model)
    data = None if Path(config.data).expanduser().exists() else [config.data]
    tags = ["pretrainzero", "reinforcement-learning", "grpo", config.method.replace("_", "-"), "arxiv:2512.03442"]
    front = ModelCardData(base_model=base.get("base_model"), datasets=data, library_name="transformers", tags=tags,
                          pipeline_tag="text-generation", **licence)  # fmt: skip
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] <= step and "probe/accuracy" in row]
    prompt, parameters = method.template(config), sampler.replica.named_parameters()
    return ModelCard.from_template(
        front, template_path=str(Path(__file__).parent.parent / "assets/model_card.md"), config=config, step=step,
        name=run.resolve().name, method=method, origin=base.get("base_model", config.model),
        terms=", ".join(map(str, licence.values())) + ", says its card" if licence else "see the base model",
        parameters=f"{sum(one.numel() for name, one in parameters if not name.startswith('extra.')):,}",
        probes=rows[:1] + rows[1:][-1:], environment=(run / "environment.txt").read_text(encoding="utf-8"),
        resolved=dump_config(config), prompt=repr(prompt), chat=sampler.frame and prompt != "{passage}",
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
