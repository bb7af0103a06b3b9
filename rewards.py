r"""Rewards: exact match for the predictor (after a light normalisation); for the generator 1 - accuracy, 0 at 0.

No reward for format, none for length: the paper has neither. Leaves out where answers come from (prompts.py) and what
becomes of rewards (grpo.py). Needs no torch.

Run alone: `python -m doctest -v rewards.py`
"""

import re
import unicodedata

from prompts import last_answer

INVALID_MASK_REWARD = 0.0
"""Reward of a generator response whose mask cannot be used. It stays in its group. Paper: silent."""
# Commands that only change the look of their argument, {\\bf ...} too; escapes; bare braces; an unbreakable space.
LATEX = re.compile(
    r"\\(?:text(?:normal|bf|it|rm|sf|tt|sc|sl|up|md)?|math(?:normal|bf|it|rm|sf|tt|cal)|boldsymbol|bm|emph|underline"
    r"|[fhm]?box(?:ed)?|operatorname)\s*\{|\{\s*\\(?:bf|it|em|rm|sf|tt|sc|sl)(?:series|shape|family)?(?![A-Za-z])\s*"
    r"|\\.|[{}~]",
    re.DOTALL,
)
QUOTES = frozenset("\"'`“”„‟‘’‚‛«»‹›「」『』")
MARKUP = QUOTES | {"*", "$"}
FINAL_STOPS = ".,。、।॥۔،።፣։។៕။၊།༎܂܁᠃᠂"


def normalise(text: str) -> str:
    r"""The form in which answers and targets are compared. Case is kept. Linear in the text.

    Removed: invisible characters (Unicode's Cf), LaTeX text wrappers and escapes, outer quotes, stars and dollars, one
    final full stop or comma of any script, surplus white space; compatibility characters are unified (NFKC). Source:
    our choice, the paper says "exact match".

    >>> normalise(r"\text{R\&D  budget}.")
    'R&D budget'
    >>> normalise("“ﬁve ½”,")
    'five 1⁄2'
    >>> normalise(r"\frac{1}{2}")  # only the wrappers' braces go
    '\\frac{1}{2}'
    """
    text = "".join(char for char in text if char.isascii() or unicodedata.category(char) != "Cf").strip()
    text = unify(undo_latex(unify(text)))  # again, for an accent may have stood behind a wrapper
    text = unquote(" ".join(text.split()))
    if text and text[-1] in FINAL_STOPS:
        text = unquote(text[:-1].rstrip())  # "Paris." and "Paris". are both Paris
    return text


def unify(text: str) -> str:
    """NFKC, word by word and at most 256 characters at a time: it sorts runs of accents in quadratic time."""
    return re.sub(r"\S{1,256}", lambda part: unicodedata.normalize("NFKC", part[0]), text)


def undo_latex(text: str) -> str:
    """The text without LaTeX's text wrappers and escapes, nested to any depth; one that is never closed stays."""
    parts: list[str] = []
    open_braces: list[int] = []  # for each brace that is open: its wrapper's place in `parts`, or -1
    position = 0
    for match in LATEX.finditer(text):
        parts.append(text[position : match.start()])
        position = match.end()
        token = match[0]
        if token == "{":
            open_braces.append(-1)
        elif token == "}":
            wrapper = open_braces.pop() if open_braces else -1
            if wrapper >= 0:
                parts[wrapper] = token = ""
        elif len(token) > 2:
            open_braces.append(len(parts))
        elif token == "~" or token[1].isspace() or token[1] in ",;:":  # LaTeX's spaces
            token = " "
        elif token[1] in "%&_$#{}()[]":  # escapes, and borders of a formula
            token = token[1].strip("()[]")
        parts.append(token)
    return "".join(parts) + text[position:]


def unquote(text: str) -> str:
    """Strips quotes and markup while there is one at both ends, of any kind, for ``these'' and doubled ones."""
    start, end = 0, len(text)
    while end - start >= 2 and text[start] in MARKUP and text[end - 1] in MARKUP:
        start, end = start + 1, end - 1
        while start < end and text[start] == " ":
            start += 1
        while start < end and text[end - 1] == " ":
            end -= 1
    return text[start:end]


