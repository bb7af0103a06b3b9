"""What the experiments expect: the arms, and claims with their predictions, written before the runs were made.

An arm is what `train.py` is given. A claim names the arms that it needs, says in words what will come out, and says the
same as a test of their runs. A prediction is committed before its runs and never edited after; one that fails stands in
the tables as failed. Seeds 0 to 3 were used while the code was tuned; SEEDS were not. The arms of the mini-wiki
get the same number of responses a step, the generator's included (methods.py), as long as all masks are valid; those of
G the same number of predictions, and one of four masks drawn by rule makes it 280 for 288.
"""

from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from masking import WORD_KINDS

SEEDS = (10, 11, 12, 13, 14)
SEVERAL_KEYS = ["data=runs/experiments/several.jsonl", "max_occurrences=1", "max_span_words=2"]
LADDER = "configs/ladder.yaml"
RLVR = ["configs/tiny-rlvr.yaml", "data=runs/experiments/questions.jsonl", "heldout=0.4", "steps=60"]
WIKI_ARMS = {
    "active": ["configs/tiny.yaml"],
    "random_span": ["configs/tiny-random-span.yaml"],
    "frozen generator": ["configs/tiny-frozen-generator.yaml"],
    "rewards shuffled": ["configs/tiny.yaml", "shuffle_rewards=true"],
    "active, 1 of 4 masks random": ["configs/tiny.yaml", "masks_per_passage=3", "random_masks=1"],
    "sft": ["configs/tiny-sft.yaml"],
    "cpt": ["configs/tiny-cpt.yaml"],
    "random_token": ["configs/tiny-random-token.yaml"],
    "entropy_token, top 20 %": ["configs/tiny-entropy-token.yaml"],
    "entropy_token, top 60 %": ["configs/tiny-entropy-token.yaml", "entropy_share=0.6"],
    "rlp": ["configs/tiny-rlp.yaml"],
    "quiet_star": ["configs/tiny-quiet-star.yaml"],
    "active, G = 4": ["configs/tiny.yaml", "masks_per_passage=8", "predictions_per_mask=4"],
    "active, G = 16": ["configs/tiny.yaml", "masks_per_passage=2", "predictions_per_mask=16"],
}
LONG_ARMS = {f"{arm}, 500 steps": [*WIKI_ARMS[arm], "steps=500"] for arm in ("active", "random_span")}
SEVERAL_ARMS = {
    "active, two facts": ["configs/tiny.yaml", *SEVERAL_KEYS],
    "active, two facts, 200 steps": ["configs/tiny.yaml", *SEVERAL_KEYS, "steps=200"],
    "cpt, two facts": ["configs/tiny-cpt.yaml", *SEVERAL_KEYS],
}
RLVR_ARMS = {"rlvr": RLVR, "random_span, then rlvr": RLVR, "active, then rlvr": RLVR}
LADDER_ARMS = {
    "ladder: active": [LADDER],
    "ladder: random_span": [LADDER, "method=random_span"],
    "ladder: frozen generator": [LADDER, "train_generator=false"],
    "ladder: rewards shuffled": [LADDER, "shuffle_rewards=true"],
    "ladder: sft, bare answers": [LADDER, "method=sft", "sft_answer= \\boxed{ {answer} }"],
    "ladder: star": [LADDER, "method=star"],
    "ladder: rlp": [LADDER, "method=rlp", "rlp_prompt=' {passage}'", "passages_per_step=32"],
    "ladder: quiet_star": [LADDER, "method=quiet_star"],
}
ARMS = WIKI_ARMS | LONG_ARMS | SEVERAL_ARMS | RLVR_ARMS | LADDER_ARMS
STARTS_FROM = {"random_span, then rlvr": "random_span", "active, then rlvr": "active"}
"""Arms that start from the last checkpoint of another arm's run with the same seed."""
LENGTH = "pred/length_mean"
KEYS = "method seed steps dtype train_generator mask_content learning_rate passages_per_step masks_per_passage".split()
KEYS += ["predictions_per_mask", "random_masks", "generator_reward"]
LABELS = ("fact", "shown", "noise", "copy", "hop1", "hop2", "hop3", "hop4", *WORD_KINDS)
CURVES = ["gen/valid_rate", "gen/reward", "gen/distinct", "gen/top_word_share", *(f"gen/share_{one}" for one in LABELS)]
CURVES += ["pred/accuracy", "pred/groups_kept", LENGTH, "entropy"]
TOTALS = ("responses", "response_tokens", "trained_tokens", "flops", "pred/responses")
Results = dict[str, list[dict]]
"""Per arm its runs, in the order of seeds."""


