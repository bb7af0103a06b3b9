r"""The judge of answers, for rlvr and for the benchmarks: maths, the letter of an option, BBEH's texts.

All functions but last_number get the content of the box (prompts.last_answer). Steps for a maths answer:

    a gold of words     as text, blind to case: `\text{east}` is East, and not seat
    two plain numbers   exactly, as fractions, without currency, unit or words: 18 dollars is 18, `12 or 13` is not 12
    anything else       by math-verify in a child process (verify.py), after both are spelled as it reads them right

A plain number is an integer, a decimal, a power, or a product or fraction of these. 50% is 50 and 0.5. A decimal of six
places or more equals a fraction that rounds to it. Needs no torch.
"""

import hashlib
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from benchmarks.verify import equal_in_child
from prompts import last_answer
from rewards import FINAL_STOPS, QUOTES, normalise, undo_latex

MAX_ANSWER_CHARS = 2000  # longer answers are wrong without a check; the longest gold answers have about 150
MAX_NUMBER_CHARS = 200  # powers in a longer text could take long to multiply out

SYMBOLS = {
    "−": "-", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "’": "'",
    "‘": "'", "π": r"\pi ", "≈": r"\approx ", "∼": r"\sim ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "∪": r"\cup ",
    "∈": r"\in ", "º": r"^\circ ", "°": r"^\circ ", "٫": ".", "٬": ",", "٪": "%",
}  # fmt: skip
SMALL_DIGITS = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+|[₀₁₂₃₄₅₆₇₈₉]+")
LOOK = r"\\(?:displaystyle|textstyle|[lL]arge|[hH]uge|[bB]igg?[lr]?|q?quad)(?![A-Za-z])|^\\(?:bf|rm)(?![A-Za-z])"
LOOK = re.compile(LOOK + r"|\\(?:text)?color ?\{\w+\}")  # the look of what follows, or the space beside it
REWRITES = [(re.compile(pattern), new) for pattern, new in {
    r"\\! ?": "", r"(?:\\[a-z]+ ?)?\{(, ?|\\[,;: ])\}": r"\1",  # 1,\!000 1{,}000 1\text{,}000
    r"\b([AaPp])\. ?([Mm])\b\.?": r"\1\2", r"(?<=[0-9])\^ ?\{?(?:\\text ?\{)?(st|nd|rd|th)\}{0,2}": r"\1",
    r"\(([0-9A-Z]+)\)(?=_)": r"\1", r"(?<=[0-9]) \(?(?:in )?base ([0-9]+)\)?$": r"_\1",  # (1011)_2, 1011 (base 2)
    r"\\\\ ?\[[0-9.]+ ?[a-z]+\]": r"\\\\", r"\{([^{}]*)\\choose([^{}]*)\}": r"\\binom{\1}{\2}",
    r"(?<=[0-9])\*\*(?=-?[0-9])": "^", r"\b(?:minus|negative) (?=[0-9])": "-", r"\\(?:textdollar|pounds)(?![a-z])": "$",
    r"(?<![0-9])([0-9]{0,20})\.([0-9]{0,20})\\(?:overline|bar|dot) ?\{ ?([0-9]{1,20}) ?\}":  # 0.1\overline{6} is 15/90
    lambda d: rf"\frac{{{int(d[1] + d[2] + d[3]) - int(d[1] + d[2] or 0)}}}{{{'9' * len(d[3]) + '0' * len(d[2])}}}",
}.items()]  # fmt: skip
ROOT = re.compile(r"(?:√|(?<![A-Za-z\\])sqrt(?=\())\s*(?:\(([^()]*)\)|([0-9]+|[A-Za-z]))")
OUTER = [("**", "**"), ("*", "*"), ("__", "__"), (r"\(", r"\)"), (r"\[", r"\]"), ("$", "$")]
FINAL_STOP = re.compile(rf"(?<!\\)(?<!\\right)[{FINAL_STOPS};:]$|(?<!\\)\\+[,;: ]?$")
ABOUT = r"\\(?:approx|sim|simeq|cong|thickapprox)(?![A-Za-z])"
LATEX_THOUSANDS = re.compile(r"(?<![\w.,^}\\])[0-9]{1,3}(?:(?:\\[,;: ]|[~ ])[0-9]{3})+(?![0-9])")
# digits in groups of three, set apart by one kind of sign: 1,000,000 or 1 000 000 or 1'000'000
DIGIT_GROUPS = re.compile(r"(?<![\w.,^}])[0-9]{1,3}([,' ])[0-9]{3}(?:\1[0-9]{3})*(?![0-9]|[,' ][0-9])")

NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
POWER = rf"{NUMBER}(?: ?\^ ?(?:\{{ ?[-+]?[0-9]{{1,3}} ?\}}|-?[0-9]{{1,3}}(?![0-9])))?"
PRODUCT = rf"{POWER}(?: ?(?:[×·*]|x(?= ?10 ?\^)) ?{POWER})*"
FRAC = rf"\\[dtc]?frac ?(?:\{{ ?([-+]?{PRODUCT}) ?\}}|([0-9])) ?(?:\{{ ?({PRODUCT}) ?\}}|([0-9]))"
PLAIN = re.compile(
    rf"(?P<sign>(?<![\w)}}\]])[-+])? ?(?P<whole>[0-9]+(?= (?:{PRODUCT}) ?/| ?\\[dtc]?frac))? ?"
    rf"(?:{FRAC}|(?P<top>{PRODUCT})(?: ?/ ?(?P<bottom>{PRODUCT}))?)(?:_(?:\{{ ?)?(?P<base>[0-9]{{1,2}})\}}?)?"
)
FACTOR = re.compile(rf"({NUMBER})(?: ?\^ ?\{{? ?([-+]?[0-9]+))?")
BEFORE = r"(?!.*(?:square|cube|reciprocal|third|quarter) of\b)"
BEFORE = re.compile(BEFORE + r"(?:[^\W\d_]|[\s,.:')]|(?<!\w)\(|(?<=[a-z])-(?=[a-z]))*")
AFTER = re.compile(r"(?!K [a-z]{3})(?:[^\W\d_]|(?<=[^\W\d_])\^\{?-?[0-9]|[\s/.,()'°%{}·]|(?<!\s)-(?=[a-z]{3}))*")
WORD = re.compile(r"[^\W\d_]+(?:'[a-z]{3,})?")
CURRENCY = "$€£¥₹₩₽¢₺₫฿₪₱# "
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NOT_UNITS = {*SCALES} | set(
    "or and not no nor none never minus negative plus times half halves thirds fourths fifths sixths eighths tenths "
    "hundredths thousandths ths twice double triple doubled tripled halved squared cubed factorial more less fewer "
    "greater least most below above over under beyond exceeds between than to mod modulo base choose divided "
    "multiplied root sqrt sin cos tan log one two three four five six seven eight nine ten eleven twelve twenty thirty "
    "forty fifty tens hundreds thousands millions lakh crore except but wrong incorrect false".split()
)
"""Words that make another number, or a second one, of the number beside them."""
UNITS = frozenset(
    "m g s h L N J W V K C F A Å T Ω cm mm km nm kg mg ml mL ft in yd mi oz lb hr Hz Pa kW kV kJ eV au AU pc am pm "
    "AM PM dB St cc sq kΩ μm μs ms ns of on is at by we he it US HK NZ Rs px KB MB GB st nd rd th".split()
)
"""Units, and words of phrases; another word of one or two letters may be a variable."""
FUNCTIONS = re.compile(r"(?<![A-Za-z\\])(?:np\.)?(sin|cos|tan|log|ln|exp|pi|arc[a-z]+)(?![a-z])")
# words, a ratio, an inequality, a base: math-verify would take letters for factors, and read past the rest
NO_NUMBER = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2}|[:;?<>]|\\(?:[lg]eq?|neq?)(?![a-z])|(?<![_0-9])[0-9]+(?:_| +[0-9])")
WRAPPER = re.compile(r"\\(?:text|mbox|textbf|textit|mathrm)\s*\{([^{}\\]*[A-Za-z][^{}\\]*)\}")
PHRASE = re.compile(r"(?=.*[aeiouy])[^\W\d_]{4,}(?:[ '-][^\W\d_]+)*", re.IGNORECASE)
VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{1,3}(?![A-Za-z])")
CLOCK = re.compile(r"[0-9] ?: ?[0-9]+(?: ?:|.*[ap]m\b)", re.IGNORECASE)  # and a ratio of three
SET_AND_TUPLE = re.compile(r"(?:\\left ?)?\\\{[^<>|:\n]*\n(?:\\left ?)?[(\[][^()\[\]]*[)\]]")
NAME = re.compile(r"^\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?\s*=(?=[^=]*$)")