def answerable(target: str) -> bool:
    """Whether the target's normal form has a letter or a digit, of any script. Others are invalid masks.

    >>> answerable("Über"), answerable("7"), answerable("北京"), answerable("–"), answerable("(...)")
    (True, True, True, False, False)
    """
    return any(char.isalnum() for char in normalise(target))


def exact_match(answer: str | None, target: str) -> float:
    r"""The predictor's reward: 1.0 if the normal forms are equal, else 0.0. No answer or an empty one is always 0.0.

    Source: PretrainZero (arXiv 2512.03442), exact match, no format reward.

    >>> exact_match(r"\text{Marie Curie}.", "Marie Curie"), exact_match("marie curie", "Marie Curie")
    (1.0, 0.0)
    >>> exact_match("", "."), exact_match(None, "Marie Curie")
    (0.0, 0.0)
    """
    found = normalise(answer or "")
    return float(found != "" and found == normalise(target))


def caseless_match(answer: str | None, target: str) -> float:
    """exact_match blind to case: logged beside it, never a reward.

    >>> caseless_match("marie curie", "Marie Curie"), caseless_match(None, "Marie Curie")
    (1.0, 0.0)
    """
    found = normalise(answer or "").casefold()
    return float(found != "" and found == normalise(target).casefold())


def prefix_match(answer: str | None, prefixes: tuple[str, ...]) -> float:
    """RPT's reward (arXiv 2506.08007): 1.0 if the answer is a prefix of the true continuation that ends on a token
    border, else 0.0. Compared as written, outer white space aside; no answer or an empty one is 0.0.

    >>> prefixes = ("the", "the old", "the old town")
    >>> [prefix_match(answer, prefixes) for answer in ("the old", " the ", "the o", "", None)]
    [1.0, 1.0, 0.0, 0.0, 0.0]
    """
    return float((answer or "").strip() in {prefix.strip() for prefix in prefixes} - {""})


def is_right(task, response, config) -> bool:
    """Whether a prediction, the Rollout of a Task (methods.py), is right by the config's `reward`: exact or prefix."""
    answer = last_answer(response.text, "boxed")
    if config.reward == "prefix":
        return prefix_match(answer, task.mask.prefixes) > 0
    return exact_match(answer, task.mask.target) > 0


def prediction_reward(task, response, correct: int, config) -> float:
    """What a prediction earns in the update, any finite number. A reward of your own goes here; it sees the whole
    record: the passage, the mask, the response with its tokens, and whether it is right. Paper: 1 if right, else 0."""
    return float(correct)


def mask_rewards(tasks: list, config) -> list[float]:
    """What the generator earns for each of its masks of one passage: by the share of right predictions, whatever these
    earned; 0 for an invalid mask."""
    kind = config.generator_reward
    return [INVALID_MASK_REWARD if task.mask.invalid else generator_reward(task.accuracy, kind) for task in tasks]


def generator_reward(accuracy: float, kind: str = "one_minus_accuracy") -> float:
    """The reward of a valid mask: 1 - accuracy of its G predictions, but 0 when none is right.

    Source: PretrainZero (arXiv 2512.03442). If each prediction is right with probability p, the expectation is

        (1 - p) - (1 - p)^G,    largest at    p* = 1 - G^(-1 / (G - 1)),

    which is 0.37 at G = 4, 0.26 at G = 8 and 0.17 at G = 16: `predictions_per_mask` sets the difficulty that the
    generator aims at. Unpredictable words still earn 0.29 at p = 0.05, G = 8.

    `variance` is the known alternative, p (1 - p), largest at one half (SPICE, arXiv 2510.24684).

    >>> [generator_reward(right / 8) for right in (0, 1, 4, 8)]
    [0.0, 0.875, 0.5, 0.0]
    >>> [generator_reward(right / 8, "variance") for right in (0, 1, 4, 8)]
    [0.0, 0.109375, 0.25, 0.0]
    """
    if kind == "variance":
        return accuracy * (1 - accuracy)
    return 1 - accuracy if accuracy > 0 else 0.0
