"""RewardTrainer: the same numbers as TRL 1.16.0 (recorded by sft_cases.py), and a reward model that learns."""

import json
from pathlib import Path

import pytest
import torch
from sft_cases import REWARD_CASES, make_model, make_tokenizer, rows, train

from fastppo import RewardConfig, RewardTrainer
from fastppo.reward import last_tokens

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_1_16_sft_reward.json").read_text())["runs"]
# means of batches there, of pairs here; equal where all batches have the same number of pairs
AVERAGED = ("eval_accuracy", "eval_margin", "eval_min_reward", "eval_max_reward", "eval_mean_reward")


@pytest.mark.parametrize("case", REWARD_CASES)
def test_log_is_trls(case):
    ours, theirs = train("fastppo", "Reward", case), RECORDED[f"Reward/{case}"]
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):
        for name, value in wanted.items():
            if name not in AVERAGED:
                tolerance = 1e-4 if name == "grad_norm" else 1e-5
                assert mine[name] == pytest.approx(value, rel=tolerance, abs=1e-5), (name, mine, wanted)


def trainer(tmp_path, dataset, model=None, peft_config=None, compute_metrics=None, **options):
    from datasets import Dataset

    args = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    args |= dict(per_device_train_batch_size=4, logging_steps=1, max_steps=2)
    data = Dataset.from_list(dataset)
    return RewardTrainer(
        model=model or make_model("reward"),
        args=RewardConfig(**(args | options)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        compute_metrics=compute_metrics,
    )


def test_rewards_are_the_models_own(tmp_path):
    """Packed scores equal model(...).logits, and the loss follows from them by hand."""
    model = make_model("reward")
    run = trainer(tmp_path, rows("pairs")[:4], model=model, max_steps=1)
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    with torch.no_grad(), run._packed.attention():
        packed = run.rewards(model, batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)
    chosen, rejected = plain[:4].double(), plain[4:].double()
    wanted = (1 + (rejected - chosen).exp()).log().mean()
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_learns_which_word_is_preferred(tmp_path):
    data = [{"chosen": f"{x['text']} good", "rejected": f"{x['text']} bad"} for x in rows("text")]
    run = trainer(tmp_path, data, max_steps=20, learning_rate=1e-2)
    before = run.evaluate()["eval_loss"]
    run.train()
    run.evaluate()
    after = run.state.log_history[-1]
    assert after["eval_loss"] < 0.1 * before and after["eval_accuracy"] == 1.0


def test_encoder_classifier_runs_padded(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config.num_labels = 1
    run = trainer(tmp_path, rows("pairs"), model=BertForSequenceClassification(config), gradient_checkpointing=False)
    run.train()
    assert "loss" in run.state.log_history[0]


def test_lora_saves_and_loads_with_its_score_layer(tmp_path):
    from peft import AutoPeftModelForSequenceClassification, LoraConfig

    make_model("reward").save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    run = trainer(tmp_path / "out", rows("pairs"), model=model, peft_config=config, learning_rate=1e-2)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1).eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, run.model.eval()(tokens).logits)


def test_compute_metrics_sees_both_rewards(tmp_path):
    def metrics(prediction):
        assert prediction.predictions.shape == (22, 2)
        return {"right": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    run = trainer(tmp_path, rows("pairs"), compute_metrics=metrics)
    assert run.evaluate()["eval_right"] == run.state.log_history[-1]["eval_accuracy"]


def test_dropout_is_off_unless_asked(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    config.num_labels = 1
    for off in (True, False):
        model = GPT2ForSequenceClassification(config)
        trainer(tmp_path, rows("pairs"), model=model, disable_dropout=off)
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == ({0.0} if off else {0.1})


def test_last_token_is_the_last_that_is_no_padding():
    tokens = torch.tensor([[5, 6, 2, 0], [5, 6, 7, 2], [2, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert last_tokens(tokens, mask, pad_token_id=0).tolist() == [2, 3, 1]
    # padding is the end-of-sequence token: one earlier, as transformers does; a row of nothing else keeps its last
    assert last_tokens(tokens, mask, pad_token_id=2).tolist() == [1, 2, 1]


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="one label, the reward; got num_labels=2"):
        model = make_model("reward")
        model.config.num_labels = 2
        trainer(tmp_path, rows("pairs"), model=model)
    with pytest.raises(ValueError, match="wanted chosen and rejected"):
        trainer(tmp_path, rows("text"))
