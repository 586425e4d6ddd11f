"""The late PPOTrainer: TRL 1.12.0's surface, one update against plain PyTorch, rewards, datasets, adapters, resume."""

import dataclasses
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from sft_cases import make_model, make_tokenizer, sentences

from fastppo.experimental.ppo import PPOConfig, PPOTrainer
from fastppo.experimental.ppo import ppo_trainer as module
from fastppo.experimental.ppo.prompts import PromptStream
from fastppo.score import NonFinite

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_1_12_ppo_config.json").read_text())
METRICS = ["eps", "lr", "episode", "epoch", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg"]
METRICS += ["policy/clipfrac_avg", "policy/entropy_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var"]
METRICS += ["val/num_eos_tokens", "objective/kl", "objective/entropy", "objective/non_score_reward"]
METRICS += ["objective/rlhf_reward", "objective/scores"]


def prompts(count: int = 16) -> list[dict]:
    tokenizer = make_tokenizer()
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in sentences(count, 1)]


def trainer(tmp_path, *, value=True, reward=None, ref_model=None, data=None, evaluate=None, policy=None, **options):
    from datasets import Dataset

    args = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    args |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, response_length=6, total_episodes=16)
    args |= dict(learning_rate=1e-3, num_sample_generations=0, temperature=0.9)
    more = {
        name: options.pop(name)
        for name in ("peft_config", "callbacks", "optimizers", "data_collator")
        if name in options
    }
    return PPOTrainer(
        args=PPOConfig(**(args | options)),
        processing_class=make_tokenizer(),
        model=policy or make_model(),
        ref_model=ref_model,
        reward_model=make_model("reward", 2) if reward is None else reward,
        value_model=make_model("reward", 1) if value else None,
        train_dataset=Dataset.from_list(prompts() if data is None else data),
        eval_dataset=None if evaluate is None else Dataset.from_list(evaluate),
        **more,
    )


def words(text: str, word: str) -> float:
    return float(text.split().count(word))


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
        (dict(num_ppo_epochs=0), ValueError, "num_ppo_epochs must be at least 1"),
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


