"""Configuration: one flat dataclass, filled from a YAML file and `key=value` words, checked before anything is loaded.

    config = read_config(["configs/tiny.yaml", "steps=20", "learning_rate=1e-4"])

A file may begin with `base: other.yaml` and then say only what differs. Every key has one default, here, with its unit
and the paper's value (PretrainZero, arXiv 2512.03442; "silent" where the paper does not say). A bad key, type or value
raises ConfigError: one line with the key, its value and what is allowed. This file knows no model, so a typing error
costs no minutes.

There is no top_p and no top_k. Both change the distribution that is sampled from, and with it the ratio between the
policy that is trained and the one that sampled, so the gradient would be biased.
"""

from __future__ import annotations  # the types of keys are read as strings

import math
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import date
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import yaml

from text.strict_yaml import StrictLoader

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # no path may hold the first, UTF-8 cannot write the others


def one_line(text: str) -> str:
    """Text for a message: control characters, line ends and halves of characters as escapes, at most 2000 characters.

    >>> one_line("a\\nb")
    'a\\\\nb'
    """
    if len(text) > 2000:
        text = f"{text[:1500]} ... {text[-495:]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class ConfigError(ValueError):
    """One line: the key, its value, what is allowed."""

    kind = "config"

    def __init__(self, message: str):
        super().__init__(one_line(message))


def parse_words(words: list[str], first: str) -> dict:
    """`key=value` words -> their values, read as YAML, later ones winning. `first`: what may stand before them."""
    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or text.startswith("="):
            raise ConfigError(f"{word!r}: expected key=value after {first}")
        value = values[key] = _parse_yaml(text, word)
        plain = text.strip()
        if isinstance(value, str) and ("\n" in plain or value != plain and plain[0] not in "'\""):
            raise ConfigError(f"{word!r}: YAML reads {value!r}; put it in double quotes, with \\n for a line end")
    return values


def typed(values: dict, known: dict[str, str]) -> dict:
    """The values as the types that `known` names for their keys. Raises ConfigError for any other key or type."""
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(key, known)
            told = f"perhaps {' or '.join(near)}" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"{key}={_shown(value)}: unknown key; {told}")
    return {key: _typed(key, value, known[key]) for key, value in values.items()}


def read_file(path: Path, depth: int = 0) -> dict:
    """The file's keys, on top of those of the file named by `base:`, beside it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise ConfigError(f"config file {str(path)!r}: cannot be read ({type(error).__name__})") from None
    values = _parse_yaml(text, f"config file {str(path)!r}")
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"config file {str(path)!r}: expected lines of `key: value`")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or depth > 8:
        raise ConfigError(f"config file {str(path)!r}: base={_shown(base)} must name another file and not lead back")
    return {**read_file(path.parent / base, depth + 1), **values}


def _parse_yaml(text: str, where: str):
    try:
        return StrictLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # the last four are PyYAML's own stumbles, over !!int '', !!bool maybe, !!timestamp x and deep nesting
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: not valid YAML ({reason})") from None


def _typed(key: str, value, kind: str):
    """The value as the field's type. YAML 1.1 reads 5e-7 as text (no dot), so text that is a number counts as one."""
    if kind == "float" and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif kind == "int" and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
        return value
    elif kind == "bool" and isinstance(value, bool):
        return value
    elif kind == "bool | str" and (isinstance(value, bool) or value == "auto"):
        return value
    elif kind == "str" and (isinstance(value, str) or value is None) and not NO_TEXT.search(value or ""):
        return value or ""
    allowed = {
        "float": "a finite number",
        "int": "a whole number of at most 18 digits",
        "bool": "true or false",
        "bool | str": "true, false or auto",
        "str": "text, UTF-8 without NUL",
    }[kind]
    if kind == "str" and isinstance(value, bool | int | float | date):
        allowed = "text; YAML reads this one as another type, so put it in quotes, as in key: 'no' or \"key='no'\""
    raise ConfigError(f"{key}={_shown(value)}: expected {allowed}")