class Number(NamedTuple):
    """A plain number as it was read."""

    value: Fraction
    places: int  # decimal places as written; -1: not a decimal
    base: str  # "": none
    percent: bool


def check_answers(pairs: list[tuple[str, str | None]], seconds: float = 5.0) -> list[float]:
    r"""For each (gold, answer): 1.0 if they are equal, else 0.0; the answer None is always 0.0. `seconds`: wall time
    per distinct pair in the child. Raises RuntimeError when the child cannot be started.

    >>> check_answers([("0.5", r"\frac12"), ("18", "18 cm^2"), ("12", "12 or 13"), (r"\text{east}", "seat")])
    [1.0, 1.0, 0.0, 0.0]
    """
    verdicts = {pair: _check(*pair, seconds) for pair in sorted({pair for pair in pairs if pair[1] is not None})}
    return [verdicts.get(pair, 0.0) for pair in pairs]


def _check(gold: str, answer: str, seconds: float) -> float:
    if max(len(gold), len(answer)) > MAX_ANSWER_CHARS:
        return 0.0
    gold, answer = _spell(gold), _spell(answer)
    if not gold or not answer or gold == answer:
        return float(gold == answer != "")
    number = read_number(gold, is_gold=True)
    if number is None and (WRAPPER.fullmatch(gold) or PHRASE.fullmatch(gold) or CLOCK.search(gold)):
        letter = option_letter(answer, "ABCDEFGHIJ")
        gold, answer = (normalise(text).casefold().replace(" ", "").strip("()[]{}$") for text in (gold, answer))
        return float(gold == answer or len(gold) == 1 and gold.upper() == letter)
    if SET_AND_TUPLE.fullmatch(f"{gold}\n{answer}") or SET_AND_TUPLE.fullmatch(f"{answer}\n{gold}"):
        return 0.0
    names = {text.rpartition("=")[0].replace(" ", "") for text in (gold, answer)} - {""}
    if number and len(names) < 2:  # x = 5 is not y = 5
        if found := read_number(answer):
            return float(_same(number, found))
        if NO_NUMBER.search(FUNCTIONS.sub("", undo_latex(answer))):
            return 0.0
    answer = answer if "=" in gold else NAME.sub("", answer)
    bases = [re.findall(r"[0-9]_\{?(\w+)", text) for text in (gold, answer)]
    if bases[1] and bases[0] != bases[1]:
        return 0.0
    variables = bool(number or VARIABLE.search(WRAPPER.sub("", gold)))
    gold, answer = _algebra(gold, variables), _algebra(answer, variables)
    return 1.0 if gold == answer else equal_in_child(gold, answer, seconds)


