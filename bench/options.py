"""The words of the commands, the made-up work that they describe, and the function that prints tables."""

import math
import random
from dataclasses import dataclass
from statistics import fmean

from config import Config, ConfigError, read_config
from methods import METHODS, tasks_per_passage


@dataclass
class Options:
    """The words of the commands that are no keys of the config. `read_words` replaces a 0 by the default."""

    prompt: int = 0  # tokens of a prompt; 0: 400, or a third of max_prompt_tokens if that is less
    cap: int = 0  # longest response, tokens; 0: the config's, and at most 1024 where a step is timed
    mean_response: float = 0.0  # mean tokens of a response; 0: three eighths of the longest, at most 1024
    sigma: float = 0.6  # standard deviation of the logarithm of the lengths
    equal: int = 0  # length of every response in the row of equal lengths; 0: half of cap
    rollouts: str = ""  # numbers of responses, as in 64,128: the seconds of a step against these
    repeats: int = 3  # timed steps after the warm-up; trl too
    out: str = ""  # where the JSON goes; empty: runs/bench/NAME.json, for trl nowhere
    gpus: int = 8  # of a node
    gpu: str = "h100"  # a key of GPUS, or cpu: this machine, measured; gpus is then the number of ranks
    kept: float = 1.0  # share of responses that is trained on; the rest is in groups with equal rewards
    decode_share: float = 0.5  # of the decode limit, for the estimate of hours
    mfu: float = 0.4  # in training, for the estimate of hours
    prompts: int = 32
    completions: int = 8  # responses to each prompt
    tokens: int = 24  # length of every response
    articles: int = 1  # in a prompt, about 30 words each
    rounds: int = 3  # processes of each peer, in turns
    peers: str = ""  # names from bench.trl.PEERS with commas; empty: all that can run here
    only: str = ""  # this peer in this process, its figures as JSON; the command calls itself with it


WORDS = {
    "step": "prompt cap mean_response sigma equal rollouts repeats out".split(),
    "plan": "prompt cap mean_response sigma gpus gpu kept decode_share mfu".split(),
    "trl": "prompts completions tokens articles repeats rounds peers only out".split(),
}


def read_words(words: list[str], command: str, default: str = "") -> tuple[Options, Config]:
    """Words of a command line -> (its options, the config). default: the config file if the words name none. Raises
    ConfigError with key and value for one that is impossible."""
    options, rest = Options(), []
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key in WORDS[command]):
            rest.append(word)
            continue
        kind = type(getattr(options, key))
        try:
            setattr(options, key, kind(text))
        except ValueError:
            raise ConfigError(f"{key}={text!r}: expected {'a whole number' if kind is int else 'a number'}") from None
    config = read_config([default, *rest] if default and (not rest or "=" in rest[0]) else rest)
    ranges = {"sigma": (0, math.inf), "prompt": (1, config.max_prompt_tokens)}
    ranges |= dict.fromkeys(("kept", "decode_share", "mfu"), (0.001, 1))
    caps, group = [cap for *_, cap in phases(config)], config.predictions_per_mask
    if command == "step":
        if not caps:
            raise ConfigError(f"method={config.method!r}: samples nothing; time a method that does")
        options.cap = options.cap or min(1024, *caps)
        options.equal = options.equal or options.cap // 2
        ranges |= {"cap": (1, min(caps)), "mean_response": (1, options.cap), "equal": (1, options.cap)}
    options.cap = options.cap or max(caps, default=config.max_prediction_tokens)
    options.mean_response = options.mean_response or min(1024, 0.375 * options.cap)
    options.prompt = options.prompt or min(400, config.max_prompt_tokens // 3)
    for key in WORDS[command]:
        value, (low, high) = getattr(options, key), ranges.get(key, (1, math.inf))
        if not isinstance(value, str) and not low <= value <= high:
            raise ConfigError(f"{key}={value}: must be at least {low}" + f", at most {high}" * (high < math.inf))
    for number in options.rollouts.split(",") if options.rollouts else ():
        if not number.isdecimal() or int(number) == 0 or int(number) % group:
            raise ConfigError(f"rollouts={options.rollouts!r}: must be multiples of predictions_per_mask={group}")
    return options, config


def phases(config: Config) -> list[tuple[str, int, int, int]]:
    """The calls of `rollout` in a step if every mask is valid: (name, prompts, responses to each, longest response in
    tokens); none for a method that samples nothing."""
    method, tasks, steps = METHODS[config.method], config.passages_per_step, []
    if method.generator:
        steps.append(("propose", tasks, config.masks_per_passage, config.max_mask_tokens))
        tasks *= config.masks_per_passage
    elif method.predict and not method.one_task:
        tasks = sum(tasks_per_passage(config, config.method))
    if method.predict:
        steps.append(("predict", tasks, config.predictions_per_mask, config.max_prediction_tokens))
    return steps


def response_lengths(prompts: int, count: int, longest: int, options: Options, seed: int) -> list[list[int]]:
    """Tokens of `count` responses to each prompt: lognormal with options.sigma (0: all equal), cut at `longest` and at
    options.cap, scaled by bisection so that their mean is options.mean_response or, if that is less, the cap."""
    cap, rng = min(longest, options.cap), random.Random(seed)
    mean = min(options.mean_response, cap)
    draws = [rng.lognormvariate(0.0, options.sigma) for _ in range(prompts * count)]
    low, high, lengths = 0.0, cap / min(draws), [cap] * len(draws)
    for _ in range(60):
        scale = (low + high) / 2
        scaled = [min(cap, max(1, round(scale * draw))) for draw in draws]
        if fmean(scaled) < mean:
            low = scale
        else:
            high, lengths = scale, scaled
    return [lengths[i : i + count] for i in range(0, len(lengths), count)]


def text_table(rows: list[tuple], label: int, width: int) -> list[str]:
    """Lines: the first cell of each row on the left in `label` characters, the others on the right in `width` each."""
    cells = [(name, "".join(f"{'-' if cell is None else cell:>{width}}" for cell in row)) for name, *row in rows]
    return [f"{name:{label}}{row}" for name, row in cells]
