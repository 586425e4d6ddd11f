"""The five examples run offline on small inputs; the checker of the word problems knows right from wrong."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Examples import each other by name; a language model that has read for 15 steps is good enough here."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("offline", "gpt2_sentiment", "detoxification", "lora_chat", "preference_pipeline", "word_problems"):
        sys.modules.pop(name, None)
    import offline

    thorough = offline.language_model
    monkeypatch.setattr(offline, "language_model", lambda folder, texts, steps=0: thorough(folder, texts, steps=15))


def loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)("One day", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(folder)(**tokens).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gpt2_sentiment", "detoxification"])
def test_classic_examples(name, tmp_path, capsys):
    example = __import__(name)
    history = example.main(["--offline", "--steps", "2", "--batch-size", "8", "--output-dir", str(tmp_path)])
    assert len(history) == 2 and capsys.readouterr().out.count("KL") == 2
    loads(tmp_path)


def test_lora_chat(tmp_path):
    import lora_chat

    assert len(lora_chat.main(["--offline", "--episodes", "64", "--output-dir", str(tmp_path)])) == 2
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "model.safetensors").exists()


def test_preference_pipeline(tmp_path, monkeypatch):
    import preference_pipeline

    few = preference_pipeline.story_pairs
    monkeypatch.setattr(preference_pipeline, "story_pairs", lambda count, seed=0: few(count // 15, seed))
    results = preference_pipeline.main(["--offline", "--episodes", "64", "--output-dir", str(tmp_path)])
    assert 0 <= results["reward_accuracy_held_out"] <= 1 and results["score_last_5_updates"] is not None
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    for stage in ("sft", "ppo"):
        loads(tmp_path / stage)


def test_word_problems(tmp_path):
    import word_problems

    scores = word_problems.main(["--offline", "--episodes", "128", "--output-dir", str(tmp_path)])
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)
    loads(tmp_path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 7", 7.0),
        ("#### 1,234,567 people", 1234567.0),
        ("first 5, then 6", 6.0),  # unmarked: the last number
        ("#### 2 or 3", 2.0),  # marked: the first after the mark
        ("#### -0.5 dollars", -0.5),
        ("12 apples #### none", None),
        ("nothing at all", None),
        ("a #### 1 b #### 2", 2.0),
    ],
)
def test_checker_reads_numbers(text, number):
    from word_problems import final_number

    assert final_number(text) == number


def test_checker_scores():
    from word_problems import is_right

    answer = "2 * 21 = 42\n#### 42"
    texts = ["so #### 42", "it is 42.0", "#### 41", "no idea", "#### forty-two", "#### 42.0000001"]
    assert is_right([""] * 6, texts, [answer] * 6) == [1.0, 1.0, 0.1, 0.0, 0.1, 1.0]


def test_checker_accepts_every_reference_answer(shared):
    from offline import read_jsonl
    from word_problems import final_number, is_right

    answers = [row["answer"] for row in read_jsonl(shared / "data/gsm8k-test.jsonl")]
    assert is_right([""] * len(answers), answers, answers) == [1.0] * len(answers)
    shifted = [f"#### {final_number(answer) + 1}" for answer in answers]
    assert is_right([""] * len(answers), shifted, answers) == [0.1] * len(answers)
