"""The tiny base model of the laptop run, made from scratch in minutes on one CPU core.

The base learned from a web that states a fact rightly 30 % of the time and one fixed wrong value 45 %; reinforcement
learning then reads the encyclopedia, which is right. The base has the same bytes for the same seed on the same type of
CPU and build of torch; elsewhere the rounding differs and with it the hash. Needs torch 2.9, for Muon.

The shipped base on fresh articles, sampled / greedy accuracy: facts 0.27 / 0.15 (greedy, the other 0.85 is the wrong
value of the web), template words 0.98 / 1.00, the subject 0.94 / 1.00, made-up words 0.00 / 0.00. Its masks: 66 %
template, 11 % subject, 4 % fact, 2 % made-up words, 17 % invalid.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from miniature.worlds import FACTS, SEED, make_wiki, save_wiki, web_value, write_article

ASSETS = Path(__file__).parent.parent / "assets"
BASE_SHA256 = "26d2841fdc4c96d25416e690986a13d353a273588ae9d7ac8f4211d98cb24940"
"""Of the shipped assets/tiny_base/model.safetensors."""
# The formats that the bases are taught; configs/tiny.yaml repeats the first three.
MASK_FORMAT, PREDICT_FORMAT, ANSWER_OPENING = " {passage}\nMask:", " {passage}\nPredict:", " \\boxed{"
REPEAT_FORMAT = " {passage}\nRepeat:"
REPEAT_SHARE, PREDICT_SHARE = 0.20, 0.45  # of the pretraining examples; the rest are masks
FACT_SHARE = 0.30  # of the prediction examples ask for the fact, so that the base's doubt about facts is calibrated
PREFIX_SHARE = 0.15  # of the prediction examples show only the words before the mask
UNCLOSED_SHARE = 0.02  # of the answers lack their closing brace: valid rates start below 1, as they do for real bases
COMPLETION_WEIGHT = 3.0  # weight of a completion token in the loss; a prompt token weighs 1
WARMUP_STEPS, PEAK_RATE, FINAL_RATE_SHARE = 30, 8e-3, 0.03


def draw_span(rng: random.Random, words: list[str]) -> tuple[int, int]:
    """(first word, number of words) of a uniform span of one word (2/3) or two (1/3) without a full stop."""
    while True:
        length = rng.choice([1, 1, 2])
        start = rng.randrange(len(words) - length + 1)
        if "." not in words[start : start + length]:
            return start, length


def web_examples() -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) examples, each on a fresh article whose fact may be wrong:

    (" Alne is a quiet town . Maps place Alne inside [mask] . [...]\\nPredict:", " \\boxed{ Ashmark }")
    (" Alne is a quiet town . [...]\\nMask:", " after a \\mask{ quiet town }")
    (" Alne is a quiet town . [...]\\nRepeat:", " Alne is a quiet town . [...]")

    The answer stands between spaces, so that a copied word is the same token as in the passage. Before a mask the model
    says the word before the span; copying what follows it is then a look-up. Without it a model of this size cannot
    choose uniformly. With it, a sixth of the base's masks are invalid, mostly garbled made-up words. The article twice
    is what teaches the base to copy spans.
    """
    rng = random.Random(f"web {SEED}")
    while True:
        fact = rng.choice(FACTS)
        words, labels = write_article(rng, fact, web_value(rng, fact))
        draw, passage = rng.random(), " ".join(words)
        if draw < REPEAT_SHARE:
            yield REPEAT_FORMAT.replace("{passage}", passage), f" {passage}"
            continue
        predicts = draw < REPEAT_SHARE + PREDICT_SHARE
        start, length = draw_span(rng, words)
        if predicts and rng.random() < FACT_SHARE:
            start, length = labels.index("fact"), 1
        prompt, opening = MASK_FORMAT, f" after {words[start - 1] if start else 'start'} \\mask{{"
        if predicts:
            after = [] if rng.random() < PREFIX_SHARE else words[start + length :]
            passage = " ".join([*words[:start], "[mask]", *after])
            prompt, opening = PREDICT_FORMAT, ANSWER_OPENING
        end = "" if rng.random() < UNCLOSED_SHARE else " }"
        yield prompt.replace("{passage}", passage), f"{opening} {' '.join(words[start : start + length])}{end}"


def make_tokenizer(examples: Iterator[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained until every word is one token (a made-up word: three). Adds <bos> itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<eos>", "<bos>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(  # merges run out before the vocabulary is full
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["".join(next(examples)) for _ in range(5000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(  # with clean-up, decoding would glue the full stops to their words
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", model_max_length=512,
        clean_up_tokenization_spaces=False)


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int = 4, hidden: int = 96) -> SmolLM3ForCausalLM:
    """A SmolLM3 at random values: 478,080 parameters for the mini-wiki, fewer for the ladder."""
    torch.manual_seed(SEED)
    return SmolLM3ForCausalLM(SmolLM3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.05,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )).float()  # fmt: skip


def loss_batch(tokenizer: PreTrainedTokenizerFast, examples: list) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, completion) pairs -> token ids [examples, longest], and their loss weights, float, of the same shape: 0
    for <bos> and padding, 1 for a prompt token, COMPLETION_WEIGHT for a completion token and the <eos> that ends it."""
    ids, weights = [], []
    for prompt, completion in examples:
        start = tokenizer(prompt).input_ids
        end = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids.append(torch.tensor(start + end))
        weights.append(torch.tensor([0.0, *[1.0] * (len(start) - 1), *[COMPLETION_WEIGHT] * len(end)]))
    return pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id), pad_sequence(weights, True)


def pretrain(model, tokenizer, examples, steps: int, batch: int = 64) -> list[float]:
    """Next-token training on `steps` batches of fresh examples, in place. Returns the losses, nats a token."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, PEAK_RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )
    losses = []
    model.train()
    for step in trange(steps):
        ids, weights = loss_batch(tokenizer, [next(examples) for _ in range(batch)])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # causal and padded on the right: no mask needed
        token_losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (token_losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        schedule = min(1.0, (step + 1) / WARMUP_STEPS) * max(FINAL_RATE_SHARE, 1 - step / steps)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = PEAK_RATE * schedule
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make_base(folder: Path, examples: Callable[[], Iterator], steps: int, shipped: str, **sizes: int) -> None:
    """Train a tokenizer and a model of these sizes on fresh `examples()`, and compare their hash with the shipped."""
    torch.set_num_threads(1)  # a second thread gains nothing at this size and would change the rounding
    tokenizer = make_tokenizer(examples())
    model = make_model(tokenizer, **sizes)
    pretrain(model, tokenizer, examples(), steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(f"{folder}: {model.num_parameters()} parameters, sha256 {digest}; the shipped one: {shipped}")


def make_tiny() -> None:
    """The mini-wiki and its base: 5 to 7 minutes."""
    save_wiki(ASSETS / "tiny_wiki.jsonl.gz", make_wiki())
    make_base(ASSETS / "tiny_base", web_examples, 950, BASE_SHA256)
