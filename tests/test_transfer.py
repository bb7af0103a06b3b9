"""miniature/transfer.py: the last word as plain text, and the command on two ranks."""

import json

import pytest
from reference import ROOT

from miniature import transfer


def test_the_last_word_is_right_if_the_model_writes_it_first(build_sampler, monkeypatch):
    sampler = build_sampler(ROOT / "assets/tiny_base")
    written = {"The Rhine ends in the North": " Sea, and", "Rotterdam lies on the": " Rhine's", "It is": " wide"}

    def answers(sampler, prompts, name):
        texts = [sampler.tokenizer.decode(prompt, skip_special_tokens=True).strip() for prompt in prompts]
        assert texts == list(written)  # up to the last word, without the space before it: tokens begin with theirs
        return [written[text] for text in texts]

    monkeypatch.setattr(transfer, "greedy_answers", answers)
    texts = ["The Rhine ends in the North Sea.", "Rotterdam lies on the Rhineland.", "One", "It is wide!)"]
    assert transfer.last_words(sampler, texts) == [1.0, 0.0, 1.0]  # a text of one word is left out


@pytest.mark.slow
def test_the_command_measures_each_model_on_the_same_words(command, tmp_path):
    record, keys = tmp_path / "transfer.jsonl", "min_passage_tokens=8 max_passage_tokens=40 probe_passages=12"
    data, other = ROOT / "assets/tiny_wiki.jsonl.gz", ROOT / "assets/tiny_questions.jsonl"
    words = [f"one={ROOT / 'assets/tiny_base'}", f"two={ROOT / 'assets/tiny_base'}", f"data={data}", *keys.split()]
    words += [f"other.data={other}", "other.text_field=question", "other.min_passage_tokens=4", "max_passages=600"]
    file = tmp_path / "call.py"
    call = f"import miniature.transfer\nminiature.transfer.main({words!r}, pathlib.Path({str(record)!r}))\n"
    file.write_text(f"import pathlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n{call}")
    ended = command([file], 180, ranks=2)
    assert ended.returncode == 0, ended.stderr[-2000:]
    one, two = map(json.loads, record.read_text().splitlines())
    assert (one.pop("model"), two.pop("model")) == ("one", "two") and one == two
    assert one["last_word"][1] == 12 and one["heldout"][1] > 12 and one["other"][1] > 0  # a mask for each label
    assert all(0 <= share <= 1 for share, _ in one.values())
