r"""Prompts of the two roles and of questions; finding the answer, `\mask{...}` or `\boxed{...}`, in a response.

The paper describes its prompts but does not reprint them; these are in our words, and config keys. Functions with a
`sampler` (rollout.Sampler) make token ids of them. What makes an answer right stands in rewards.py.

Run alone: `python -m doctest -v prompts.py`
"""

import re

from config import Config, ConfigError

MASK_PROMPT = r"""Choose words to hide in the passage. A reader who sees [mask] in their place will try to recover them.

Good words are one or more important entities (a name, a place, a date, a number, a term) that
- stand together in the passage and are copied exactly as written there;
- can be worked out from the rest of the passage;
- are moderately hard for you to work out: neither obvious nor a matter of luck;
- are short, a few words at most, and occur as rarely in the passage as possible.

Think briefly about which words fit, then write the chosen words in \mask{...}.

Passage:
Titan, the largest moon of Saturn, is the only moon with a dense atmosphere. Like the air of the Earth, it is mostly nitrogen.

Reasoning: The last word names a gas. No other word gives it away, but the comparison with the Earth leads to it. \mask{nitrogen}

Passage:
{passage}

Reasoning:"""  # noqa: E501 (a line break inside a sentence would be part of the prompt)
PREDICT_PROMPT = r"""Some words of the passage were replaced by [mask]. Recover them. If [mask] occurs several times, the same words are missing each time.

Reason step by step about what the rest of the passage says of the missing words, then put only the missing words in \boxed{...}.

Passage:
Titan, the largest moon of Saturn, is the only moon with a dense atmosphere. Like the air of the Earth, it is mostly [mask].

Reasoning: The missing word says what the atmosphere of Titan is made of. It is like the air of the Earth. About four fifths of that are nitrogen. \boxed{nitrogen}

Passage:
{passage}

Reasoning:"""  # noqa: E501
QUESTION_PROMPT = r"""{passage}

Reason step by step, and put the final answer in \boxed{...}.

Reasoning:"""
PREDICT_PREFIX = r" \boxed{"
"""Appended to a prediction prompt, it leaves no room for a thought: the completion begins inside the box."""
MASK_OPENING, BOXED_OPENING = r"\mask{", r"\boxed{"
SPACES = " \t\n"
"""What may stand between a command and its brace."""

AnswerScan = tuple[int, int, bool]
"""Where a scan stands: characters of the opening matched, brace depth (0: no answer is open), last one was a `\\`."""
START: AnswerScan = (0, 0, False)
CLOSED: AnswerScan = (0, -1, False)


def chat_frame(tokenizer) -> tuple[str, str] | None:
    """What the chat template writes before and after one user turn; None without a template. Rendered once for a run,
    because a template may write the time. Raises ConfigError where it cannot be rendered, or changes the turn's text.
    """
    if not tokenizer.chat_template:
        return None
    template, mark = tokenizer.chat_template, "\ue000"
    shown = f"{MASK_PROMPT} <&>"  # like a real turn: a template may cut or change a long one
    if isinstance(template, dict) and "default" not in template:
        raise ConfigError(
            f"chat_template='auto': the tokenizer has the templates {', '.join(template)} and none is called default; "
            "chat_template=none for plain text, or the path of a Jinja file"
        )
    turn = [{"role": "user", "content": mark + shown + mark}]
    try:
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # Jinja's own, or whatever the template raises
        raise ConfigError(f"chat_template: cannot be rendered ({error}); chat_template=none for plain text") from None
    head, *turns, tail = text.split(mark) if mark in text else ("", "")
    if turns != [shown]:
        raise ConfigError("chat_template: does not write a user turn as it stands, once; try chat_template=none")
    return head, tail


