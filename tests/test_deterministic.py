"""PPOConfig.deterministic: bitwise the same run for any micro-batch budget, any batching of the rollout, any process."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import golden_cases
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import fastppo
from fastppo import PPOConfig
from fastppo.generation.scheduler import Scheduler

HERE = Path(__file__).parent

SAMPLE = {"do_sample": True, "top_k": 0.0, "top_p": 1.0, "min_length": -1, "pad_token_id": 0}
CONFIG = {"batch_size": 8, "mini_batch_size": 4, "deterministic": True, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def any_precision():
    """One precision per process, says accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(model: str = "llama", steps: int = 2, case: dict | None = None, **config) -> tuple[str, list, list]:
    """(SHA-256 of the weights, responses, statistics) of a run with prompts and responses of many lengths."""
    made = golden_cases.trainer(fastppo, {"model": model, **(case or {})}, **CONFIG | config)
    responses, stats = [], []
    for step in range(steps):
        queries = [torch.arange(3, 5 + (i * 3 + step) % 7) for i in range(8)]
        drawn = made.generate(
            queries, return_prompt=False, batch_size=1, max_new_tokens=[4 + 2 * i for i in range(8)], **SAMPLE
        )
        stats.append(made.step(queries, drawn, [r.float().mean() / 50 for r in drawn]))
        responses += [r.tolist() for r in drawn]
    digest = hashlib.sha256()
    for parameter in made.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest(), responses, stats


@pytest.mark.parametrize("model", ["llama", "gpt2", "cohere"])  # cohere: not in the decode program
def test_budget_and_batching_of_the_rollout_change_no_bit(model):
    wanted = run(model)
    for config in (
        {"max_tokens_per_micro_batch": 1000},
        {"max_tokens_per_micro_batch": 16, "generation": {"max_num_seqs": 3, "num_blocks": 40}},
        {"generation": {"max_num_batched_tokens": 5, "share_prefixes": True}},
    ):
        assert run(model, **config)[:2] == wanted[:2], config


def test_with_lora_they_change_none_either():
    lora = {"lora": True}
    wanted = run(case=lora)
    config = {"max_tokens_per_micro_batch": 1000, "generation": {"max_num_seqs": 3}}
    assert run(case=lora, **config)[:2] == wanted[:2]


def test_preempted_sequences_change_no_bit(monkeypatch):
    """Pages run out: sequences are put back and computed again."""
    preempted, real = [], Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, seq: (preempted.append(seq), real(self, seq))[1])
    wanted = run(steps=1)
    assert not preempted
    assert run(steps=1, generation={"num_blocks": 12, "block_size": 4})[:2] == wanted[:2] and preempted


@pytest.mark.parametrize(
    ("model", "case", "engine"), [("llama", {}, True), ("gpt2", {}, True), ("llama", {"lora": True}, False)]
)
def test_it_learns_on_the_engine_where_the_engine_knows_the_model(model, case, engine):
    made = golden_cases.trainer(fastppo, {"model": model, **case}, **CONFIG)
    assert (made._path._engines.of(made.model) is not None) == engine


def test_without_it_the_budget_does_change_bits():
    """Else the test above shows nothing."""
    off = {"deterministic": False, "old_logprobs": "recompute"}
    assert len({run(max_tokens_per_micro_batch=budget, **off)[0] for budget in (1, 24, 1000)}) > 1


@pytest.mark.parametrize(
    ("case", "precision"), [({}, "no"), ({"model": "gpt2"}, "bf16"), ({"lora": True}, "no"), ({"masks": True}, "no")]
)
def test_the_ratio_before_the_first_update_is_exactly_one(case, precision):
    options = {"mini_batch_size": 8, "ppo_epochs": 1, "mixed_precision": precision}
    made = golden_cases.trainer(fastppo, case, **CONFIG | options)
    queries, responses, scores, masks = next(golden_cases.batches(case | {"config": CONFIG}, 1))
    stats = made.step(queries, responses, scores, masks)
    assert (stats["ppo/policy/ratio"] == 1.0).all() and len(np.atleast_1d(stats["ppo/policy/ratio"])) > 1
    assert stats["ppo/policy/approxkl"] == 0.0 and stats["ppo/policy/clipfrac"] == 0.0
    sampled = made.generate(queries, return_prompt=False, max_new_tokens=6, **SAMPLE)
    stats = made.step(queries, sampled, scores)
    assert (stats["ppo/policy/ratio"] == 1.0).all(), "sampled here, after an update"


def of_every_trainer(folder: Path) -> list[str]:
    """Digests of a run of each; adapters, heads and dropout draw numbers."""
    import test_late_deterministic as late
    import test_reward
    import test_sft
    from peft import LoraConfig
    from sft_cases import make_model, rows

    options = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 3, "seed": 5}
    found = [run()[0], late.digest(late.build(folder, "two_backbones")), late.digest(late.build(folder, "lora"))]
    for module, data, task in ((test_sft, rows("text"), "CAUSAL_LM"), (test_reward, rows("pairs"), "SEQ_CLS")):
        lora = LoraConfig(r=2, task_type=task, target_modules="all-linear", lora_dropout=0.2)
        for adapter in (None, lora):
            model = make_model("reward" if module is test_reward else "causal")
            made = module.trainer(folder, data, model, peft_config=adapter, **options)
            found.append(late.digest(made))
    return found


def test_two_processes_give_the_same_bits(tmp_path):
    """The classic and the late trainer, SFT and reward training."""
    code = f"import test_deterministic as t, pathlib; print(*t.of_every_trainer(pathlib.Path({str(tmp_path)!r})))"
    digests = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "PYTHONHASHSEED": hash_seed}
        environment |= {"OMP_NUM_THREADS": "1", "PADDING": "x" * 3001 * int(hash_seed)}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        digests.add(tuple(ran.stdout.split()[-7:]))
    assert len(digests) == 1 and len(set(*digests)) == 7


def test_torchs_own_switch_is_put_back():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    run(steps=1)
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


@pytest.mark.parametrize("given", [{"old_logprobs": "rollout"}, {"packed": False}])
def test_what_it_cannot_keep_is_refused(given):
    with pytest.raises(ValueError, match=f"deterministic=True does not go with {next(iter(given))}"):
        PPOConfig(deterministic=True, **given)


def test_models_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="deterministic=True needs packed sequences.*"):
        golden_cases.trainer(fastppo, {"model": "t5"}, deterministic=True)