def _shown(value) -> str:
    """repr of a value of any size: a few lines of YAML aliases can stand for gigabytes."""
    short = reprlib.Repr()
    short.maxstring = 200
    try:
        return short.repr(value)
    except ValueError:  # Python writes no whole numbers of more than 4300 digits
        return "a number of thousands of digits"


FUNCTION_WORDS = " ".join("""
a about above after again against all along also although always among an and another any are around as at away be
because been before being below between both but by can could did do does during each either else ever every few for
from had has have he her here hers him his how however i if in into is it its itself just least less many may me might
more most much must my near neither no nor not now of off often on once one only onto or other our out over own per
rather same shall she should since so some such than that the their them themselves then there these they this those
though through thus to too toward towards under until up upon us very was we were what when where whether which while
who whom whose why will with within without would yet you your
""".split())


@dataclass
class Config:
    # ---- what is trained, on what, where it goes
    model: str = "HuggingFaceTB/SmolLM3-3B-Base"
    """Hugging Face hub name or local folder of a causal language model. Paper: SmolLM3-3B-Base, Qwen3 bases."""
    data: str = "wikimedia/wikipedia"
    """Hub name of a dataset, or a local parquet file, jsonl, jsonl.gz, text file, or a folder of them."""
    data_config: str = "20231101.en"
    """The hub dataset's configuration (for Wikipedia: dump and language). Of a local folder that has a subfolder of
    this name, only that is read. Paper: Wikipedia."""
    text_field: str = "text"
    """Column or JSON field that holds the text."""
    method: str = "active"
    """Where the tasks come from. `active`: the generator's masks. By rule: `random_span`, `star`, `random_token`,
    `entropy_token`. With the answer given, no sampling: `sft` (masked words as a question), `cpt` (the text itself).
    `rlvr`: questions with verifiable answers. `rlp`, `quiet_star`: thoughts that make the next tokens likelier."""
    warmup_method: str = ""
    """Another method for the first `warmup_method_steps` steps. Paper, SmolLM3: random_span."""
    warmup_method_steps: int = 0
    """Steps of warmup_method; one learning-rate schedule runs over both. Paper, SmolLM3: 100."""
    steps: int = 2000
    """Rollout batches, each followed by its updates. 0: a dry run, one step at learning rate 0. Paper: 2000."""
    seed: int = 0
    """Decides data order, sampling noise and probe masks."""
    run_dir: str = ""
    """Folder that gets all evidence of the run; empty: runs/NAME of the config file, runs/NAME-dry with steps=0."""
    resume: str = "auto"
    """`auto`: continue from the latest checkpoint in run_dir, else start. `never`: start afresh; an earlier run in
    run_dir is moved aside, not deleted."""

    # ---- one step
    passages_per_step: int = 32
    """Passages that the generator reads in a step. Paper: 32."""
    masks_per_passage: int = 8
    """Generator responses per passage, one mask each: the generator's GRPO group. Paper: 8."""
    random_masks: int = 0
    """`active`: random spans per passage beside the generator's masks, for the words that it leaves. Paper: none."""
    predictions_per_mask: int = 8
    """Predictor responses per valid mask: the predictor's GRPO group. Moving it moves the difficulty that the
    generator aims at (see rewards.py). Paper: 8."""
    max_passages: int = 100_000
    """Passages kept in the index, read in seeded order. Paper: 2000 steps of 32 need 64,000."""
    min_passage_tokens: int = 80
    """Shortest passage, tokens. Paper: 80-1024 words-or-tokens of text; ours are tokens."""
    max_passage_tokens: int = 1024
    """Longest passage, tokens."""
    max_prompt_tokens: int = 1536
    """Longest prompt, tokens; a prediction prompt that outgrows it makes its mask invalid. Paper: 1536."""
    max_mask_tokens: int = 4096
    """Longest response of the generator, tokens. Paper: 4096."""
    max_prediction_tokens: int = 4096
    """Longest response of the predictor, tokens. Paper: 4096."""
    temperature: float = 1.0
    """Sampling temperature; the trainer's log-probs use the same. Paper's lineage: 1.0."""
    stop_at_answer: bool = True
    """End a response with the token that closes its first balanced \\mask{} or \\boxed{}: base models otherwise go on
    to invent and answer new questions. Such a response has no end token: ending is not trained. Paper: silent."""

    # ---- prompts
    chat_template: str = "auto"
    """`auto`: one user turn of the tokenizer's own template if it has one, else plain text. `none`: plain text. Else
    the path of a Jinja file. What comes out stands in run_dir/prompts.txt."""
    mask_prompt: str = ""
    """The generator's prompt with {passage}; empty: the one of prompts.py, in our words."""
    predict_prompt: str = ""
    """The predictor's prompt with {passage}; empty: the one of prompts.py."""
    question_prompt: str = ""
    """`rlvr`: the prompt of a question, {passage}; empty: the one of prompts.py."""
    rlp_prompt: str = ""
    """`rlp`: the request for a thought, with {passage}; empty: the one of relatives/rlp.py."""
    predict_prefix: str = ""
    """Text that opens a prediction when the probe wants the answer without a thought; empty: that of prompts.py."""

    # ---- masks and rewards
    mask_rule: str = "main"
    """`main`: every occurrence is replaced, parts of words count. `one_mask`: one random occurrence. `words`: whole
    words only. `one_mask_words`: both. Paper: the first is its main rule, the next two its variants."""
    max_occurrences: int = 7
    """A span that occurs more often in its passage is an invalid mask. Paper: fewer than eight."""
    max_span_words: int = 10
    """Longest mask, words; 0 is off. Paper: silent."""
    max_span_chars: int = 64
    """Longest mask, characters; 0 is off. Paper: silent."""
    mask_content: bool = False
    """True: words of `function_words` alone are no mask. A weak model otherwise agrees with itself on "the"."""
    labels: str = ""
    """Kinds of words in a corpus that labels them, the hardest first: a mask on several counts as the first."""
    function_words: str = FUNCTION_WORDS
    """By spaces, lower case, here English: what `mask_content` refuses, and the kind `function` of the log."""
    reward: str = "exact"
    """Of a prediction. `exact`: match after normalisation. `prefix`: RPT's prefix that ends on a token border, for
    the next-token methods. Paper: exact."""
    generator_reward: str = "one_minus_accuracy"
    """`one_minus_accuracy`, 0 at accuracy 0, or `variance`: p (1 - p). Paper: the first."""
    ahead_tokens: int = 4
    """`quiet_star`: true tokens behind a position by which its thoughts are paid. Quiet-STaR: 4."""
    entropy_share: float = 0.2
    """`entropy_token` draws among this share of a passage's tokens, those with the highest entropy. Paper: 0.2."""
    sft_answer: str = " \\boxed{{answer}}"
    """The completion that `sft` trains on, with {answer}."""
    sft_mask: str = ""
    """`sft` trains the generator's format too: the completion of mask_prompt, with {answer}, the span. Empty: not."""
    ema_decay: float = 0.999
    """`rlp`: the baseline keeps this share of itself at each step. RLP: 0.999."""
    verify_seconds: float = 5.0
    """`rlvr`: longest check of one answer, seconds; a slower one earns 0."""
    train_generator: bool = True
    """False: the generator is prompted for masks but not trained on them (control)."""
    shuffle_rewards: bool = False
    """True: permute the rewards inside each group (control: a run that learns anyway learns from something else)."""

    # ---- GRPO
    advantage_std: bool = True
    """Divide the advantage by the group's standard deviation (GRPO) or not (Dr.GRPO). Paper: divides."""
    loss_mean: str = "token"
    """`token`: every kept token of the batch weighs the same (DAPO). `sequence`: every kept response does (GRPO).
    Paper: silent."""
    mini_batches: int = 1
    """Optimizer steps into which a batch is cut, groups kept whole. At 1 the ratio is 1 and the clip inert."""
    updates_per_batch: int = 1
    """Passes over the whole batch, `mini_batches` optimizer steps each. Paper: silent."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low. DAPO: 0.2."""
    clip_high: float = 0.28
    """The ratio is clipped above 1 + clip_high. DAPO's clip-higher: 0.28."""
    kl: float = 0.0
    """Weight of a k3 penalty against a frozen copy of the start model; 0 is off and keeps no copy. Paper: none."""
    max_importance: float = 2.0
    """Cap of the importance weight trainer/sampler that corrects for their numerical mismatch."""
    max_mismatch: float = 0.1
    """Largest `mismatch_kl` of a step, nats a token: beyond it the run stops before the update, because the sampler
    does not compute what the trainer does. bfloat16 gives about 0.001. 0 is off."""
    mask_truncated: bool = False
    """Leave responses that hit the length limit out of the loss, numerator and denominator. Paper: silent."""

    # ---- optimizer
    learning_rate: float = 5e-7
    """Peak learning rate of AdamW. Paper: 5e-7."""
    lr_schedule: str = "cosine"
    """`cosine` to 0 over all steps, or `constant`. Paper: cosine."""
    warmup_steps: int = 10
    """Steps of linear learning-rate warm-up. Paper: silent."""
    adam_beta1: float = 0.9
    """AdamW's first decay."""
    adam_beta2: float = 0.999
    """AdamW's second decay."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on all parameters."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this."""

    # ---- engine
    dtype: str = "bfloat16"
    """Compute type of trainer and sampler; the master weights are float32 always."""
    tokens_per_micro_batch: int = 32768
    """Tokens packed into one forward and backward on one GPU; bounds training memory, changes no result."""
    gradient_checkpointing: bool | str = True
    """Recompute each layer in the backward pass instead of storing it. `auto`: only where storing would not fit the
    GPU, or the free memory of a CPU, by the calculation of bench/memory.py."""
    offload: bool = False
    """Masters, gradients and Adam stay in host memory (FSDP2's CPUOffloadPolicy), the replica on the GPU: for models
    of which both do not fit. The optimizer's step runs on the CPU. Takes 16 bytes of a node's memory a parameter."""
    share_prompts: bool = False
    """Compute the prompt of a group once in the update, for all its responses: same gradients but for rounding."""
    attention: str = "auto"
    """`auto`: flash-attn if installed, else `varlen`. Or `flash_attention_2`, `flash_attention_3`, `varlen`: torch's
    own variable-length kernels on a GPU, SDPA on a CPU."""
    liger: bool = True
    """Liger's fused rotary, RMSNorm and SwiGLU kernels; on CUDA only."""
    use_cuda_graph: bool = True
    """CUDA graphs of decoding, which also overlap it with the sampler's bookkeeping. Switch off if capture fails."""
    cache_memory: float = 0.85
    """Share of the free GPU memory that a rollout phase takes for its paged cache. What is free decides how many
    requests run at once, and so which noise each meets: on a GPU two runs need not sample the same tokens."""
    max_requests: int = 0
    """Requests decoded at once on one rank; 0: 512 on a GPU, 256 on a CPU."""
    rank_timeout: float = 7200.0
    """Longest wait of a rank for the others, seconds, after which the run ends. Rollouts end at different times on
    different ranks."""

    # ---- evidence
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved; 0 is off."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted. 0 keeps all."""
    probe_every: int = 100
    """Steps between probes on held-out passages; step 0 and the last are always probed; 0: before training only."""
    probe_passages: int = 128
    """Held-out passages in the probe."""
    probe_samples: int = 4
    """Sampled predictions per probe mask, beside one greedy one."""
    heldout: float = 0.01
    """Share of articles, by a hash of their url, else title, else id, that is never trained on."""
    eval_every: int = 0
    """Steps between evaluations on `eval_tasks`; step 0 and the last are always evaluated; 0 is off."""
    eval_tasks: str = ""
    """Benchmarks of benchmarks/sets.py, by commas: NAME, from the hub, or NAME=FILE. Answered greedily, once an item,
    with max_prediction_tokens at most. `gsm8k,math500=path/to/math500.jsonl`"""
    eval_limit: int = 0
    """Items of each benchmark, spread over the whole of it; 0: all. 200 items: a standard error of up to 3.5 points."""
    samples_per_step: int = 1
    """Passages per step whose rollouts go to samples.jsonl: with the paper's numbers 0.3 MB each, more if long."""
    wandb: str = ""
    """Project of Weights & Biases that gets each row of metrics.jsonl too; empty: off, its package not needed."""