def _spell(text: str) -> str:
    r"""Unicode's signs as LaTeX has them; nothing around the whole (markdown, dollars, quotes, boxes, final stops).
    `"**x²**."` -> `"x^{2}"`, `"3½"` -> `r"3\frac{1}{2}"`, `"–３"` -> `"-3"`"""
    text = SMALL_DIGITS.sub(lambda run: ("_{%s}" if "₀" <= run[0][0] <= "₉" else "^{%s}") % _ascii(run[0]), text)
    text = ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text)
    text = "".join(map(_ascii, text))
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    for _ in range(9):  # layers
        text = FINAL_STOP.sub("", LOOK.sub(" ", text).strip())
        for left, right in OUTER:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner
        if len(text) > 2 and text[0] in QUOTES and text[-1] in QUOTES:
            text = text[1:-1]
        inner = text.removeprefix(r"\boxed").lstrip()
        if inner.startswith("{") and inner.endswith("}") and last_answer(rf"\x{inner}", "x") == inner[1:-1]:
            text = inner[1:-1]
    return text


def _ascii(char: str) -> str:
    kind = unicodedata.category(char) if len(char) == 1 else ""
    if kind == "Cf" or char in SYMBOLS:
        return SYMBOLS.get(char, "")
    if kind == "No" and unicodedata.decomposition(char).startswith("<fraction>"):
        return re.sub("(.*)⁄(.*)", r"\\frac{\1}{\2}", unicodedata.normalize("NFKC", char))
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    return "-" if kind == "Pd" else unicodedata.normalize("NFKC", char).replace("−", "-")


def read_number(text: str, is_gold: bool = False) -> Number | None:
    r"""The plain number that a text is, whatever currency, unit, name or words stand beside it; else None.

    is_gold: no words before it, and no letters behind, which are variables there: \frac{1}{m} t, 2 m.

    >>> read_number("18 cm^2").value, read_number(r"x = \frac{3}{4}").value, read_number(r"\approx 2.5e-3 J").value
    (Fraction(18, 1), Fraction(3, 4), Fraction(1, 400))
    >>> [read_number(text) for text in ("12 or 13", "12!", "5x", "18 feet 6 inches", "more than 12")]
    [None, None, None, None, None]
    """
    text = WRAPPER.sub(" unit ", text).replace("unit ^", "unit^") if is_gold else text
    text = re.sub(r"\^ ?\{ ?\\circ ?\}|\^ ?\\circ|\\(?:degree|circ)(?![A-Za-z])", "°", text)
    for command, char in {"times": "×", "cdot": "·", "Omega": "Ω", "mu": "μ", "left": "", "right": ""}.items():
        text = re.sub(rf"\\{command}(?![A-Za-z]) ?", char, text)
    text = " ".join(re.sub(r"\\q?quad", " ", undo_latex(text)).split())
    text = re.sub(r"(?<!\S)(\*\*|[*`])([^*`]+)\1(?!\S)", r"\2", text)  # one of several words in bold
    text = re.sub(r"\\[dt]?frac ?\{ ?([A-Za-z]+) ?\} ?\{ ?([A-Za-z]+) ?\}", r"\1/\2", text)  # m/s
    head, equals, tail = re.sub(ABOUT, "=", text).rpartition("=")
    if equals and not re.search(r"^-|\d *[A-Za-z\\(]|[,;<>!]|\\[lgn]e|\b(?:or|and)\b", head):
        text = tail
    text = re.sub(rf"^-[{CURRENCY}]+", "-", text.strip().removeprefix("(").removesuffix(")"))
    text = DIGIT_GROUPS.sub(lambda found: re.sub("[,' ]", "", found[0]), text)
    found = PLAIN.search(text) if len(text) <= MAX_NUMBER_CHARS else None
    if not found:
        return None
    before, after = text[: found.start()].rstrip(CURRENCY).replace("$", ""), text[found.end() :].strip(CURRENCY)
    if (before and is_gold) or not BEFORE.fullmatch(before) or not AFTER.fullmatch(after):
        return None
    names = WORD.findall(after)
    scale = SCALES.get(names[0].lower(), 1) if names else 1
    for name in WORD.findall(before) + names[scale > 1 :]:
        known = not is_gold and ({name, name[1:] and name.lower()} & UNITS or name == "a" and names[-1:] != ["a"])
        variable = len(name) < (4 if is_gold else 3) and unicodedata.category(name[0]) != "Lo" and not known
        if variable or name.lower() in NOT_UNITS:
            return None
    parts = [found["top"], found["bottom"] or "1"] if found["top"] else [part for part in found.groups()[2:6] if part]
    top, bottom = map(_product, parts)
    if not bottom or (found["whole"] and not top):
        return None
    value = (top / bottom + int(found["whole"] or 0)) * scale * (-1 if found["sign"] == "-" else 1)
    places = len(found["top"].partition(".")[2]) if re.fullmatch(r"[\d.]+", found[0].lstrip("+- ")) else -1
    return Number(value, places, found["base"] or "", "%" in after or "percent" in names)


