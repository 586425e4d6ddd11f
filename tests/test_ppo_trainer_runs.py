"""The classic trainer on its way: rollout log-probs, accidents (NaN, memory), trackers, saving, adapters."""

import json
import logging
import sys
import types
import warnings
from pathlib import Path

import golden_cases
import numpy as np
import pytest
import torch
from golden_cases import SAMPLE, batch, changed, trainer, weights

import fastppo
from fastppo import PPOTrainer
from fastppo.score import NonFinite


@pytest.fixture
def made():
    return trainer(fastppo, {})


# --- old log-probs from the rollout -----------------------------------------------------------------------------------


def rollout(made, **options):
    queries = [torch.tensor([1, 5 + i, 6]) for i in range(4)]
    responses = made.generate(queries, return_prompt=False, **SAMPLE | options)
    return queries, responses, [torch.tensor(float(i)) for i in range(4)]


def test_rollout_logprobs_save_a_pass_and_agree():
    stats = {}
    for mode in ("rollout", "recompute", "auto"):
        made = trainer(fastppo, {}, old_logprobs=mode)
        torch.manual_seed(0)
        data = rollout(made)
        np.random.seed(0)
        stats[mode] = made.step(*data)
        assert stats[mode]["fastppo/mismatch_mean"] < 1e-4
    for name in ("objective/kl", "objective/entropy", "ppo/loss/policy", "ppo/loss/value", "ppo/returns/mean"):
        values = [stats[mode][name] for mode in stats]
        assert values == pytest.approx([values[0]] * 3, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("own_modules", [False, True])
def test_rollouts_and_steps_share_their_memory(made, monkeypatch, own_modules):
    """On the engine gradients lie where packed weights were; beside the model's own modules nothing waits for a rollout."""
    from fastppo import flops
    from fastppo.kernels import _recycle
    from fastppo.trainer.engines import Engines

    flops.matmul_flops_per_s(made.current_device, torch.float32, torch.get_num_threads())  # once, in that memory
    monkeypatch.setattr(_recycle, "WORTH_IT", 1)  # so few bytes are fresh memory each time otherwise
    _recycle.release()
    if own_modules:
        monkeypatch.setattr(Engines, "of", lambda self, model: None)
    slots = (_recycle.WEIGHTS_OR_GRADIENTS, _recycle.PAGES_OR_ACTIVATIONS)
    made.step(*rollout(made))
    assert [name in _recycle._kept for name in slots] == [not own_modules] * 2
    rollout(made)
    addresses = [_recycle._kept[name].ctypes.data for name in slots]
    made.step(*rollout(made))
    now = [_recycle._kept[name].ctypes.data if name in _recycle._kept else None for name in slots]
    assert now == ([None, None] if own_modules else addresses)


def test_statistics_tell_how_fast_responses_were_sampled(made):
    data = rollout(made, batch_size=2)
    assert made._generated.tokens == sum(map(len, data[1])) and made._generated.seconds > 0
    rate = made._generated.tokens / made._generated.seconds
    assert made.step(*data)["fastppo/generate_tokens_per_s"] == rate
    assert "fastppo/generate_tokens_per_s" not in made.step(*batch())  # responses from elsewhere


def test_rollouts_that_disagree_are_recomputed(caplog):
    wanted = None
    for spoiled in (False, True):
        made = trainer(fastppo, {}, old_logprobs="auto" if spoiled else "recompute")
        torch.manual_seed(0)
        data = rollout(made)
        if spoiled:
            known = made._rollouts._known
            made._rollouts._known = {key: (logprobs - 0.5, values) for key, (logprobs, values) in known.items()}
        np.random.seed(0)
        with caplog.at_level(logging.WARNING):
            stats = made.step(*data)
        if not spoiled:
            wanted = stats
    assert "recomputes old log-probs from here on" in caplog.text
    assert stats["objective/kl"] == pytest.approx(wanted["objective/kl"], rel=1e-4, abs=1e-5)
    assert stats["ppo/policy/approxkl"] == pytest.approx(wanted["ppo/policy/approxkl"], rel=1e-3)


def test_rollouts_are_forgotten_when_weights_change(made):
    data = rollout(made)
    assert made._rollouts.find(*data[:2]) is not None
    made.step(*data)
    assert made._rollouts.find(*data[:2]) is None


# --- accidents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_score_that_is_no_number_changes_nothing(packed, action, bad):
    made = trainer(fastppo, {"config": {"use_score_scaling": True}}, on_nonfinite=action, packed=packed)
    queries, responses, scores, _ = batch()
    made.step(queries, responses, scores)
    before, kl, mean = weights(made), made.kl_ctl.value, made.running.mean
    scores[2] = torch.tensor(float(bad))
    if action == "stop":
        with pytest.raises(NonFinite, match=rf"score is {bad} for sequence \[2\] of the batch \(step 1\)"):
            made.step(queries, responses, scores)
    else:
        with pytest.warns(RuntimeWarning, match=rf"score is {bad} for sequence \[2\]"):
            assert made.step(queries, responses, scores)["fastppo/skipped"] == 1.0
    assert not changed(before, made) and (made.kl_ctl.value, made.running.mean) == (kl, mean)
    scores[2] = torch.tensor(0.5)
    assert np.isfinite(made.step(queries, responses, scores)["ppo/loss/total"])


def declined(made, action: str, message: str) -> None:
    """A step on nothing but bad mini-batches leaves weights, optimizer and moments alone; the next step learns."""
    before, moments = weights(made), vars(made.running).copy()
    if action == "stop":
        with pytest.raises(NonFinite, match=message + r" in mini-batch rows \[.*\] of step 0"):
            made.step(*batch())
        assert vars(made.running) == moments
    else:
        with pytest.warns(RuntimeWarning, match=message):
            made.step(*batch())
    assert not changed(before, made) and not made.optimizer.state_dict()["state"]
    assert all(p.grad is None for p in made.model.parameters()) and made._steps_done == 1


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_gradient_that_is_no_number_never_reaches_the_weights(packed, action, bad):
    made = trainer(fastppo, {"config": {"use_score_scaling": True}}, on_nonfinite=action, packed=packed)
    hook = made.model.v_head.summary.weight.register_hook(lambda grad: torch.full_like(grad, float(bad)))
    declined(made, action, f"gradient norm is {bad}")
    hook.remove()
    before = weights(made)
    assert np.isfinite(made.step(*batch())["ppo/loss/total"]) and changed(before, made)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_nan_loss_never_reaches_the_weights(packed, action):
    """NaN values while learning, as from a kernel that fails; when they were prepared they were numbers."""
    made = trainer(fastppo, {"config": {"use_score_scaling": True}}, on_nonfinite=action, packed=packed)
    hook = made.model.v_head.register_forward_hook(
        lambda module, args, value: value * float("nan") if torch.is_grad_enabled() else None
    )
    declined(made, action, "loss is nan")
    hook.remove()
    before = weights(made)
    assert np.isfinite(made.step(*batch())["ppo/loss/total"]) and changed(before, made)


def test_out_of_memory_halves_the_budget_and_gives_the_same_result(caplog):
    stats = []
    for limit in (None, 20):
        made = trainer(fastppo, {})
        if limit is not None:
            forward = made.model.pretrained_model.model.forward

            def small(*args, _forward=forward, **kwargs):
                if torch.is_grad_enabled() and kwargs["input_ids"].numel() > 20:
                    raise torch.OutOfMemoryError("out of memory")
                return _forward(*args, **kwargs)

            made.model.pretrained_model.model.forward = small
        np.random.seed(0)
        with caplog.at_level(logging.WARNING):
            stats.append(made.step(*batch()))
    assert caplog.text.count("max_tokens_per_micro_batch is") == 1
    for name in ("ppo/loss/total", "ppo/policy/approxkl", "ppo/val/error"):
        assert stats[0][name] == pytest.approx(stats[1][name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("engine", [True, False])
def test_a_parameter_without_gradient_does_not_decay(engine):
    made = trainer(fastppo, {"lora": not engine})
    unused = torch.nn.Parameter(torch.ones(3))
    made.model.register_parameter("unused", unused)
    made.model_params.append(unused)
    made.optimizer = torch.optim.AdamW(made.model_params, lr=0.1, weight_decay=0.5)
    made.step(*rollout(made))
    assert unused.tolist() == [1.0, 1.0, 1.0]


# --- trackers and saving ----------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_statistics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case = {"config": {"log_with": "tensorboard", "project_kwargs": {"logging_dir": str(tmp_path)}}}
    made = trainer(fastppo, case)
    queries, responses, scores, _ = batch()
    for _ in range(2):
        stats = made.step(queries, responses, scores)
        made.log_stats(stats, {"query": ["q"] * 4, "response": ["r"] * 4}, scores)
    made.accelerator.end_training()
    assert made.current_step == 2
    folder = next(p.parent for p in tmp_path.rglob("events.out*") if p.parent.name == "trl")
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("objective/kl")] == [1, 2]
    assert events.Scalars("env/reward_mean")[0].value == pytest.approx(float(torch.stack(scores).mean()), rel=1e-5)


def test_wandb_gets_a_table(monkeypatch, made):
    logged = []
    wandb = types.ModuleType("wandb")
    wandb.Table = lambda columns, rows: ("table", columns, rows)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(made.accelerator, "log", lambda values, step=None: logged.append((values, step)))
    made.config.log_with = "wandb"
    queries, responses, scores, _ = batch()
    stats = made.step(queries, responses, scores)
    made.log_stats(stats, {"query": list("abcd"), "response": list("efgh")}, scores)
    values, step = logged[0]
    kind, columns, rows = values["game_log"]
    assert (kind, columns, step) == ("table", ["query", "response", "reward"], None)
    assert rows[1] == ["b", "f", pytest.approx(float(scores[1]))]
    assert values["env/reward_dist"].shape == (4,) and "objective/kl" in values
    with pytest.raises(ValueError, match=r"Columns to log \['response'\] are not present"):
        made.log_stats(stats, {"query": list("abcd")}, scores)


def test_save_pretrained_is_loadable(made, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made.step(*batch())
    made.save_pretrained(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    again = fastppo.AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "policy"))
    assert torch.equal(loaded.lm_head.weight, made.model.pretrained_model.lm_head.weight)
    assert torch.equal(again.v_head.summary.weight, made.model.v_head.summary.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "</s>"
    assert "AutoModelForCausalLMWithValueHead" in (tmp_path / "policy/README.md").read_text()


def test_a_later_process_leaves_the_saved_policy_alone(made, tmp_path, monkeypatch):
    """huggingface_hub's mixin removes config.json first: a second process took away what the first had written."""
    made.save_pretrained(tmp_path / "policy")
    before = {path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()}
    monkeypatch.setattr(type(made.accelerator), "is_main_process", False)
    assert made.save_pretrained(tmp_path / "policy") is None and made.push_to_hub("me/it") is None
    assert {path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()} == before
    assert "config.json" in before


def test_push_to_hub_if_best(monkeypatch):
    pushed = []
    monkeypatch.setattr(PPOTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    case = {"config": {"push_to_hub_if_best_kwargs": {"repo_id": "me/it"}, "compare_steps": 2}}
    made = trainer(fastppo, case)
    queries, responses, scores, _ = batch()
    for value in (1.0, 5.0, 0.5, 0.0, 2.0):  # compared at the first, third and fifth step
        made.step(queries, responses, [torch.tensor(value)] * 4)
    assert pushed == [{"repo_id": "me/it"}] * 2 and made.highest_reward == 2.0 and made.compare_step == 5


def test_show_tokens_prints(made, capsys):
    made._show_tokens(torch.tensor([5, 6]), torch.tensor([1, 0]))
    assert "w5" in capsys.readouterr().out


def test_peft_reference_is_the_model_without_adapters():
    made = trainer(fastppo, {"lora": True})
    assert made.ref_model is None and made.is_peft_model and made.config.is_peft_model
    names = [n for n, p in made.model.named_parameters() if p.requires_grad]
    assert all("lora" in n or "v_head" in n for n in names)
    base = {n: p.detach().clone() for n, p in made.model.named_parameters() if not p.requires_grad}
    stats = made.step(*batch())
    assert stats["objective/kl"] != 0
    assert all(torch.equal(p, base[n]) for n, p in made.model.named_parameters() if n in base)


def test_reference_shares_layers_when_asked():
    good = trainer(fastppo, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PPOTrainer(good.config, good.model, None, good.tokenizer, num_shared_layers=1)
    pairs = zip(made.model.parameters(), made.ref_model.parameters(), strict=True)
    assert any(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert np.isfinite(made.step(*batch())["ppo/loss/total"])


def test_statistics_have_trls_keys_and_types(made):
    record = json.loads((Path(golden_cases.__file__).parent / "golden/ppo.json").read_text())["cases"]["plain"][0]
    stats = made.step(*batch())
    ours = {k: v for k, v in stats.items() if not k.startswith(("time/", "fastppo/"))}
    assert set(ours) == set(record["stats"])
    for name, value in ours.items():
        wanted = record["stats"][name]
        assert isinstance(value, np.ndarray if isinstance(wanted, list) else float), name
        assert np.shape(value) == np.shape(wanted), name
    timings = ("forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats", "total")
    assert all(isinstance(stats[f"time/ppo/{name}"], float) for name in timings)


def test_memory_does_not_grow(made):
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("no /proc here to read the resident set from")
    resident = lambda: int(status.read_text().split()[1]) * 4096  # noqa: E731
    data = batch()
    for _ in range(20):
        made.step(*data)
    before = resident()
    for _ in range(60):
        made.step(*data)
    assert resident() - before < 4 * 2**20
