"""Small runs of the late PPOTrainer that several test files build, and one update of it in plain PyTorch."""

import contextlib

import torch
from sft_cases import make_model, make_tokenizer, sentences

from fastppo.experimental.ppo import PPOConfig, PPOTrainer


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
    # before the configuration: with ZeRO-3 in it transformers shards what it makes from then on
    models = {
        "model": policy or make_model(),
        "value_model": (make_model("reward", 1) if value is True else value) or None,
    }
    models["reward_model"] = make_model("reward", 2) if reward is None else reward
    return PPOTrainer(
        args=PPOConfig(**(args | options)),
        processing_class=make_tokenizer(),
        ref_model=ref_model,
        **models,
        train_dataset=Dataset.from_list(prompts() if data is None else data),
        eval_dataset=None if evaluate is None else Dataset.from_list(evaluate),
        **more,
    )


def words(text: str, word: str) -> float:
    return float(text.split().count(word))


def logprobs_of(model, ids, at: slice, targets, temperature: float) -> torch.Tensor:
    logits = model(input_ids=ids[None]).logits[0, at] / temperature
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def advantages_of(rewards: torch.Tensor, values: torch.Tensor, args) -> torch.Tensor:
    last, out, v = 0.0, [], [*values.tolist(), 0.0]
    for t in reversed(range(len(rewards))):
        last = float(rewards[t]) + args.gamma * v[t + 1] - v[t] + args.gamma * args.lam * last
        out.append(last)
    return torch.tensor(out[::-1], dtype=torch.float64)


def plain_update(models: tuple, rollout, scores, args) -> dict[str, float]:
    """One PPO step of one mini-batch in plain float64 PyTorch, sequence by sequence: gradients by autograd, metrics returned.

    models: (policy, sequence classifier for the values, reference); reference None: the policy with its adapter off.
    """
    policy, value, reference = (None if m is None else m.double() for m in models)
    rows, kls = [], []
    for prompt, response, score in zip(rollout.prompts, rollout.responses, scores.double(), strict=True):
        ids, at = torch.cat([prompt, response]), slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        new = logprobs_of(policy, ids, at, response, args.temperature)
        with torch.no_grad(), policy.disable_adapter() if reference is None else contextlib.nullcontext():
            kls.append(new.detach() - logprobs_of(reference or policy, ids, at, response, args.temperature))
        backbone = getattr(value, value.base_model_prefix)
        values = value.score(backbone(input_ids=ids[None]).last_hidden_state[0, at])[:, 0]
        rewards = -args.kl_coef * kls[-1]
        rewards[-1] += score
        rows.append((new, values, advantages_of(rewards, values.detach(), args)))
    new, values, flat = (torch.cat(x) for x in zip(*rows, strict=True))
    whitened = (flat - flat.mean()) / (flat.var(unbiased=True) + 1e-8).sqrt()
    policy_loss = (-whitened * (new - new.detach()).exp()).mean()
    value_loss = 0.5 * ((values - (flat + values.detach())) ** 2).mean()
    (policy_loss + args.vf_coef * value_loss).backward()
    kl_B = torch.stack([kl.sum() for kl in kls])
    found = {
        "objective/kl": kl_B.mean(),
        "objective/entropy": -new.sum() / len(rows),
        "objective/non_score_reward": -args.kl_coef * kl_B.mean(),
        "objective/rlhf_reward": (scores - args.kl_coef * kl_B).mean(),
        "objective/scores": scores.mean(),
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
    }
    return {name: float(x.detach()) for name, x in found.items()}