def leading_ids(tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts in front of any text; what it appends (an end token) is left out."""
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return next(whole[:n] for n in range(len(whole) + 1) if whole[n : n + len(plain)] == plain)


def encode(tokenizer, prompt: str, prefix: str = "", frame: tuple[str, str] | None = None) -> list[int]:
    """The prompt's token ids: one user turn of the chat template if there is one, else plain text.

    `prefix` opens the response (the probe's answer without a thought). frame: the rendered template (chat_frame).
    """
    frame = frame or chat_frame(tokenizer)
    if frame:  # the template writes its own special tokens
        turn, opened = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt.join(frame), prefix))
        return turn + opened
    return leading_ids(tokenizer) + tokenizer(prompt + prefix, add_special_tokens=False).input_ids


def mask_prompt(sampler, text: str) -> list[int]:
    """The generator's prompt for a passage, token ids."""
    prompt = (sampler.config.mask_prompt or MASK_PROMPT).replace("{passage}", text)  # not format: it has other braces
    return encode(sampler.tokenizer, prompt, "", sampler.frame)


def predict_prompt(sampler, masked: str, thought: bool = True) -> list[int]:
    """The predictor's prompt for a masked passage, token ids; without `thought` the answer is opened already."""
    prompt = (sampler.config.predict_prompt or PREDICT_PROMPT).replace("{passage}", masked)
    return encode(sampler.tokenizer, prompt, "" if thought else predict_prefix(sampler.config), sampler.frame)


def question_prompt(sampler, question: str, thought: bool = True) -> list[int]:
    """The prompt of a question with a verifiable answer, token ids; without `thought` the answer is opened already."""
    prompt = (sampler.config.question_prompt or QUESTION_PROMPT).replace("{passage}", question)
    return encode(sampler.tokenizer, prompt, "" if thought else predict_prefix(sampler.config), sampler.frame)


def check_prompts(sampler) -> None:
    """Raises ConfigError if the longest passage could make a prompt over max_prompt_tokens, or if the longest prompt
    and response exceed the model's context."""
    config = sampler.config
    context = getattr(sampler.replica.config.get_text_config(), "max_position_embeddings", None)
    longest = config.max_prompt_tokens + max(config.max_mask_tokens, config.max_prediction_tokens)
    if context and longest > context:
        raise ConfigError(
            f"max_prompt_tokens={config.max_prompt_tokens}: with the longest response {longest} tokens, but the model "
            f"has {context} positions (max_position_embeddings); lower it, max_mask_tokens or max_prediction_tokens"
        )
    room = config.max_prompt_tokens - config.max_passage_tokens
    frame = max(len(mask_prompt(sampler, "")), len(predict_prompt(sampler, "")))
    if frame > room:
        raise ConfigError(
            f"max_prompt_tokens={config.max_prompt_tokens}: must be at least {config.max_passage_tokens + frame}, "
            f"max_passage_tokens={config.max_passage_tokens} plus the {frame} tokens of the longer prompt template"
        )


def predict_prefix(config: Config) -> str:
    """What opens an answer without a thought."""
    return config.predict_prefix or PREDICT_PREFIX


def last_answer(text: str, command: str) -> str | None:
    r"""The content of the last `\command{...}` whose braces balance, as written; None if there is none.

    Braces nest; `\{` and `\}` do not count; an answer inside another one comes later than it. White space may stand
    before the brace, as in `\boxed {x}`. Linear in the text.

    >>> last_answer(r"Maybe \boxed{Paris}. No, \boxed{the {old} town}, or \boxed{Ly", "boxed")
    'the {old} town'
    >>> last_answer("Paris", "boxed")
    """
    answer, answer_start = None, -1
    open_braces = []  # from the outermost opening on: where its content starts, or -1 for a plain brace
    # A doubled backslash before the command is taken for an opening too: models write it, and mean one.
    for token in re.finditer(rf"\\?\\{command}[{SPACES}]*\{{|\\.|[{{}}]", text):
        kind = token[0]
        if kind == "{" and open_braces:
            open_braces.append(-1)
        elif kind == "}" and open_braces:
            start = open_braces.pop()
            if start > answer_start:
                answer, answer_start = (start, token.start()), start
        elif len(kind) > 2:
            open_braces.append(token.end())
    return None if answer is None else text[slice(*answer)]


def scan(state: AnswerScan, piece: str, opening: str) -> AnswerScan:
    r"""Reads on, from START, through the next piece of a text; CLOSED once the first answer is complete.

    `opening` is MASK_OPENING or BOXED_OPENING (or a tag, complete by itself). The pieces of a text, cut anywhere, are
    CLOSED from the very character on at which `last_answer` of the text so far is no longer None; a sampler can stop
    there without parsing anew.

    >>> state = START
    >>> for piece in ["So", r" \bo", "xed{19", "84", "}."]:
    ...     state = scan(state, piece, BOXED_OPENING)
    ...     print(repr(piece), state == CLOSED)
    'So' False
    ' \\bo' False
    'xed{19' False
    '84' False
    '}.' True
    """
    first = opening[0]
    if state == CLOSED or (state == START and first not in piece):
        return state
    matched, depth, escaped = state
    for char in piece:
        if char in SPACES and matched == len(opening) - 1 and opening.endswith("{"):
            continue
        # No other character of an opening is like its first, so a broken match can begin anew only there.
        matched = matched + 1 if char == opening[matched] else int(char == first)
        if matched == len(opening):
            if not opening.endswith("{"):
                return CLOSED  # a tag such as </think> is complete by itself
            matched, depth, escaped = 0, 1, False  # inside an open answer: the inner one will close first
        elif escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif depth and char in "{}":
            depth += 1 if char == "{" else -1
            if depth == 0:
                return CLOSED
    return matched, depth, escaped