POSITIVE_INTS = (
    "passages_per_step max_passages min_passage_tokens max_passage_tokens max_prompt_tokens max_mask_tokens "
    "max_prediction_tokens max_occurrences ahead_tokens mini_batches updates_per_batch tokens_per_micro_batch "
    "probe_passages probe_samples"
).split()
COUNTS = (
    "steps seed max_span_words max_span_chars warmup_steps max_requests save_every keep_last probe_every "
    "samples_per_step warmup_method_steps random_masks eval_every eval_limit"
).split()
CHOICES = {
    "reward": ("exact", "prefix"),
    "generator_reward": ("one_minus_accuracy", "variance"),
    "resume": ("auto", "never"),
    "mask_rule": ("main", "one_mask", "words", "one_mask_words"),
    "loss_mean": ("token", "sequence"),
    "lr_schedule": ("cosine", "constant"),
    "dtype": ("bfloat16", "float32"),
    "attention": ("auto", "varlen", "flash_attention_2", "flash_attention_3"),
}
# key: (what is allowed, in words; the test)
RANGES = {
    "masks_per_passage": ("2 or more, a group of one has no advantage", lambda v: v >= 2),
    "predictions_per_mask": ("2 or more, a group of one has no advantage", lambda v: v >= 2),
    "temperature": ("a number above 0", lambda v: v > 0),
    "learning_rate": ("0 or more", lambda v: v >= 0),
    "weight_decay": ("0 or more", lambda v: v >= 0),
    "max_grad_norm": ("a number above 0", lambda v: v > 0),
    "rank_timeout": ("a number above 0", lambda v: v > 0),
    "max_importance": ("1 or more", lambda v: v >= 1),
    "max_mismatch": ("0 or more", lambda v: v >= 0),
    "clip_low": ("between 0 and 1", lambda v: 0 <= v <= 1),
    "clip_high": ("0 or more", lambda v: v >= 0),
    "adam_beta1": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "adam_beta2": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "ema_decay": ("between 0 and 1", lambda v: 0 <= v <= 1),
    "verify_seconds": ("a number above 0", lambda v: v > 0),
    "kl": ("0 or more", lambda v: v >= 0),
    "entropy_share": ("above 0, at most 1", lambda v: 0 < v <= 1),
    "cache_memory": ("between 0 and 0.95", lambda v: 0 < v <= 0.95),
    "heldout": ("above 0 and below 0.5", lambda v: 0 < v < 0.5),
    **{key: ("1 or more", lambda v: v >= 1) for key in POSITIVE_INTS},
    **{key: ("0 or more", lambda v: v >= 0) for key in COUNTS},
    **{key: (f"one of {', '.join(names)}", lambda v, names=names: v in names) for key, names in CHOICES.items()},
}


