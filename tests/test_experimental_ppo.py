"""The late PPOTrainer: TRL 1.12.0's surface, and one update against plain PyTorch."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from late_cases import plain_update, trainer, words
from sft_cases import make_model, make_tokenizer

import fastppo
from fastppo.experimental.ppo import PPOConfig, PPOTrainer
from fastppo.experimental.ppo import ppo_trainer as module

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_1_12_ppo_config.json").read_text())
METRICS = ["eps", "lr", "episode", "epoch", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg"]
METRICS += ["policy/clipfrac_avg", "policy/entropy_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var"]
METRICS += ["val/num_eos_tokens", "objective/kl", "objective/entropy", "objective/non_score_reward"]
METRICS += ["objective/rlhf_reward", "objective/scores"]


# --- the surface ------------------------------------------------------------------------------------------------------


def test_config_has_trls_fields_and_defaults():
    ours = {f.name: f.default for f in dataclasses.fields(PPOConfig)}
    assert {name: ours[name] for name in RECORDED} == RECORDED


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(kl_coeff=0.1), TypeError, "no field 'kl_coeff'; did you mean 'kl_coef'"),
        (dict(stop_token="eos", stop_token_id=2), ValueError, "stop_token or stop_token_id, not both"),
        (dict(stop_token="end"), ValueError, "stop_token must be 'eos' or None"),
        (dict(kl_estimator="k4"), ValueError, "kl_estimator must be one of"),
        (dict(gamma=1.1), ValueError, "gamma must be between 0 and 1; got 1.1"),
        (dict(num_ppo_epochs=0), ValueError, "num_ppo_epochs must be a whole number of at least 1; got 0"),
        (dict(num_mini_batches=2.5), ValueError, "num_mini_batches must be a whole number of at least 1; got 2.5"),
        (dict(response_length="a"), ValueError, "response_length must be a whole number of at least 1; got 'a'"),
        (dict(kl_coef=float("nan")), ValueError, "kl_coef must be a number of at least 0; got nan"),
        (dict(cliprange=-1), ValueError, "cliprange must be a number of at least 0; got -1"),
        (dict(learning_rate="1e-5"), ValueError, "learning_rate must be a number of at least 0; got '1e-5'"),
        (dict(per_device_train_batch_size=2.5), ValueError, "per_device_train_batch_size must be a whole number of at"),
        (dict(policy="gpt2"), ValueError, "PPOTrainer: model must be a language model .*; got 'gpt2'"),
        (dict(value=torch.nn.Linear), ValueError, "value_model must be a model .*; got the class Linear itself"),
        (dict(optimizers=torch.optim.Adam), ValueError, "optimizers must be a pair: .*; got the class Adam itself"),
        (dict(peft_config={}), ValueError, "peft_config must be a peft.PeftConfig; got {}"),
        (dict(data=[{"input_ids": [1.5]}]), ValueError, r"input_ids'\] must be token ids; got a torch.float32 tensor"),
        (dict(num_mini_batches=3), ValueError, "multiple of `num_mini_batches`, inexact division: 8 / 3"),
        (dict(whiten_rewards=True, num_mini_batches=2), ValueError, "whiten_rewards needs mini-batches of at least 8"),
        (dict(reward=3), TypeError, "reward_model must be a sequence classifier"),
        (dict(reward="gpt2"), ValueError, "'gpt2' is no http"),
        (dict(reward=[len], reward_weights=[1.0, 2.0]), ValueError, "1 rewards but 2 reward_weights"),
        (dict(data=[]), ValueError, "train_dataset is empty"),
        (dict(data=[{"story": "x"}]), ValueError, "no prompt in the dataset row"),
    ],
)
def test_bad_options_say_what_to_do(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, **options)


@pytest.mark.parametrize(
    "args", [None, {}, fastppo.PPOConfig(batch_size=4, mini_batch_size=2)], ids=lambda args: type(args).__name__
)
def test_only_its_own_configuration_will_do(args):
    with pytest.raises(ValueError, match="PPOTrainer: args must be a PPOConfig of fastppo.experimental.ppo"):
        PPOTrainer(args, make_tokenizer(), make_model(), None, make_model("reward"), [])


def test_same_object_as_reference_is_refused(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="cannot be the same object"):
        trainer(tmp_path, policy=model, ref_model=model)


def test_sizes_follow_from_the_fields(tmp_path):
    args = trainer(tmp_path, num_mini_batches=2, total_episodes=None, num_train_epochs=3).args
    names = [
        "world_size",
        "local_batch_size",
        "batch_size",
        "micro_batch_size",
        "mini_batch_size",
        "local_mini_batch_size",
    ]
    assert [getattr(args, name) for name in names] == [1, 8, 8, 4, 4, 4]
    assert args.total_episodes == 48 and args.num_total_batches == 6


def test_gradient_checkpointing_on_a_cpu_only_when_given(tmp_path):
    if not torch.cuda.is_available():
        assert PPOConfig(output_dir=str(tmp_path)).gradient_checkpointing is False
    assert PPOConfig(output_dir=str(tmp_path), gradient_checkpointing=True).gradient_checkpointing is True


def test_module_functions():
    """Outputs of TRL 1.12.0's functions on the same inputs."""
    responses = torch.tensor([[5, 6, 2, 7, 8], [5, 6, 7, 8, 9], [2, 5, 2, 6, 7]])
    wanted = [[5, 6, 2, 0, 0], [5, 6, 7, 8, 9], [2, 0, 0, 0, 0]]
    assert module.truncate_response(2, 0, responses).tolist() == wanted
    assert module.exact_div(12, 4) == 3 and module.INVALID_LOGPROB == 1.0
    with pytest.raises(ValueError, match=r"why, inexact division: 13 / 4 = 3\.25"):
        module.exact_div(13, 4, "why")
    values, mask = torch.arange(6.0).view(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert float(module.masked_mean(values, mask)) == pytest.approx(4 / 3)
    assert module.masked_mean(values, mask, axis=1).tolist() == [0.5, 3.0]
    assert float(module.masked_var(values, mask)) == pytest.approx(7 / 3)
    torch.testing.assert_close(module.masked_whiten(values, mask)[0, 0], torch.tensor(-0.8729), atol=1e-4, rtol=0)


def test_generation_functions_keep_padding_out():
    from transformers import GenerationConfig

    model = make_model().eval()
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    queries = torch.tensor([[0, 0, 7, 8], [7, 8, 9, 10]])
    tokens, logits = module.batch_generation(model, queries, 1, 0, config)
    alone, _ = module.generate(model, queries[:1, 2:], 0, config)
    assert tokens.shape == (2, 8) and logits.shape == (2, 4, 40)
    assert tokens[0, 4:].tolist() == alone[0, 2:].tolist()
    output = module.forward(model, tokens, 0)
    torch.testing.assert_close(output.logits[:, 3:-1], logits, atol=1e-4, rtol=1e-4)
    value = make_model("reward", 1).eval()
    policy, values = module.PolicyAndValueWrapper(model, value)(
        input_ids=tokens, attention_mask=tokens != 0, return_dict=True, output_hidden_states=True
    )
    assert policy.logits.shape == (2, 8, 40) and values.shape == (2, 8, 1)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False], ids=["two_backbones", "value_head"])
