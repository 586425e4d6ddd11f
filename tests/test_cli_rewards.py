"""Rewards for `fastppo train`: functions and classifiers, and what is said about broken ones."""

import numpy
import pytest
import torch

from fastppo.cli.errors import RewardError, UserError
from fastppo.cli.loop import Prompt
from fastppo.cli.rewards import FunctionReward, checked, find_label, load_reward

PROMPTS = [Prompt("one", torch.tensor([1]), {"answer": 5}), Prompt("two", torch.tensor([2]), {"answer": 6})]
RESPONSES = [" a", " bcd"]


def test_a_function_gets_what_its_parameters_are_called():
    def named(responses, prompts, texts, answer, factor=10):
        assert texts == ["one a", "two bcd"] and prompts == ["one", "two"] and factor == 10
        return [a + len(r) for a, r in zip(answer, responses, strict=True)]

    assert FunctionReward(named, "named", ["answer"])(PROMPTS, RESPONSES) == [7.0, 10.0]
    everything = FunctionReward(lambda **given: [len(given), 0], "all", ["answer"])
    assert everything(PROMPTS, RESPONSES) == [5.0, 0.0]


def test_a_parameter_that_is_not_given_is_named():
    with pytest.raises(UserError, match="wants a parameter 'respons', which is not given. Did you mean 'responses'"):
        FunctionReward(lambda respons: [], "r.py:f", ["answer"])
    with pytest.raises(UserError, match="must take at least one of: prompts, responses, completions, texts, answer"):
        FunctionReward(lambda: [], "r.py:f", ["answer"])


@pytest.mark.parametrize("scores", [[1, 2.5], (1, 2.5), numpy.array([1, 2.5]), torch.tensor([1, 2.5])])
def test_any_kind_of_numbers_will_do(scores):
    assert checked("r", scores, RESPONSES) == [1.0, 2.5]
    assert checked("r", [torch.tensor(1.0), numpy.float32(2.5)], RESPONSES) == [1.0, 2.5]
    assert checked("r", [torch.tensor([1.0]), True], RESPONSES) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        (None, "reward r must return a list of 2 numbers; got a NoneType"),
        (3.0, "got a float: 3.0"),
        ([1.0], "must return 2 numbers, one per response; got 1"),
        ([1.0, "good"], "must return numbers; got 'good' .str. for response 1: ' bcd'"),
        ([1.0, None], "got None"),
        ([float("nan"), 1.0], "returned nan for response 0: ' a'"),
        (torch.tensor([1.0, float("inf")]), "returned inf for response 1"),
        ([[1.0, 2.0], [3.0, 4.0]], "must return numbers; got \\[1.0, 2.0\\]"),
    ],
)
def test_what_is_no_score_is_named_with_its_response(scores, wanted):
    with pytest.raises(RewardError, match=wanted):
        checked("r", scores, RESPONSES)


def test_a_function_that_raises_is_named_with_the_line():
    def broken(responses):
        return 1 / 0

    with pytest.raises(
        RewardError, match="reward f raised ZeroDivisionError: division by zero .*test_cli_rewards.py, line"
    ):
        FunctionReward(broken, "f", [])(PROMPTS, RESPONSES)


def test_functions_come_from_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "helper.py").write_text("BONUS = 2\n")
    (tmp_path / "mine.py").write_text(
        "from helper import BONUS\n"
        "def reward(responses): return [BONUS] * len(responses)\n"
        "def other(responses): return [1] * len(responses)\n"
        "TABLE = {}\n"
    )
    monkeypatch.chdir(tmp_path)
    for spec, score in {
        "mine.py": 2.0,
        "mine.py:other": 1.0,
        str(tmp_path / "mine.py:reward"): 2.0,
        "mine:other": 1.0,
    }.items():
        assert load_reward(spec, [])(PROMPTS, RESPONSES) == [score, score], spec


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("broken.py:f", "broken.py could not be imported: SyntaxError"),
        ("mine.py:rewrad", "no function 'rewrad'. Did you mean 'reward'"),
        ("mine.py:TABLE", "'TABLE', but it is not a function"),
        ("no_such_module:f", "module 'no_such_module' .*ModuleNotFoundError"),
        ("./no-such-folder", "neither module:function nor path.py:function"),
    ],
)
def test_a_reward_that_is_not_there_is_named(tmp_path, monkeypatch, spec, wanted):
    (tmp_path / "mine.py").write_text("TABLE = {}\ndef reward(responses): return []\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=wanted):
        load_reward(spec, [])


def test_a_classifier_scores_with_the_logit_of_its_label(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from fastppo.cli.tiny_lm import train_tokenizer

    tokenizer = train_tokenizer(["one a", "two bcd"] * 5, vocab_size=300)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=2,
            id2label={0: "BAD", 1: "GOOD"},
            label2id={"BAD": 0, "GOOD": 1},
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["one a", "two bcd"]
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    for label, index in {None: 1, "good": 1, "BAD": 0, "0": 0}.items():
        scores = load_reward(str(tmp_path), [], label)(PROMPTS, RESPONSES)
        assert scores == pytest.approx([row[index].item() for row in rows], abs=1e-5)
    with pytest.raises(UserError, match="has no label 'goood'. Did you mean 'good'"):
        find_label(model.config, "goood", "here")
