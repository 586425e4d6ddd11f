"""SFTTrainer: the same numbers as TRL 1.16.0 (recorded by sft_cases.py), packed rows, datasets of every format."""

import json
from pathlib import Path

import pytest
import torch
from sft_cases import SFT_CASES, make_model, make_tokenizer, rows, train

from fastppo import SFTConfig, SFTTrainer
from fastppo.packing import best_fit_decreasing, pack

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_1_16_sft_reward.json").read_text())["runs"]
# what TRL averages over micro-batches and we over tokens: equal where there is one micro-batch
AVERAGED = ("eval_entropy", "eval_mean_token_accuracy", "entropy", "mean_token_accuracy")


@pytest.mark.parametrize("case", SFT_CASES)
def test_log_is_trls(case):
    ours, theirs = train("fastppo", "SFT", case), RECORDED[f"SFT/{case}"]
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):
        for name, value in wanted.items():
            if name in AVERAGED and not (case.startswith("packed") and not name.startswith("eval_")):
                continue
            # grad_norm after steps at a learning rate of 1e-2 has lost a few more digits
            tolerance = 5e-4 if name == "grad_norm" else 1e-5
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=1e-6), (name, mine, wanted)


def trainer(tmp_path, dataset, model=None, eval_dataset=None, **options):
    from datasets import Dataset

    args = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    args |= dict(per_device_train_batch_size=4, max_steps=2, logging_steps=1)
    more = {
        name: options.pop(name) for name in ("peft_config", "formatting_func", "compute_metrics") if name in options
    }
    return SFTTrainer(
        model=model or make_model(),
        args=SFTConfig(**(args | options)),
        train_dataset=Dataset.from_list(dataset),
        eval_dataset=None if eval_dataset is None else Dataset.from_list(eval_dataset),
        processing_class=make_tokenizer(),
        **more,
    )


def losses(run):
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def test_loss_by_hand(tmp_path):
    """One row, two labelled tokens: the mean of their negative log-probs."""
    model = make_model()
    run = trainer(tmp_path, [{"prompt": "the cat", "completion": " sat"}], model=model, max_steps=1)
    ids = run.train_dataset[0]["input_ids"]
    assert run.train_dataset[0]["labels"] == [-100, -100, *ids[2:]] and len(ids) == 4  # the cat sat </s>
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = -(logp[1, ids[2]] + logp[2, ids[3]]) / 2
    assert losses(run) == [pytest.approx(float(wanted), rel=1e-5)]


def test_accumulation_equals_one_big_batch(tmp_path):
    """Unequal lengths: a mean of means would differ."""
    big = losses(trainer(tmp_path, rows("text"), per_device_train_batch_size=8))
    small = losses(trainer(tmp_path, rows("text"), per_device_train_batch_size=2, gradient_accumulation_steps=4))
    assert small == pytest.approx(big, rel=1e-5)


def test_lora_and_dora_train_adapters_only(tmp_path):
    from peft import LoraConfig

    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=4, task_type="CAUSAL_LM", use_dora=True, target_modules="all-linear")
    run = trainer(tmp_path, rows("text"), model=model, peft_config=config, learning_rate=1e-2, max_steps=3)
    values = losses(run)
    assert values[-1] != values[0]
    run.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    base = run.model.get_base_model().state_dict()
    assert all(
        torch.equal(base[n.replace(".base_layer", "")] if n in base else base[f"{n[:-7]}.base_layer.weight"], v)
        for n, v in before.items()
    )


@pytest.mark.parametrize("lora", [False, True], ids=["all_weights", "lora"])
def test_resume_gives_the_same_weights(tmp_path, lora):
    from peft import LoraConfig

    def go(folder, **options):
        adapter = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear") if lora else None
        more = dict(
            peft_config=adapter, max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2
        )
        return trainer(folder, rows("text"), per_device_train_batch_size=2, learning_rate=1e-2, **more, **options)

    whole = go(tmp_path / "a")
    whole.train()
    again = go(tmp_path / "a")
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    for (name, first), second in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second), name
    tokens = [[x["num_tokens"] for x in run.state.log_history if "num_tokens" in x] for run in (whole, again)]
    assert tokens[0] == tokens[1]


def test_a_finished_run_takes_no_more_steps(tmp_path):
    """Its last checkpoint is in the middle of an epoch: transformers alone would train on."""
    options = dict(max_steps=3, save_strategy="steps", save_steps=1, lr_scheduler_type="constant", learning_rate=1e-2)
    whole = trainer(tmp_path, rows("text"), per_device_train_batch_size=4, **options)
    whole.train()
    again = trainer(tmp_path, rows("text"), per_device_train_batch_size=4, **options)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_model_by_name_with_init_kwargs(tmp_path):
    from datasets import Dataset

    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options = dict(use_cpu=True, report_to="none", model_init_kwargs={"dtype": "float64"})
    args = SFTConfig(output_dir=str(tmp_path), **options)
    data = Dataset.from_list(rows("text"))
    run = SFTTrainer(str(tmp_path / "model"), args=args, train_dataset=data)
    assert next(run.model.parameters()).dtype == torch.float64
    assert run.processing_class.eos_token == "</s>"
    with pytest.raises(ValueError, match="apply to a model given by name"):
        SFTTrainer(make_model(), args=args, train_dataset=data, processing_class=make_tokenizer())