class Claim(NamedTuple):
    """What is expected, in words and as a test of the runs; both were written before the runs were made."""

    prediction: str
    arms: tuple[str, ...]
    test: Callable[..., bool]  # (the runs of each of `arms`) -> whether the prediction holds

    def holds(self, results: Results) -> bool:
        return self.test(*(results[arm] for arm in self.arms))


def verdicts(held: dict[str, bool]) -> str:
    """`Held: a, b. **Failed: c.**` of names and whether each holds, in their order."""
    true, false = (", ".join(name for name, holds in held.items() if holds == kind) for kind in (True, False))
    return " ".join([*([f"Held: {true}."] if true else []), *([f"**Failed: {false}.**"] if false else [])])


def ends(runs: list[dict], probe: str) -> list[float]:
    return [run["probes"][-1][probe] for run in runs]


def gains(runs: list[dict], probe: str) -> list[float]:
    return [run["probes"][-1][probe] - run["probes"][0][probe] for run in runs]


def late(runs: list[dict], curve: str, first: int = -4, last: int | None = None) -> list[float]:
    """Mean of each run over its last 20 steps, or the points `first` to `last`; a point is a mean over five steps."""
    return [fmean(run["curves"][curve][first:last]) for run in runs]


def differences(runs: list[dict], others: list[dict], probe: str) -> list[float]:
    """Differences at the end, seed by seed, of the seeds that both have."""
    other_ends = dict(zip((run["seed"] for run in others), ends(others, probe), strict=True))
    return [run["probes"][-1][probe] - other_ends[run["seed"]] for run in runs if run["seed"] in other_ends]


def growth(runs: list[dict]) -> list[float]:
    """Mean length of the last 20 steps over that of the first five."""
    return [end / run["curves"][LENGTH][0] for run, end in zip(runs, late(runs, LENGTH), strict=True)]


def climb(runs: list[dict], first: int = -4, last: int | None = None) -> list[float]:
    """The same mean for the share of masks on facts of two to four steps."""
    shares = [late(runs, f"gen/share_hop{n}", first, last) for n in (2, 3, 4)]
    return [sum(parts) for parts in zip(*shares, strict=True)]