def test_train_logs_trls_metrics(tmp_path, value):
    run = trainer(
        tmp_path, value=value, num_mini_batches=2, num_ppo_epochs=3, stop_token="eos", missing_eos_penalty=1.0
    )
    steps = []
    run.create_optimizer()
    run.optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    result = run.train()
    assert result.global_step == run.state.max_steps == 2 and run.state.episode == 16 and run.state.epoch == 1.0
    assert len(steps) == 2 * 2 * 3  # updates x mini-batches x epochs: accumulation does not swallow any
    first, second = run.state.log_history
    assert set(METRICS) <= set(first)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4) and abs(second["objective/kl"]) > 1e-3
    assert first["lr"] == 1e-3 and second["lr"] == 5e-4 and first["episode"] == 8
    assert first["fastppo/mismatch"] < 1e-5
    assert first["objective/rlhf_reward"] == pytest.approx(
        first["objective/scores"] + first["objective/non_score_reward"]
    )


def test_one_update_is_plain_pytorchs(tmp_path):
    """The gradient of the first optimizer step, through packing, fused head and loss, equals autograd's on plain code."""
    policy, value = make_model(seed=5), make_model("reward", 6)
    run = trainer(
        tmp_path, policy=policy, ref_model=make_model(seed=7), num_ppo_epochs=1, stop_token="eos", total_episodes=8
    )
    run.value_model.load_state_dict(value.state_dict())
    plain_policy, plain_value, plain_reference = make_model(seed=5), value, make_model(seed=7)
    seen, gradients = {}, {}
    judge = run.judge
    run.judge = lambda rollout, columns: seen.setdefault("it", (rollout, judge(rollout, columns)))[1]
    run.create_optimizer()

    def note(*_, **__):
        gradients.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})

    run.optimizer.register_step_pre_hook(note)
    run.args.max_grad_norm = 0.0
    run.train()
    rollout, (scores, _) = seen["it"]
    assert len({len(x) for x in rollout.responses}) > 1
    plain_update((plain_policy, plain_value, plain_reference), rollout, scores, run.args)
    wanted = {f"policy.{n}": p.grad for n, p in plain_policy.named_parameters()}
    wanted |= {f"value_model.{n}": p.grad for n, p in plain_value.named_parameters()}
    assert set(gradients) == {name for name, grad in wanted.items() if grad is not None}
    for name, gradient in gradients.items():
        scale = wanted[name].abs().max()
        assert (gradient - wanted[name]).abs().max() <= 1e-4 * scale + 1e-7, name


