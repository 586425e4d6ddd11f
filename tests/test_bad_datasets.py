"""Datasets that the trainers can't use: what they say. Nothing here trains."""

import late_cases
import pytest
from datasets import Dataset, DatasetDict
from sft_cases import make_model, make_tokenizer, rows

from fastppo import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

CHAT = [{"role": "assistant", "content": "sat"}]


def build(kind: str, tmp_path, data, tokenizer=None, model=None, evaluate=None, **options):
    trainer, config = {"SFT": (SFTTrainer, SFTConfig), "Reward": (RewardTrainer, RewardConfig)}[kind]
    args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    data = Dataset.from_list(data) if isinstance(data, list) else data
    model = model or make_model("causal" if kind == "SFT" else "reward")
    return trainer(
        model, args, train_dataset=data, eval_dataset=evaluate, processing_class=tokenizer or make_tokenizer()
    )


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "train_dataset is empty"),
        (Dataset.from_dict({"text": []}), {}, "train_dataset is empty"),
        (DatasetDict(train=Dataset.from_list(rows("text"))), {}, r"must be one dataset; got DatasetDict with \['train'\]"),
        ([{"text": ""}] * 4, {}, "train_dataset: no row of 4 can be used: a row needs two tokens"),
        (rows("text"), {"max_length": 1}, "train_dataset: no row of 22 can be used: a row needs two tokens"),
        ([{"text": None}] * 4, {}, r"got \['text'\] \(text: NoneType\)"),
        ([{"text": 4}] * 4, {}, r"got \['text'\] \(text: int\)"),
        ([{"messages": "the cat"}] * 4, {}, r"got \['messages'\] \(messages: text\)"),
        ([{"messages": []}] * 4, {}, r"\(messages: an empty list\)"),
        ([{"prompt": "a cat", "completion": CHAT}] * 4, {}, r"\(prompt: text, completion: messages\)"),
        ([{"prompt": "a cat"}] * 4, {}, r"got \['prompt'\] \(prompt: text\)"),
        (rows("text"), {"assistant_only_loss": True}, r"assistant_only_loss needs messages; the dataset has the columns \['text'\]"),
    ],
)  # fmt: skip
def test_sft(tmp_path, data, options, message):
    with pytest.raises(ValueError, match=message):
        build("SFT", tmp_path, data, **options)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "train_dataset is empty"),
        (rows("pairs"), {"max_length": 1}, "no row of 22 can be used: pairs of which a side has more than max_length=1"),
        ([{"chosen": "a cat"}] * 4, {}, r"got \['chosen'\] \(chosen: text\)"),
        ([{"chosen": "a cat", "rejected": None}] * 4, {}, r"\(chosen: text, rejected: NoneType\)"),
        ([{"chosen": "a cat", "rejected": CHAT}] * 4, {}, r"\(chosen: text, rejected: messages\)"),
        ([{"prompt": "a", "chosen": CHAT, "rejected": CHAT}] * 4, {}, r"\(prompt: text, chosen: messages, rejected: messages\)"),
    ],
)  # fmt: skip
def test_reward(tmp_path, data, options, message):
    with pytest.raises(ValueError, match=message):
        build("Reward", tmp_path, data, **options)


def test_evaluation_splits_are_named(tmp_path):
    good = Dataset.from_list(rows("text"))
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] is empty"):
        build("SFT", tmp_path, good, evaluate={"a": good, "b": good.select([])})


def test_a_list_is_no_dataset(tmp_path):
    with pytest.raises(TypeError, match=r"Dataset.from_list\(rows\) makes one\); got tuple"):
        build("SFT", tmp_path, tuple(rows("text")))


def test_a_language_model_is_no_reward_model(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM predicts tokens; load the model with AutoModelForSequence"):
        build("Reward", tmp_path, rows("pairs"), model=make_model("causal"))


def test_a_pair_may_have_an_empty_side_and_an_empty_prompt(tmp_path):
    data = [{"prompt": "", "chosen": "a cat", "rejected": ""}, {"prompt": "a", "chosen": "cat", "rejected": "dog"}]
    ids = build("Reward", tmp_path, data).train_dataset
    assert ids["chosen_ids"][0] == make_tokenizer()("a cat</s>")["input_ids"] and len(ids["rejected_ids"][0]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(data=[{"prompt": None}]), r"got \['prompt'\] \(prompt: NoneType\)"),
        (dict(data=[{"prompt": 3}]), r"got \['prompt'\] \(prompt: int\)"),
        (dict(data=[{"prompt": [{"rol": "user"}]}]), "prompt: a list without {'role', 'content'} messages"),
        (dict(data=[{"input_ids": "the cat"}]), "train_dataset: input_ids must be token ids; got text"),
        (dict(total_episodes=0), "total_episodes must be a whole number of at least 1, or None; got 0"),
    ],
)
def test_prompts(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        late_cases.trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (1.0, TypeError, "score: 8 numbers wanted, one per response; got 1.0"),
        ([None] * 8, TypeError, r"score: 8 numbers wanted, one per response; got \[None"),
        (["good"] * 8, ValueError, r"score: 8 numbers wanted, one per response; got \['good'"),
        ([1.0] * 7, ValueError, "score: 8 scores wanted, one per response; got 7"),
    ],
)
def test_rewards_that_are_no_numbers(tmp_path, answer, error, message):
    with pytest.raises(error, match=message):
        late_cases.trainer(tmp_path, reward=lambda completions: answer).train()


def test_tokens_that_are_asked_for_and_not_there(tmp_path, monkeypatch):
    def without(*names):
        tokenizer = make_tokenizer()
        for name in names:
            setattr(tokenizer, name, None)
        return tokenizer

    monkeypatch.setattr(late_cases, "make_tokenizer", lambda: without("eos_token"))
    with pytest.raises(ValueError, match="stop_token='eos', but the tokenizer has no end-of-sequence token"):
        late_cases.trainer(tmp_path, stop_token="eos")
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence token: set tokenizer.pad_token"):
        build("SFT", tmp_path, rows("text"), tokenizer=without("eos_token", "pad_token"))