def test_formatting_func_and_metrics_over_logits(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"rows": len(prediction.predictions)}

    data = [{"words": x["text"]} for x in rows("text")]
    options = dict(eval_dataset=data[:3], formatting_func=lambda row: row["words"] + " and", compute_metrics=metrics)
    run = trainer(tmp_path, data, **options)
    assert run.processing_class.decode(run.train_dataset[0]["input_ids"]).endswith("and </s>")
    assert run.evaluate()["eval_rows"] == 3
    ((logits, labels),) = seen
    assert logits == (*labels, 40)


def test_no_logits_tensor(tmp_path):
    """No tensor of the training step has a vocabulary dimension times a token dimension, except tiles of the kernel."""
    run = trainer(tmp_path, rows("text"), max_steps=1)
    calls = []
    run.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    run.train()
    assert not calls


def test_padded_fallback_gives_the_packed_loss(tmp_path, monkeypatch):
    from fastppo import attention

    packed = losses(trainer(tmp_path, rows("text")))
    monkeypatch.setattr(attention, "unsupported", lambda model: "it is told to")
    assert losses(trainer(tmp_path, rows("text"))) == pytest.approx(packed, rel=1e-5)


def test_full_logits_for_a_head_under_an_adapter(tmp_path):
    from peft import LoraConfig

    plain = losses(trainer(tmp_path, rows("text")))
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["lm_head"])
    run = trainer(tmp_path, rows("text"), peft_config=config)
    assert "adapter" in run._head_reason
    assert losses(run)[0] == pytest.approx(plain[0], rel=1e-5)  # LoRA starts as the identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(packing=True, max_length=None), "packing=True needs max_length"),
        (dict(packing_strategy="ffd"), "packing_strategy must be one of"),
        (dict(truncation_mode="middle"), "truncation_mode must be one of"),
        (dict(max_length=0), "max_length must be a positive number"),
        (dict(max_length=2.5), "max_length must be a positive number of tokens or None; got 2.5"),
        (dict(learning_rate=-1), "SFTConfig: learning_rate must be a number of at least 0; got -1"),
        (dict(max_steps="a"), "SFTConfig: max_steps must be a whole number .*; got 'a'"),
        (dict(packing="no"), "SFTConfig: packing must be True or False; got 'no'"),
        (dict(model=torch.nn.Linear(1, 1)), "SFTTrainer: model must be a transformers model, or .*; got a Linear"),
        (dict(peft_config=3), "SFTTrainer: peft_config must be a peft.PeftConfig; got 3"),
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor is not supported"),
        (dict(eos_token="<nope>"), "'<nope>' is not in the tokenizer's vocabulary"),
        (dict(dataset_text_field="story"), "wanted input_ids, messages, prompt"),
    ],
)
def test_bad_options_say_what_to_do(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, rows("text"), **options)


def test_assistant_loss_needs_marks_in_the_template(tmp_path, monkeypatch):
    import sft_cases

    monkeypatch.setattr(
        sft_cases, "TEMPLATE", sft_cases.TEMPLATE.replace("generation", "if true", 1).replace("endgeneration", "endif")
    )
    with pytest.raises(ValueError, match="assistant_only_loss needs"):
        trainer(tmp_path, rows("messages"), assistant_only_loss=True)


def test_bf16_is_what_the_machine_can_do(tmp_path):
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False
    assert SFTConfig(output_dir=str(tmp_path)).bf16 is (torch.cuda.is_available() and torch.cuda.is_bf16_supported())


def test_best_fit_decreasing():
    assert best_fit_decreasing([3, 7, 5, 5, 2], 10) == [[1, 0], [2, 3], [4]]
    with pytest.raises(ValueError, match="11 tokens does not fit 10"):
        best_fit_decreasing([11], 10)
    lengths = torch.randint(1, 100, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = best_fit_decreasing(lengths, 128)
    assert sorted(i for members in bins for i in members) == list(range(400))
    assert max(sum(lengths[i] for i in members) for members in bins) <= 128
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 128) + 1


def test_pack_drops_padding_on_either_side():
    tokens = torch.tensor([[0, 5, 6], [7, 8, 0], [0, 0, 0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]])
    batch = pack(tokens, mask)
    assert batch.tokens_1N.tolist() == [[5, 6, 7, 8]] and batch.positions_1N.tolist() == [[0, 1, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 2, 4] and batch.max_seqlen == 2
    assert batch.pick(tokens).tolist() == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="shape of tokens_BT"):
        pack(tokens, mask[:2])