def _product(text: str) -> Fraction:
    value = Fraction(-1 if text.startswith("-") else 1)
    for factor, power in FACTOR.findall(text):
        value *= Fraction(factor) ** int(power or 1) if Fraction(factor) or not power else 0
    return value


def _same(gold: Number, answer: Number) -> bool:
    """Whether two plain numbers are equal. The gold's base goes without saying; a percent is a number or a share."""
    if answer.base not in ("", gold.base or "10"):
        return False
    if gold.value in (answer.value, answer.value * Fraction(100) ** (gold.percent - answer.percent)):
        return True
    for exact, decimal in ((gold.value, answer), (answer.value, gold)):
        if decimal.places >= 6 and 10**2000 % exact.denominator:  # no decimal is that fraction
            return abs(exact - decimal.value) * 2 <= Fraction(1, 10**decimal.places)
    return False


def _algebra(text: str, variables: bool) -> str:
    r"""A text as math-verify reads it right: there `2\,107` is 2 + 107, 4.5e33 has a factor e, `a t` a unit t."""
    text = LATEX_THOUSANDS.sub(lambda found: re.sub(r"[^0-9]", "", found[0]), re.sub(rf"^{ABOUT}", "", text).strip())
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*\{([abceiknp-ru-z]|[^{}]*(?:\d|\b(?:and|or)\b)[^{}]*)\}", r"\1", text)
    text = re.sub(r"(?:, {0,3})?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ",", FUNCTIONS.sub(r"\\\1 ", text))
    text = re.sub(r"(?<![\w.\\^{}])([0-9.]+|\([0-9.]+\))(?=(?:\\left)?\()", r"\1\\cdot ", text)  # 2(1/2) is no 2 1/2
    text = re.sub(r"^\\\{ ?[a-z] ?(?:\\in ?\\mathbb ?\{?R\}? ?)?(?:\\mid|[|:])(.*)\\\}$", r"\1", text)
    text = re.sub(r"(?<![A-Za-z\\])E(?=_)", r"\\epsilon ", text)  # else E_{1} is Euler's number, as 2e-3 inside may be
    text = re.sub(r"^([-+]?\d+(?:\.\d*)?)[eE]\+?(-?)0*(\d{1,4})$", r"\1\\times 10^{\2\3}", text)
    # in braces, letters at the end do not pass for a unit
    end = rf"(?<=.)(?<![A-Za-z\\])(?![ie](?![A-Za-z]))([A-Za-z]{{1,3}})(?=(?:\s*{WRAPPER.pattern})?$)"
    return re.sub(end, r"{\1}", text) if variables else text


# ------------------------------------------------------------- letters, BBEH's texts, the last number of a text
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?")
NUMBER_IN_TEXT = re.compile(r"(?:(?<![\w)}\]])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:/\d+|\.\d+)?|\.\d+)")
ANSWER_PHRASE = re.compile(r"The (?:final )?answer is[: ]\s*")
LETTER = re.compile(
    r"(?i:(?:the |my |so the )?(?:correct |right |final |best )?(?:answer|option|choice|letter)(?: is)?:? ?)*"
    r"[(\[【$]? ?([A-Za-z])\$?(?: ?[)\].:、】]+ ?| ?;(?! ?[A-Za-z]\b) ?|,? *[—–]+ *| +- *| *(?=\(.*\)$)"
    r"| is (?=(?:the )?(?:correct|right|answer))|$)(.*)"
)
# in the words behind the letter: an alternative at once, a letter alone, or another letter set off as the first is
ANOTHER = (
    r"(?i:and|or|&|,|/)(?!\w)|[(\[]?[{0}][)\].:]*$|(?:.* )?[a-z0-9]\S* [{0}]\. |(?!(?i:both|all|neither|none)\b)"
    r"(?:(?:.*(?:[,;/&)]|\b(?:and|or)) ?)?(?i:option )?[(\[]?[{0}](?:[)\].:](?!\w)| ?[—–(]| -)|.* [(\[]?[{0}][)\]])"
)


def option_letter(box: str, letters: str) -> str | None:
    r"""The one option that a box names, as a capital of `letters`; None if it names none, several, or one beyond them.

    Words may follow the letter after a bracket, a stop, a colon or a dash, and may name other options: "E. A and B
    only" is E. Not read: words without a letter; "A dog", where A may be the article; "A. 3, B. 4".

    >>> [option_letter(box, "ABCD") for box in (r"\textbf{(c)}", "C. nitrogen", "Answer: C.", "A dog", "A, C", "E")]
    ['C', 'C', 'C', None, None, None]
    """
    box = re.sub(r"\n(?=[(\[]?[A-Z][)\].:])", ", ", LOOK.sub("", re.sub(r"\\(?:left|right)(?![a-z])", "", box)))
    text = normalise(box).replace("**", "").replace("__", "").strip("$*{}\\ ")
    found = LETTER.fullmatch(text)
    letter = found[1].upper() if found else ""
    return None if not letter or letter not in letters or re.match(ANOTHER.format(letters), found[2]) else letter


def guessed_letter(id_: str, letters: str) -> str:
    """A letter drawn from a hash of the item's id: the same in every run, and about even over the options."""
    return letters[int(hashlib.sha256(f"guess {id_}".encode()).hexdigest(), 16) % len(letters)]


def fuzzy_match(answer: str, target: str) -> bool:
    r"""BBEH's published rules (google-deepmind/bbeh, evaluate.py), in our words, applied to what stands in the box.

    Only the answer's first line counts, without case, bold marks, a final full stop and the space after a comma. It
    equals the target as text, as a number, without apostrophes, or but for square brackets around one of them, round
    brackets around a single character, or a question mark at the answer's end. Differences from the source: it reads
    no box; here LaTeX's text wrappers go, Python's inf, nan and 1_000 are no numbers, and an empty answer is wrong.

    >>> fuzzy_match("(A)", "a"), fuzzy_match("17", "17.0"), fuzzy_match("day", "[day]"), fuzzy_match("(A) Sam", "(A)")
    (True, True, True, False)
    """
    answer = ANSWER_PHRASE.split(answer.strip())[-1].strip().removesuffix(".")
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer[1:-1]
    answer, target = (text.strip().lower().replace(", ", ",") for text in (undo_latex(answer), target))
    answer = answer.replace("**", "").split("\n")[0].removesuffix(".").strip()
    if not answer or answer == target:
        return answer != ""
    for bracketed, other in ((answer, target), (target, answer)):
        if len(bracketed) == 3 and bracketed[0] == "(" and bracketed[2] == ")":
            return bracketed[1] == other
    if PLAIN_NUMBER.fullmatch(answer) and PLAIN_NUMBER.fullmatch(target) and float(answer) == float(target):
        return True
    same = answer.replace("'", "") == target.replace("'", "")
    return same or answer in (f"[{target}]", f"{target}?") or target == f"[{answer}]"


def last_number(text: str) -> str | None:
    """The last number of a text, without the commas of its thousands: integer, decimal or fraction.

    >>> last_number("So 3 boxes cost $1,234.50."), last_number("It is 10-7 = 3/4"), last_number("None.")
    ('1234.50', '3/4', None)
    """
    found = NUMBER_IN_TEXT.findall(text)
    return found[-1].replace(",", "").replace("−", "-") if found else None
