"""deterministic=True of the late trainer: bitwise the same run for any micro-batches, chunks of scoring and batching of the rollout."""

import hashlib

import pytest
import torch
from late_cases import prompts, trainer
from test_late_engine import gpt2

from fastppo import determinism
from fastppo.experimental.ppo import PPOConfig, engines
from fastppo.experimental.ppo.learner import Learner
from fastppo.generation.scheduler import Scheduler

# 12 sequences of an update, by (sequences of a micro-batch, micro-batches); a third is no power of two
SIZES = [(12, 1), (4, 3), (1, 12)]
CONFIG = {"deterministic": True, "total_episodes": 24, "num_ppo_epochs": 2, "stop_token": "eos", "learning_rate": 1e-2}


def cohere():
    """Not a model of the engine, nor of the decode program."""
    from transformers import CohereConfig, CohereForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**sizes, max_position_embeddings=64, pad_token_id=0, bos_token_id=1))


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


MODELS = {
    "value_head": lambda: {"value": False},
    "two_backbones": lambda: {"value": True},
    "gpt2": lambda: {"value": gpt2("reward"), "policy": gpt2("causal")},
    "cohere": lambda: {"value": False, "policy": cohere()},
    "lora": lambda: {"value": False, "peft_config": lora()},
}


def build(folder, model: str, size=SIZES[0], sizes=None, **options):
    """sizes: of the Generator."""
    rows, micros = size
    made = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micros}
    run = trainer(folder, data=prompts(24), **MODELS[model](), **CONFIG | made | options)
    for name, x in (sizes or {}).items():
        assert hasattr(run.generator, name)
        setattr(run.generator, name, x)
    return run


def digest(run) -> str:
    """SHA-256 of weights and logs after training, clocks aside."""
    run.train()
    found = hashlib.sha256()
    for parameter in run.model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    timed = ("eps", "fastppo/peak_memory_bytes", "fastppo/matmul_flops_per_s")
    rates = ("_mfu", "tokens_per_s", "per_second", "runtime")
    for line in run.state.log_history:
        kept = {k: v for k, v in line.items() if k not in timed and not k.endswith(rates)}
        found.update(repr(kept).encode())
    return found.hexdigest()


OTHERS = [
    (SIZES[1], {"max_num_seqs": 5}, {"local_rollout_forward_batch_size": 5}),
    (SIZES[2], {"max_num_batched_tokens": 5, "num_blocks": 12, "block_size": 4}, {}),  # pages run out
]
VARIANTS = {
    "value_head": {"missing_eos_penalty": 1.0, "num_mini_batches": 3},
    "two_backbones": {"whiten_rewards": True, "old_logprobs": "recompute"},
    "gpt2": {"num_mini_batches": 2, "kl_estimator": "k3"},
    "cohere": {},
    "lora": {"num_mini_batches": 2, "whiten_rewards": False},
}


@pytest.mark.parametrize("model", MODELS)
def test_no_batching_changes_a_bit(tmp_path, monkeypatch, model):
    preempted, real = [], Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, seq: (preempted.append(seq), real(self, seq))[1])
    first = build(tmp_path, model, **VARIANTS[model])
    wanted = digest(first)
    assert isinstance(first.fused, engines.Fused) == (model not in ("cohere", "lora"))
    assert not preempted
    for size, sizes, options in OTHERS:
        assert digest(build(tmp_path, model, size, sizes, **VARIANTS[model] | options)) == wanted, size
    assert bool(preempted) == (model != "cohere")  # decoded one by one


def test_nor_on_the_models_own_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "fused_for", lambda trainer: "not now")
    wanted = digest(build(tmp_path, "two_backbones"))
    for size, sizes, options in OTHERS:
        assert digest(build(tmp_path, "two_backbones", size, sizes, **options)) == wanted, size


def test_without_it_batching_does_change_bits(tmp_path):
    """Else the tests above show nothing."""
    off = {"deterministic": False, "total_episodes": 12}
    assert len({digest(build(tmp_path, "value_head", size, **off)) for size in SIZES}) > 1


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("value_head", {"num_mini_batches": 3}),
        ("two_backbones", {"temperature": 0.7}),
        ("gpt2", {"bf16": True}),
        ("cohere", {}),
        ("lora", {}),
    ],
)
def test_the_ratio_before_the_first_update_is_exactly_one(tmp_path, monkeypatch, model, options):
    """In both updates, at each token of the first mini-batch."""
    found, stats = [], Learner._stats
    monkeypatch.setattr(
        Learner, "_stats", lambda self, *given: (found.append((self, given[1])), stats(self, *given))[1]
    )
    run = build(tmp_path, model, **options)
    run.train()
    firsts = {id(learner): result for learner, result in reversed(found)}
    assert len(firsts) == 2 and all(len(r.log_ratio_R) and not r.log_ratio_R.any() for r in firsts.values())
    assert [line["fastppo/mismatch"] for line in run.state.log_history] == [0.0, 0.0]
    assert any(result.log_ratio_R.any() for _, result in found), "it learns"
    if model != "lora":
        assert run.state.log_history[0]["objective/kl"] == 0.0, "the reference's, too"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"old_logprobs": "rollout"}, "does not go with old_logprobs='rollout'"),
        ({"deterministic": "yes"}, "deterministic must be True or False; got 'yes'"),
    ],
)
def test_what_it_cannot_keep_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), use_cpu=True, **{"deterministic": True} | given)


def test_models_and_searches_that_cannot_be_packed_are_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    policy = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="deterministic=True needs packed sequences"):
        trainer(tmp_path, policy=policy, deterministic=True)
    with pytest.raises(ValueError, match="deterministic=True is for one process, DDP and FSDP2"):
        determinism.check("zero2", None)
    run = build(tmp_path, "value_head", generation_kwargs={"num_beams": 2})
    with pytest.raises(ValueError, match="deterministic=True can't be kept with model.generate"):
        run.train()


def test_a_reward_model_that_is_padded_scores_each_sequence_by_itself(tmp_path):
    """Its shape follows from its own length, not from the longest of the batch."""
    run = build(tmp_path, "value_head")
    (source,) = run._rewards.sources
    source._packed.why_padded, source._engine._probed = "so that it is padded", "so that it runs its own modules"
    widths, hidden = [], source._packed.hidden
    source._packed.hidden = lambda tokens, batch: (widths.append(tuple(tokens.shape)), hidden(tokens, batch))[1]
    rollout = run.rollout([torch.tensor(p["input_ids"]) for p in prompts(4)], 1)
    together = run.judge(rollout, {})[0]
    wanted = [(1, len(q) + len(r)) for q, r in zip(rollout.prompts, rollout.responses, strict=True)]
    assert widths == wanted and len(together.unique()) == 4


def test_it_is_written_to_the_arguments(tmp_path):
    made = PPOConfig(str(tmp_path), use_cpu=True, deterministic=True)
    assert made.old_logprobs == "recompute"
    again = PPOConfig(
        **{name: value for name, value in made.to_dict().items() if name in ("deterministic", "old_logprobs")}
    )
    assert again.deterministic