def read_config(words: list[str]) -> Config:
    """Command-line words -> a checked Config: at most one YAML file, then `key=value` words, later ones winning.

    Raises ConfigError; `read_config(["no_such.yaml"])`, `["steps=-1"]` and `["stepz=1"]` each say what is wrong.
    """
    values, name = {}, "run"
    if words and ("=" not in words[0] or os.path.isfile(words[0])):
        values, name, words = read_file(Path(words[0])), Path(words[0]).stem, words[1:]
    values |= parse_words(words, "the config file")
    known = {field.name: field.type for field in fields(Config)}
    config = Config(**typed(values, known))
    for key in ("model", "data", "run_dir", "chat_template"):
        setattr(config, key, os.path.expanduser(getattr(config, key)))
    # a dry run must not touch the evidence of the run that it prepares
    config.run_dir = config.run_dir or f"runs/{name}" + ("-dry" if config.steps == 0 else "")
    check(config)
    return config


def check(config: Config) -> None:
    """Raises ConfigError at the first impossible value. Looks at files only to see that they are there."""
    for key, (allowed, test) in RANGES.items():
        value = getattr(config, key)
        if not test(value):
            raise ConfigError(f"{key}={value!r}: must be {allowed}")
    shortest, longest = config.min_passage_tokens, config.max_passage_tokens
    if shortest > longest:
        raise ConfigError(f"min_passage_tokens={shortest}: must not exceed max_passage_tokens={longest}")
    longest = config.max_prompt_tokens + max(config.max_mask_tokens, config.max_prediction_tokens)
    if config.tokens_per_micro_batch < longest:
        raise ConfigError(
            f"tokens_per_micro_batch={config.tokens_per_micro_batch}: must be at least {longest}, "
            "the longest prompt plus the longest response, or one sequence would not fit"
        )
    from methods import check_methods  # here: methods.py imports this file

    check_methods(config)
    if config.eval_tasks and not config.eval_every:
        raise ConfigError(f"eval_tasks={config.eval_tasks!r}: never asked without eval_every, such as eval_every=100")
    if config.eval_every and not config.eval_tasks:
        raise ConfigError(f"eval_every={config.eval_every}: needs eval_tasks, such as eval_tasks=gsm8k")
    if config.wandb and not find_spec("wandb"):  # at the start, not after the first probe
        raise ConfigError(f"wandb={config.wandb!r}: its package is not there; pip install wandb, or leave it empty")
    for key in ("sft_answer", "sft_mask"):
        if "{answer}" not in (text := getattr(config, key)) and (text or key == "sft_answer"):
            raise ConfigError(f"{key}={text!r}: must contain {{answer}}")
    for key in ("mask_prompt", "predict_prompt", "question_prompt", "rlp_prompt"):
        if (text := getattr(config, key)) and text.count("{passage}") != 1:
            raise ConfigError(f"{key}={text!r}: must contain {{passage}} once")
    for key, name in (("model", config.model), ("data", config.data)):
        # owner/name may be on the hub; anything else that looks like a path must be there
        ends = {".parquet", ".jsonl", ".gz", ".txt", ".json"}
        path_like = name[:1] in ("", ".", "/", "~") or name.count("/") != 1 or Path(name).suffix in ends
        if not name or (path_like and not os.path.exists(os.path.expanduser(name))):
            raise ConfigError(f"{key}={name!r}: no such file or folder, and not a hub name (owner/name)")
    if config.chat_template not in ("none", "auto") and not os.path.isfile(config.chat_template):
        raise ConfigError(f"chat_template={config.chat_template!r}: must be none, auto or the path of a Jinja file")


@contextmanager
def command(usage: str) -> Iterator[None]:
    """Around a command. Without a word, or if it is asked for, prints the usage. A ConfigError (DataError is one) or an
    OSError inside becomes one line on stderr, not one per rank, and exit status 2."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage.strip())
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    try:
        yield
    except (ConfigError, OSError) as error:  # a missing model raises an OSError of several lines
        if os.environ.get("RANK", "0") == "0":
            print(f"{getattr(error, 'kind', 'file')} error: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_command_line(usage: str) -> Config:
    """sys.argv -> Config."""
    with command(usage):
        return read_config(sys.argv[1:])


def dump_config(config: Config) -> str:
    """The resolved config as YAML, in the order of the dataclass; reading it back gives an equal Config."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=120)
    if yaml.safe_load(text) == asdict(config):
        return text
    return yaml.safe_dump(asdict(config), sort_keys=False, width=120)  # rare line ends (U+0085) survive as escapes only