CLAIMS = {
    "learns": Claim(
        "With `active`, greedy accuracy on facts rises by at least 0.35 in every seed; with shuffled rewards sampled "
        "accuracy on facts rises by more than 0.05 in none.",
        ("active", "rewards shuffled"),
        lambda active, shuffled: min(gains(active, "greedy_fact")) >= 0.35 and max(gains(shuffled, "fact")) <= 0.05),
    "finds facts": Claim(
        "In the last 20 steps at least half of the generator's valid masks are on the fact, at most 5 % on noise, in "
        "every seed. On facts, sampled, `active` ends above `random_span` and above the frozen generator by at least "
        "0.08 in every seed.",
        ("active", "random_span", "frozen generator"),
        lambda active, random, frozen: (
            min(late(active, "gen/share_fact")) >= 0.5 and max(late(active, "gen/share_noise")) <= 0.05
            and min(differences(active, random, "fact")) >= 0.08 and min(differences(active, frozen, "fact")) >= 0.08)),
    "keeps copies": Claim(
        "With one of four masks drawn at random, copies (sampled) lose at most 0.03 on average, and the mean on facts "
        "stays within 0.10 of plain `active`.",
        ("active", "active, 1 of 4 masks random"),
        lambda plain, mixed: fmean(gains(mixed, "copy")) >= -0.03 and fmean(differences(mixed, plain, "fact")) >= -0.1),
    "comes back": Claim(
        "Written after one run of 2,000 steps (seed 0), which had won back by step 400 what it forgot. In 500 steps of "
        "`active` copies, sampled, fall below 0.85 and end above 0.95 in every seed, for the generator turns to them: "
        "at least 0.3 of its masks in some five steps. Facts end above 0.9 in every seed, and on average above "
        "`random_span` by at least 0.05.",
        ("active, 500 steps", "random_span, 500 steps"),
        lambda active, random: (
            all(min(probe["copy"] for probe in run["probes"]) < 0.85 for run in active)
            and min(ends(active, "copy")) > 0.95 and min(ends(active, "fact")) > 0.9
            and min(max(run["curves"]["gen/share_copy"]) for run in active) >= 0.3
            and fmean(differences(active, random, "fact")) >= 0.05)),
    "given answers": Claim(
        "`sft` ends within 0.08 of `active` on greedy facts (mean) without losing copies; `cpt` loses at least 0.1 of "
        "the copies.",
        ("active", "sft", "cpt"),
        lambda active, sft, cpt: (
            abs(fmean(differences(sft, active, "greedy_fact"))) <= 0.08 and fmean(gains(sft, "copy")) >= -0.03
            and fmean(gains(cpt, "copy")) <= -0.1)),
    "entropy": Claim(
        "The 20 % of tokens with the highest entropy are noise here: sampled facts gain under 0.05 on average. The "
        "highest 60 % hold the facts too: they gain at least 0.05.",
        ("entropy_token, top 20 %", "entropy_token, top 60 %", "random_token"),
        lambda top_20, top_60, random: fmean(gains(top_20, "fact")) < 0.05 and fmean(gains(top_60, "fact")) >= 0.05),
    "thoughts in the text": Claim(
        "Written when one run of `quiet_star` was known (seed 0: facts 0.35 sampled, copies 0.52). Both sample more "
        "tokens than `active`. `rlp` pays thoughts before one token of a text, and this base writes none: facts and "
        "copies, sampled, move by less than 0.1 on average. `quiet_star` is trained on the text too: facts gain less "
        "than 0.15 on average, copies lose at least 0.2. On greedy facts `active` ends at least 0.2 above both in "
        "every seed.",
        ("active", "rlp", "quiet_star"),
        lambda active, rlp, quiet: (
            max(abs(fmean(gains(rlp, probe))) for probe in ("fact", "copy")) < 0.1
            and fmean(gains(quiet, "fact")) < 0.15 and fmean(gains(quiet, "copy")) <= -0.2
            and min(differences(active, rlp, "greedy_fact") + differences(active, quiet, "greedy_fact")) >= 0.2)),
    "difficulty": Claim(
        "The generator's best-paid accuracy is 1 - G^(-1/(G-1)): 0.37, 0.26, 0.17 at G = 4, 8, 16. So the mean "
        "accuracy of its masks over steps 41 to 100 falls from G = 4 to 8 to 16, at equal predictor rollouts.",
        ("active, G = 4", "active", "active, G = 16"),
        lambda *arms: (
            fmean(late(arms[0], "pred/accuracy", 8)) > fmean(late(arms[1], "pred/accuracy", 8))
            > fmean(late(arms[2], "pred/accuracy", 8)))),
    "never masked": Claim(
        "Two facts an article, on the same base, which has never met two. With `active`, greedy accuracy rises by at "
        "least 0.20 on average on facts that may be masked, and by at most 0.05 on facts that it reads but cannot mask "
        "and on facts that it never reads: nothing teaches them. `cpt`, which learns the text that it reads, raises "
        "those that it reads by at least 0.10, the never read by at most 0.05. No mask hits what cannot be masked.",
        ("active, two facts", "cpt, two facts"),
        lambda active, cpt: (
            fmean(gains(active, "greedy_fact")) >= 0.20 and fmean(gains(active, "greedy_shown")) <= 0.05
            and fmean(gains(active, "greedy_unseen")) <= 0.05 and fmean(gains(cpt, "greedy_shown")) >= 0.10
            and fmean(gains(cpt, "greedy_unseen")) <= 0.05
            and max(max(run["curves"]["gen/share_shown"]) for run in active) == 0)),
    "never masked, longer": Claim(
        "Written when two of the five runs above were known (greedy 0.56 and 0.23 on facts that may be masked): 100 "
        "steps are few for a base that begins with invalid masks. At 200, whose first 100 are those, such facts gain "
        "at least 0.30 on average, the read and never masked and the never read at most 0.05.",
        ("active, two facts, 200 steps",),
        lambda active: (
            fmean(gains(active, "greedy_fact")) >= 0.30 and fmean(gains(active, "greedy_shown")) <= 0.05
            and fmean(gains(active, "greedy_unseen")) <= 0.05)),
    "before rlvr": Claim(
        "60 steps of `rlvr` on questions about 47 of the 84 subjects; greedy, on questions about the other 37. From "
        "the base, it gains at most 0.10 on average. After `active`, which has read about all subjects, it ends higher "
        "than from the base by at least 0.30 in every seed, and than after `random_span` by at least 0.10 on average. "
        "On the questions trained on, accuracy over the last 20 steps is higher after `active` than from the base too.",
        ("rlvr", "random_span, then rlvr", "active, then rlvr"),
        lambda base, random, active: (
            fmean(gains(base, "greedy")) <= 0.10 and min(differences(active, base, "greedy")) >= 0.30
            and fmean(differences(active, random, "greedy")) >= 0.10
            and fmean(late(active, "pred/accuracy")) > fmean(late(base, "pred/accuracy")))),
    "no thought": Claim(
        "The base was never taught to write anything before its answer, and nothing here pays for it. So with the "
        "answer opened at once, greedy accuracy at the end is within 0.02 of that with room for a thought, in every "
        "seed. The mini-wiki says nothing on whether thoughts help.",
        ("active, two facts", "active, then rlvr"),
        lambda *arms: all(
            abs(run["probes"][-1]["greedy"] - run["probes"][-1]["greedy_no_thought"]) <= 0.02
            for runs in arms for run in runs)),
    "thoughts grow": Claim(
        "The ladder. Nothing rewards length, and with `active` the predictor's mean response over the last 20 steps is "
        "at least 1.7 times that of the first five steps, in every seed, and longer than with `random_span` in every "
        "seed; with shuffled rewards in none.",
        ("ladder: active", "ladder: random_span", "ladder: rewards shuffled"),
        lambda active, random, shuffled: (
            min(growth(active)) >= 1.7 and max(growth(shuffled)) < 1.7
            and all(a > b for a, b in zip(late(active, LENGTH), late(random, LENGTH), strict=True)))),
    "thoughts pay": Claim(
        "The ladder, facts of three and four steps that nothing trains. With `active` they end, sampled, at least 0.5 "
        "above the same model answering at once, in every seed, and a thought about another article costs at least 0.2 "
        "of all answers. `sft` on bare answers ends under 0.35 in every seed; with shuffled rewards they gain at most "
        "0.05.",
        ("ladder: active", "ladder: sft, bare answers", "ladder: rewards shuffled"),
        lambda active, sft, shuffled: (
            all(ends([run], hop)[0] - ends([run], f"no_thought_{hop}")[0] >= 0.5
                for run in active for hop in ("hop3", "hop4"))
            and min(ends(active, "thought_use")) >= 0.2
            and max(ends(sft, "hop3") + ends(sft, "hop4")) < 0.35
            and max(gains(shuffled, "hop3") + gains(shuffled, "hop4")) <= 0.05)),
    "climbs": Claim(
        "The ladder. The generator leaves what is obvious and climbs: of its valid masks the share on facts of two "
        "to four steps is over the last 20 steps at least 0.5, at least 0.3 above that of the first 20, in every seed, "
        "and at least 0.3 above the frozen generator's. Facts of two steps lead those of four at first: their share "
        "is the larger over steps 21 to 40 and the smaller over the last 20, in the mean over seeds.",
        ("ladder: active", "ladder: frozen generator"),
        lambda active, frozen: (
            min(climb(active)) >= 0.5
            and min(b - a for a, b in zip(climb(active, 0, 4), climb(active), strict=True)) >= 0.3
            and min(climb(active)) - max(climb(frozen)) >= 0.3
            and fmean(late(active, "gen/share_hop2", 4, 8)) > fmean(late(active, "gen/share_hop4", 4, 8))
            and fmean(late(active, "gen/share_hop2")) < fmean(late(active, "gen/share_hop4")))),
    "relatives": Claim(
        "The ladder, facts of four steps that nothing trains, sampled, means over seeds. `star`, which learns from "
        "right responses alone, ends within 0.15 of `random_span`. `rlp`, which pays thoughts before any token of a "
        "text and never asks for an answer, gains at least 0.2; `quiet_star`, whose thoughts stand between tokens that "
        "the base has never seen, gains less than 0.1.",
        ("ladder: star", "ladder: random_span", "ladder: rlp", "ladder: quiet_star"),
        lambda star, random, rlp, quiet: (
            abs(fmean(differences(star, random, "hop4"))) <= 0.15 and fmean(gains(rlp, "hop4")) >= 0.2
            and fmean(gains(quiet, "hop4")) < 0.1)),
}
