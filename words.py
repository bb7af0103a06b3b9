"""YAML files and `key=value` words -> typed values, and the one-line error that names the key.

Knows no key of the project: config.py has them, other commands have a few more. YAML is read by `safe_load` alone.
Whatever a user mistypes ends in a ConfigError and in nothing else.
"""

from __future__ import annotations

import math
import re
import reprlib
from pathlib import Path

import yaml

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

    def __init__(self, message: str):
        super().__init__(one_line(message))


def parse_words(words: list[str], first: str) -> dict:
    """`key=value` words -> their values, read as YAML, later ones winning. `first`: what may stand before them."""
    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: expected key=value after {first}")
        values[key] = _parse_yaml(text, word)
    return values


def typed(values: dict, known: dict[str, str]) -> dict:
    """The values as the types that `known` names for their keys. Raises ConfigError for any other key or type."""
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{key}={_shown(value)}: unknown key; known are {', '.join(sorted(known))}")
    return {key: _typed(key, value, known[key]) for key, value in values.items()}


def read_file(path: Path, depth: int = 0) -> dict:
    """The file's keys, on top of those of the file named by `base:`, beside it."""
    try:
        text = path.read_text(encoding="utf-8")
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
        return yaml.safe_load(text)
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
    raise ConfigError(f"{key}={_shown(value)}: expected {allowed}")


def _shown(value) -> str:
    """repr of a value of any size: a few lines of YAML aliases can stand for gigabytes."""
    short = reprlib.Repr()
    short.maxstring = 200
    try:
        return short.repr(value)
    except ValueError:  # Python writes no whole numbers of more than 4300 digits
        return "a number of thousands of digits"
