"""What a step consists of, the words of the three commands, and the one function that prints tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from config import Config, ConfigError
from methods import METHODS, tasks_per_passage


@dataclass(frozen=True)
class Phase:
    """One call of `rollout`."""

    name: str
    prompts: int
    count: int
    """Responses to each prompt."""
    cap: int
    """Longest response, tokens."""


def phases(config: Config) -> list[Phase]:
    """The rollouts of a step of config.method if every mask is valid; none for a method that samples nothing.

    >>> [(p.name, p.prompts * p.count) for p in phases(Config())]
    [('propose', 256), ('predict', 2048)]
    """
    passages, count, cap = config.passages_per_step, config.predictions_per_mask, config.max_prediction_tokens
    if not METHODS[config.method].predict:
        return []
    if config.method == "active":
        masks = config.masks_per_passage
        propose = Phase("propose", passages, masks, config.max_mask_tokens)
        return [propose, Phase("predict", passages * masks, count, cap)]
    tasks = passages if config.method in ("rlvr", "rlp") else sum(tasks_per_passage(config, config.method))
    return [Phase("predict", tasks, count, cap)]


@dataclass
class Options:
    """The words of all three commands that are no keys of the config. WORDS says which command takes which."""

    prompt: int = 0
    """Tokens of a prompt; 0: 400, or a third of max_prompt_tokens if that is less."""
    cap: int = 0
    """Longest response, tokens; 0: the config's, and at most 1024 where a step is timed."""
    mean_response: float = 0.0
    """Mean tokens of a response; 0: three eighths of the longest, at most 1024."""
    sigma: float = 0.6
    """Standard deviation of the logarithm of the lengths."""
    equal: int = 0
    """The length of every response in the row of equal lengths; 0: half of cap."""
    rollouts: str = ""
    """Numbers of responses, as in 64,128: then only the seconds of a step against these numbers."""
    repeats: int = 3
    """Timed steps, after one that warms up."""
    out: str = ""
    """Where the JSON goes; empty: runs/bench/NAME.json, or nowhere for `trl`."""
    gpus: int = 8
    gpu: str = "h100"
    """A key of bench.costs.GPUS."""
    kept: float = 1.0
    """Share of responses that is trained on; the rest is in groups with equal rewards."""
    decode_share: float = 0.5
    """Share of the decode limit that the estimate of hours assumes."""
    mfu: float = 0.4
    """Model FLOPs utilisation in training that the estimate of hours assumes."""
    prompts: int = 32
    completions: int = 8
    """Responses to each prompt."""
    tokens: int = 24
    """Length of every response."""
    articles: int = 1
    """Articles in a prompt, about 30 words each."""
    rounds: int = 3
    """Processes of each peer, in turns."""
    peers: str = ""
    """Names from bench.trl.PEERS with commas; empty: all that can run here."""
    only: str = ""
    """One peer, in this process; its figures are printed as JSON. The command calls itself with it."""


WORDS = {
    "step": "prompt cap mean_response sigma equal rollouts repeats out".split(),
    "plan": "prompt cap mean_response sigma gpus gpu kept decode_share mfu".split(),
    "trl": "prompts completions tokens articles repeats rounds peers only out".split(),
}


def split_words(words: list[str], command: str) -> tuple[Options, list[str]]:
    """Words of the command line -> (options, the other words). Raises ConfigError for a value of the wrong type."""
    options, rest = Options(), []
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key in WORDS[command]):
            rest.append(word)
            continue
        kind = type(getattr(Options, key))
        try:
            setattr(options, key, kind(text))
        except ValueError:
            raise ConfigError(f"{key}={text!r}: expected {'a whole number' if kind is int else 'a number'}") from None
    return options, rest


def complete(options: Options, config: Config, command: str) -> Options:
    """The options with every 0 replaced by its default. Raises ConfigError with key and value if one is impossible."""
    caps, longest, highest = [phase.cap for phase in phases(config)], math.inf, {"repeats": 1000}
    prompt = options.prompt or min(400, config.max_prompt_tokens // 3)
    if command == "step":
        if not caps:
            raise ConfigError(f"method={config.method!r}: samples nothing; time a method that does")
        longest = min(caps)
        cap = options.cap or min(1024, longest)
        mean = options.mean_response or 0.375 * cap
        options = replace(options, prompt=prompt, cap=cap, mean_response=mean, equal=options.equal or cap // 2)
        highest |= {"prompt": config.max_prompt_tokens, "cap": longest, "mean_response": cap, "equal": cap}
    elif command == "plan":
        longest = max(caps, default=config.max_prediction_tokens)
        mean = options.mean_response or min(1024, 0.375 * min(longest, options.cap or longest))
        options = replace(options, prompt=prompt, cap=options.cap or longest, mean_response=mean)
    for key in WORDS[command]:
        value, most = getattr(options, key), highest.get(key, math.inf)
        if isinstance(value, str):
            continue
        if key in ("kept", "decode_share", "mfu"):
            valid, allowed = 0 < value <= 1, "above 0, at most 1"
        elif key == "sigma":
            valid, allowed = value >= 0, "0 or more"
        else:
            valid, allowed = 1 <= value <= most, "1 or more" if most == math.inf else f"from 1 to {most}"
        if not valid:
            raise ConfigError(f"{key}={value}: must be {allowed}")
    numbers, group = options.rollouts.split(",") if options.rollouts else [], config.predictions_per_mask
    if not all(number.isdecimal() and int(number) and int(number) % group == 0 for number in numbers):
        raise ConfigError(f"rollouts={options.rollouts!r}: must be multiples of predictions_per_mask={group}")
    return options


def text_table(rows: list[tuple], label: int, width: int) -> list[str]:
    """Lines: the first cell of each row on the left in `label` characters, the others on the right in `width` each.

    >>> text_table([("", "s", "GB"), ("update", "1.50", None)], 8, 6)
    ['             s    GB', 'update    1.50     -']
    """
    cells = [(name, "".join(f"{'-' if cell is None else cell:>{width}}" for cell in row)) for name, *row in rows]
    return [f"{name:{label}}{row}" for name, row in cells]