@pytest.mark.parametrize("value", [True, False], ids=["two_backbones", "value_head"])
def test_result_does_not_depend_on_micro_batches(tmp_path, value):
    def weights(**sizes):
        run = trainer(tmp_path, value=value, num_ppo_epochs=2, stop_token="eos", **sizes)
        run.train()
        return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    big = weights(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    small = weights(per_device_train_batch_size=1, gradient_accumulation_steps=8, local_rollout_forward_batch_size=3)
    # Adam's first steps are lr * sign(gradient): rounding can flip a gradient of about zero, not most of them
    assert ((big - small).abs() > 1e-5).float().mean() < 0.01


def test_recomputed_log_probs_give_the_same_update(tmp_path):
    logs = []
    for old in ("rollout", "recompute"):
        run = trainer(tmp_path, value=False, old_logprobs=old, stop_token="eos", total_episodes=8)
        run.train()
        logs.append(run.state.log_history[0])
    for name in ("loss/policy_avg", "loss/value_avg", "objective/entropy", "objective/scores"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3, abs=1e-5)


def test_max_grad_norm_clips(tmp_path):
    run = trainer(tmp_path, max_grad_norm=1e-3, num_ppo_epochs=1, total_episodes=8)
    norms = []
    run.create_optimizer()
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
        )
    )
    run.train()
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-3) and run.state.log_history[0]["grad_norm"] > 0.01


def test_learns_to_say_a_word(tmp_path):
    def happy(prompts, completions):
        return [words(text, "happy") for text in completions]

    options = dict(
        per_device_train_batch_size=16, gradient_accumulation_steps=1, total_episodes=16 * 15, temperature=1.0
    )
    run = trainer(tmp_path, value=False, reward=happy, learning_rate=1e-2, kl_coef=0.01, num_mini_batches=2, **options)
    run.train()
    scores = [line["objective/scores"] for line in run.state.log_history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0, scores
