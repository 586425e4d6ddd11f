"""4- and 8-bit base models: with bitsandbytes where it is installed, with a stand-in for its layers where it is not."""

import importlib.util
import logging
import types

import late_cases
import pytest
import sft_cases
import tiny_models
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from fastppo import quantized as room
from fastppo import reward as reward_module
from fastppo import sft as sft_module

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (pip install bitsandbytes)"
)
WIDE = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "gpt2": {"n_embd": 64}}  # blocks of 64 weights
KINDS = {
    "8bit": {"load_in_8bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
QUERIES = [torch.tensor(x) for x in ([5, 6, 7], [8, 9], [10, 11, 12, 13], [5])]
RESPONSES = [torch.tensor([20 + i, 30 + i, 41, 42, 2]) for i in range(4)]


def config(kind: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**KINDS[kind])


def dequantized(folder, kind: str, auto=AutoModelForCausalLM) -> nn.Module:
    """What the quantised weights stand for, as an ordinary float32 model."""
    model = auto.from_pretrained(folder, quantization_config=config(kind), device_map={"": "cpu"}).dequantize().float()
    assert not any("bitsandbytes" in type(m).__module__ for m in model.modules())
    return model


def lora(task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(task_type=task, r=4, target_modules="all-linear")


def fill_adapter(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dict(sorted(model.named_parameters())).values():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# --- the classic trainer ----------------------------------------------------------------------------------------------


def classic(base, **options) -> PPOTrainer:
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora(), **options)
    fill_adapter(policy)
    sgd = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    settings = PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, seed=0)
    return PPOTrainer(settings, policy, None, tiny_models.tokenizer(), optimizer=sgd)


def rollout_and_update(trainer: PPOTrainer):
    """(greedy responses, what each weight moved by, the mean KL against the base)"""
    said = trainer.generate(QUERIES, return_prompt=False, max_new_tokens=6, do_sample=False, pad_token_id=0)
    before = trained(trainer.model)
    stats = trainer.step(QUERIES, RESPONSES, [torch.tensor(x) for x in (1.0, 0.0, 0.5, -1.0)])
    moved = {name: weight - before[name] for name, weight in trained(trainer.model).items()}
    return [x.tolist() for x in said], moved, stats["objective/kl"]


def assert_close(moved, wanted, slack: float) -> None:
    for name in wanted:
        assert wanted[name].norm() > 0, name
        error = (moved[name] - wanted[name]).norm() / wanted[name].norm()
        assert error < slack, (name, error)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", WIDE)
def test_classic_update_is_that_of_the_weights_it_stands_for(tmp_path, family, kind):
    """8-bit layers also round their inputs to 8 bits: a gradient within some percent."""
    tiny_models.causal(family, **WIDE[family]).save_pretrained(tmp_path)
    said, moved, kl = rollout_and_update(classic(tmp_path, quantization_config=config(kind)))
    wanted_said, wanted, wanted_kl = rollout_and_update(classic(dequantized(tmp_path, kind)))
    assert_close(moved, wanted, 0.15 if kind == "8bit" else 1e-4)
    assert kl == pytest.approx(wanted_kl, rel=1 if kind == "8bit" else 1e-3) and abs(kl) > 1e-3
    if kind != "8bit":
        assert said == wanted_said


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_an_eval_pass_before_training_does_not_take_the_gradients(tmp_path, kind):
    """On some CPUs bitsandbytes then repacks 4-bit weights for a product without a backward pass, and rounds their scales."""
    tiny_models.causal("llama", **WIDE["llama"]).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(kind), device_map={"": "cpu"})
    with torch.no_grad():
        loaded.eval()(QUERIES[0][None])
    _, moved, _ = rollout_and_update(classic(loaded))
    _, wanted, _ = rollout_and_update(classic(dequantized(tmp_path, kind)))
    assert_close(moved, wanted, 0.1)


@needs_bitsandbytes
def test_a_quantised_head_takes_the_full_logits(tmp_path, caplog):
    tiny_models.causal("llama", **WIDE["llama"]).save_pretrained(tmp_path)
    whole = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
    with caplog.at_level(logging.WARNING):
        trainer = classic(tmp_path, quantization_config=whole)
    assert trainer.model.pretrained_model.get_output_embeddings().weight.dtype == torch.uint8
    assert "Linear4bit, not a plain nn.Linear" in caplog.text
    _, moved, kl = rollout_and_update(trainer)
    assert all(x.norm() > 0 for x in moved.values()) and abs(kl) > 1e-3


@needs_bitsandbytes
def test_adapter_and_value_head_of_a_4bit_policy_come_back(tmp_path):
    tiny_models.causal("llama", **WIDE["llama"]).save_pretrained(tmp_path / "base")
    trainer = classic(tmp_path / "base", load_in_4bit=True)
    rollout_and_update(trainer)
    trainer.save_pretrained(str(tmp_path / "policy"))
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy", load_in_4bit=True, is_trainable=True)
    assert again.is_loaded_in_4bit and trained(again).keys() == trained(trainer.model).keys()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted, got = (model.eval()(tokens) for model in (trainer.model, again))
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-3, atol=1e-3)


# --- the late trainers ------------------------------------------------------------------------------------------------


