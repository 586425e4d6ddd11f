"""The late PPOTrainer's adapters, trackers, evaluation, saved policies and resumed runs."""

import os

import pytest
import torch
from late_cases import prompts, trainer
from sft_cases import make_model

# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapter_trains_base_is_the_reference(tmp_path, dora):
    from peft import AutoPeftModelForCausalLM, LoraConfig

    make_model().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_dropout=0.1, use_dora=dora, task_type="CAUSAL_LM", target_modules="all-linear")
    run = trainer(tmp_path / "out", policy=policy, value=False, peft_config=config, learning_rate=1e-2)
    assert run.ref_model is None
    run.train()
    first, second = run.state.log_history
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4) and abs(second["objective/kl"]) > 1e-3
    run.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokens = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, run.policy_model.eval()(tokens).logits)
        with run.null_ref_context():
            torch.testing.assert_close(run.policy_model(tokens).logits, make_model().eval()(tokens).logits)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, run.policy_model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_named_adapters_for_policy_and_reference(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    policy = get_peft_model(make_model(), config, adapter_name="policy")
    policy.add_adapter("old", config)
    run = trainer(tmp_path, policy=policy, model_adapter_name="policy", ref_adapter_name="old")
    tokens = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        own = run.policy_model.eval()(tokens).logits
        with run.null_ref_context():
            assert run.policy_model.active_adapter == "old"
            assert not torch.allclose(run.policy_model(tokens).logits, own)
        torch.testing.assert_close(run.policy_model(tokens).logits, own)


# --- trackers, evaluation, saving -------------------------------------------------------------------------------------


def test_callbacks_tensorboard_evaluation_and_tables(tmp_path, capsys):
    from transformers import TrainerCallback

    events = []

    class Note(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                return lambda args, state, control, **_: events.append(name)
            return super().__getattribute__(name)

    options = dict(
        report_to="tensorboard", eval_strategy="steps", eval_steps=1, num_sample_generations=2, stop_token="eos"
    )
    run = trainer(tmp_path, evaluate=prompts(6), callbacks=[Note()], **options)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "runs")
    run.train()
    wanted = ["on_init_end", "on_train_begin", "on_step_begin", "on_log", "on_step_end", "on_evaluate", "on_train_end"]
    assert set(wanted) <= set(events) and events.count("on_step_end") == 2
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert "model response" in capsys.readouterr().out
    evaluated = [line for line in run.state.log_history if "eval_objective/scores" in line]
    assert len(evaluated) == 2 and 1 <= evaluated[0]["eval_response_length"] <= 6
    table = run.generate_completions()
    assert {len(column) for column in table.values()} == {6} and set(table) == {"query", "model response", "score"}
    with pytest.raises(ValueError, match="no eval_dataset"):
        trainer(tmp_path).generate_completions()


def test_save_model_saves_the_policy_alone(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trainer(tmp_path, value=False)
    run.train()
    run.save_model(str(tmp_path / "policy"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    for name, parameter in run.policy_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "</s>"
    run.create_model_card(model_name="mine", tags=["x"])
    card = (tmp_path / "README.md").read_text()
    assert "model_name: mine" in card and "- ppo" in card and "fastppo" in card


@pytest.mark.parametrize("kind", ["two_backbones", "value_head", "lora"])
def test_resume_is_bitwise_the_uninterrupted_run(tmp_path, kind):
    from peft import LoraConfig

    def build(**options):
        if kind == "lora":
            options["peft_config"] = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
        more = dict(save_strategy="steps", save_steps=1, save_total_limit=3, total_episodes=32, num_mini_batches=2)
        return trainer(tmp_path, value=kind != "value_head", **more, **options)

    whole = build()
    whole.train()
    names = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    (tmp_path / ".writing-checkpoint-9").mkdir()  # what a killed run leaves
    again = build()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, first), second in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second), name
    timed = ("eps", "fastppo/peak_memory_bytes", "fastppo/prepare_mfu", "fastppo/optimise_mfu")  # and rates
    logs = [
        [
            {k: v for k, v in x.items() if k not in timed and not k.endswith("tokens_per_s")}
            for x in run.state.log_history
        ]
        for run in (whole, again)
    ]
    assert logs[0] == logs[1]
    again = build()
    again.train(resume_from_checkpoint=True)  # nothing left to do
    assert again.state.global_step == 4
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