def plain_update(policy, value, reference, tokens, starts, scores, args):
    """One PPO step of one mini-batch in plain float64 PyTorch, sequence by sequence: gradients by autograd."""
    policy, value, reference = (m.double() for m in (policy, value, reference))
    rows = []
    for ids, start in zip(tokens, starts, strict=True):
        at, targets = slice(start - 1, len(ids) - 1), ids[start:]
        pick = lambda model: (  # noqa: E731
            (model(ids[None]).logits[0, at] / args.temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]  # noqa: B023
        )
        states = value.model(ids[None]).last_hidden_state[0, at]
        with torch.no_grad():
            ref = pick(reference)
        rows.append((pick(policy), ref, value.score(states)[:, 0]))
    advantages, returns = [], []
    for (new, ref, values), score in zip(rows, scores, strict=True):
        rewards = -args.kl_coef * (new.detach() - ref)
        rewards[-1] += score
        last, out = 0.0, []
        v = [*values.detach().tolist(), 0.0]
        for t in reversed(range(len(rewards))):
            last = float(rewards[t]) + args.gamma * v[t + 1] - v[t] + args.gamma * args.lam * last
            out.append(last)
        out = torch.tensor(out[::-1], dtype=torch.float64)
        advantages.append(out)
        returns.append(out + values.detach())
    flat = torch.cat(advantages)
    whitened = (flat - flat.mean()) / (flat.var(unbiased=True) + 1e-8).sqrt()
    new, values = torch.cat([r[0] for r in rows]), torch.cat([r[2] for r in rows])
    policy_loss = (-whitened * (new - new.detach()).exp()).mean()
    value_loss = 0.5 * ((values - torch.cat(returns)) ** 2).mean()
    (policy_loss + args.vf_coef * value_loss).backward()


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
    tokens = [torch.cat(x) for x in zip(rollout.prompts, rollout.responses, strict=True)]
    assert len({len(x) for x in tokens}) > 1
    starts = [len(x) for x in rollout.prompts]
    plain_update(plain_policy, plain_value, plain_reference, tokens, starts, scores.double(), run.args)
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


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_reward_functions_get_texts_and_columns(tmp_path):
    seen = {}
    data = [{"prompt": text, "answer": i} for i, text in enumerate(sentences(8, 1))]

    def reward(prompts, completions, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [0.5] * len(prompts)

    def everything(prompts, completions, **columns):
        seen["all"] = set(columns)
        return torch.ones(len(prompts))

    run = trainer(tmp_path, reward=[reward, (everything, 2.0)], data=data, total_episodes=8)
    run.train()
    assert seen["prompts"] == [data[i]["prompt"] for i in seen["answer"]] and isinstance(seen["completions"][0], str)
    assert seen["all"] == {"prompt", "answer"}
    line = run.state.log_history[0]
    assert line["objective/scores"] == 2.5 and line["rewards/reward"] == 0.5 and line["rewards/everything"] == 1.0
    weighted = trainer(tmp_path, reward=[reward, everything], reward_weights=[1.0, -1.0], data=data, total_episodes=8)
    weighted.train()
    assert weighted.state.log_history[0]["objective/scores"] == -0.5


def test_reward_model_scores_as_its_own_forward(tmp_path):
    model = make_model("reward", 2)
    run = trainer(tmp_path, reward=model, stop_token="eos")
    rollout = run.rollout([torch.tensor(row["input_ids"]) for row in prompts(5)], seed=0)
    scores, named = run.judge(rollout, {})
    for prompt, response, score in zip(rollout.prompts, rollout.responses, scores, strict=True):
        with torch.no_grad():
            wanted = model(torch.cat([prompt, response])[None]).logits[0, 0]
        assert float(score) == pytest.approx(float(wanted), rel=1e-4, abs=1e-5)
    assert named == {}


def test_missing_eos_penalty(tmp_path):
    run = trainer(
        tmp_path, reward=lambda prompts, completions: [1.0] * len(prompts), missing_eos_penalty=3.0, stop_token="eos"
    )
    rollout = run.rollout([torch.tensor([7, 8])] * 64, seed=0)
    scores, _ = run.judge(rollout, {})
    ended = torch.tensor([bool((response == 2).any()) for response in rollout.responses])
    assert 0 < ended.sum() < 64
    assert scores.tolist() == torch.where(ended, 1.0, -2.0).tolist()
    assert all(int((response == 2).sum()) <= 1 for response in rollout.responses)


def test_without_stop_token_every_response_is_full(tmp_path):
    run = trainer(tmp_path)
    rollout = run.rollout([torch.tensor([7, 8])] * 64, seed=0)
    assert rollout.mask_BT.shape == (64, 6) and bool(rollout.mask_BT.all())
    assert bool((rollout.tokens_BT == 2).any())


class Endpoint(http.server.BaseHTTPRequestHandler):
    failures = 0
    bodies: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503)
            return
        answer = json.dumps({"scores": [words(text, "cat") for text in body["completions"]]}).encode()
        self.send_response(404 if "nothing" in self.path else 200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    from fastppo.experimental.ppo import rewards

    monkeypatch.setattr(rewards.time, "sleep", lambda seconds: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Endpoint.failures, Endpoint.bodies = 0, []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_reward_endpoint(tmp_path, endpoint):
    data = [{"prompt": text, "source": "x"} for text in sentences(8, 1)]
    Endpoint.failures = 2  # a server that restarts: tried again
    run = trainer(tmp_path, reward=f"{endpoint}/score", data=data, total_episodes=8)
    run.train()
    body = Endpoint.bodies[-1]
    assert set(body) == {"prompts", "completions", "prompt", "source"} and len(Endpoint.bodies) == 3
    wanted = sum(words(text, "cat") for text in body["completions"]) / 8
    assert run.state.log_history[0]["objective/scores"] == pytest.approx(wanted)
    with pytest.raises(RuntimeError, match="failed after 1 tries: HTTP Error 404"):
        trainer(tmp_path, reward=f"{endpoint}/nothing", data=data).train()


def test_nan_score_stops_or_skips(tmp_path):
    def broken(prompts, completions):
        return [float("nan"), *[0.0] * (len(prompts) - 1)]

    with pytest.raises(NonFinite, match="nan for sequence"):
        trainer(tmp_path, reward=broken).train()
    run = trainer(tmp_path, reward=broken, on_nonfinite="skip")
    before = [p.clone() for p in run.model.parameters()]
    with pytest.warns(RuntimeWarning, match="nan"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


# --- data -------------------------------------------------------------------------------------------------------------


def test_text_and_conversations_become_prompts(tmp_path):
    question, answer = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
    rows = {
        "prompt": [{"prompt": "the cat"}],
        "chat": [{"prompt": [question]}],
        "messages": [{"messages": [question, answer]}],
        "text": [{"text": "the cat"}],
    }
    tokenizer = make_tokenizer()
    texts = {
        name: tokenizer.decode(trainer(tmp_path, data=data).train_dataset[0]["input_ids"])
        for name, data in rows.items()
    }
    assert texts["prompt"] == texts["text"] == "the cat"
    assert texts["chat"] == texts["messages"] == "<s> user the cat assistant"


def test_own_collator_and_its_padding(tmp_path):
    from transformers import DataCollatorWithPadding

    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    run = trainer(tmp_path, data_collator=DataCollatorWithPadding(tokenizer))
    own = next(iter(run.get_train_dataloader()))
    plain = next(iter(trainer(tmp_path).get_train_dataloader()))
    assert [x.tolist() for x in own.prompts] == [x.tolist() for x in plain.prompts]


def test_prompt_stream_covers_the_data_and_knows_its_place():
    whole = list(PromptStream(10, 4, 5, seed=1))
    assert sorted(sum(whole, [])[:10]) == sorted(sum(whole, [])[10:]) == list(range(10))
    resumed = PromptStream(10, 4, 5, seed=1)
    resumed.first = 3
    assert list(resumed) == whole[3:] and len(resumed) == 2
    parts = [list(PromptStream(10, 4, 5, seed=1, rank=rank, processes=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


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
    drop = ("eps",)
    logs = [[{k: v for k, v in x.items() if k not in drop} for x in run.state.log_history] for run in (whole, again)]
    assert logs[0] == logs[1]
    again = build()
    again.train(resume_from_checkpoint=True)  # nothing left to do
    assert again.state.global_step == 4
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