def wide_model(folder, kind: str) -> str:
    """A folder with a model (and tokenizer) whose layers are wide enough."""
    base = "llama" if kind == "causal" else "reward"
    small = sft_cases.make_model("causal").config
    small.update({"hidden_size": 64, "intermediate_size": 128})
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    torch.manual_seed(5)
    model = auto.from_config(small)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder / base)
    sft_cases.make_tokenizer().save_pretrained(folder / base)
    return str(folder / base)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_sft_and_reward_losses_are_those_of_the_weights_they_stand_for(tmp_path, stage, kind):
    from datasets import Dataset

    module, name, rows = (sft_module, "SFT", "text") if stage == "sft" else (reward_module, "Reward", "pairs")
    folder = wide_model(tmp_path, "causal" if stage == "sft" else "reward")
    auto = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    logs = []
    for model in (folder, dequantized(folder, kind, auto)):
        options = {"quantization_config": config(kind)} if model is folder else {}
        args = getattr(module, f"{name}Config")(
            output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", save_strategy="no", max_steps=4, seed=3,
            per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, eval_strategy="steps", eval_steps=2,
            disable_tqdm=True, bf16=False,
        )  # fmt: skip
        data = sft_cases.rows(rows)
        torch.manual_seed(0)
        trainer = getattr(module, f"{name}Trainer")(
            model, args, train_dataset=Dataset.from_list(data[:16]), eval_dataset=Dataset.from_list(data[16:]),
            processing_class=sft_cases.make_tokenizer(), peft_config=lora("CAUSAL_LM" if stage == "sft" else "SEQ_CLS"), **options,
        )  # fmt: skip
        fill_adapter(trainer.model)
        trainer.train()
        logs.append([line.get("loss", line.get("eval_loss")) for line in trainer.state.log_history[:-1]])
    assert len(logs[0]) == 6 and len(set(logs[0])) > 4
    assert logs[0] == pytest.approx(logs[1], rel=0.1 if kind == "8bit" else 1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("value_head", [True, False])
def test_late_ppo_on_4bit_models(tmp_path, value_head):
    """Policy, value and reward model in 4 bits, against the same models dequantised."""
    policy, scorer = wide_model(tmp_path, "causal"), wide_model(tmp_path, "reward")
    ends = []
    for whole in (False, True):

        def load(folder, auto, whole=whole):
            if whole:
                return dequantized(folder, "nf4", auto)
            return auto.from_pretrained(folder, quantization_config=config("nf4"), device_map={"": "cpu"})

        torch.manual_seed(0)
        run = late_cases.trainer(
            tmp_path / "run",
            policy=load(policy, AutoModelForCausalLM),
            reward=load(scorer, AutoModelForSequenceClassification),
            value=not value_head,
            peft_config=lora(),
            bf16=False,
            logging_steps=1,
        )
        fill_adapter(run.policy_model)
        run.train()
        ends.append((trained(run.policy_model), [x.get("objective/scores") for x in run.state.log_history]))
    (got, scores), (wanted, wanted_scores) = ends
    assert scores == pytest.approx(wanted_scores, rel=1e-3)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-2, atol=2e-4)


# --- without bitsandbytes ---------------------------------------------------------------------------------------------


class FakeLayer(nn.Linear):
    """As bitsandbytes' Linear4bit: repacked at an eval pass where that is supported, unpacked by state_dict()."""

    support_avx512bf16_for_cpu = True

    def __init__(self):
        super().__init__(4, 4)
        scales = torch.arange(6.0).view(2, 3).bfloat16()  # of 3 rows in 2 blocks each
        self.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True, absmax=scales)

    def state_dict(self, *args, **kwargs):
        self.weight.quant_state.packing_format_for_cpu = False
        return super().state_dict(*args, **kwargs)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeLayer, "__module__", "bitsandbytes.nn.modules")
    return nn.Sequential(FakeLayer(), nn.Linear(4, 4))


def test_layers_are_kept_in_the_form_that_has_a_backward_pass(fake):
    plain = nn.Linear(4, 4)
    assert room.keep_differentiable(fake, None) is fake and room.keep_differentiable(None, fake) is None
    assert room.keep_differentiable(plain) is plain and not hasattr(plain, "support_avx512bf16_for_cpu")
    assert fake[0].support_avx512bf16_for_cpu is False
    assert fake[0].weight.quant_state.packing_format_for_cpu is False
    assert fake[0].weight.quant_state.absmax.tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


def test_casts_are_said_once(fake, caplog, monkeypatch):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    monkeypatch.setattr(logger, "filters", [])
    room.keep_differentiable(fake)
    room.keep_differentiable(fake)
    for _ in range(3):
        logger.warning("inputs will be cast from %s to float16", "torch.float32")
    logger.warning("inputs will be cast from %s to float16", "torch.bfloat16")
    assert [record.message.split()[5] for record in caplog.records] == ["torch.float32", "torch.bfloat16"]
    assert len(logger.filters) == 1


def test_checkpointing_of_a_quantised_base_needs_no_gradient_of_the_inputs(monkeypatch):
    asked = []
    monkeypatch.setattr("peft.prepare_model_for_kbit_training", lambda model, **options: asked.append(options) or model)
    model = nn.Linear(4, 4)
    assert room.prepare_for_adapter(model) is model and not asked
    model.is_loaded_in_8bit = True
    room.prepare_for_adapter(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None)
    room.prepare_for_adapter(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert [options["gradient_checkpointing_kwargs"]["use_reentrant"] for options in asked] == [False, True]
