"""The stages of the late trainer's update: prompts -> Rollout -> scores -> Experience -> optimizer steps -> metrics.

Suffixes: B sequences, T response tokens.
"""

import logging
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastppo import attention, determinism, distributed, flops
from fastppo.data import Experience, Rollout
from fastppo.experience import advantages_and_returns, kl_rewards
from fastppo.experimental.ppo import learner
from fastppo.experimental.ppo.engines import fused_of, readers
from fastppo.experimental.ppo.rewards import Judged
from fastppo.generation.fast_path import give_back
from fastppo.metrics import Clock
from fastppo.packed import Sequences

if TYPE_CHECKING:
    from fastppo.experimental.ppo.ppo_trainer import PPOTrainer

logger = logging.getLogger(__name__)


def rollout(trainer: "PPOTrainer", prompts: list[torch.Tensor], seed: int, temperature: float | None) -> Rollout:
    """Responses of the policy, at args.temperature unless told otherwise."""
    args, accelerator = trainer.args, trainer.accelerator
    temperature = args.temperature if temperature is None else temperature
    options = {"do_sample": temperature > 0, "top_k": 0, "top_p": 1.0, "max_new_tokens": args.response_length}
    options |= {"temperature": temperature} if temperature > 0 else {}
    # -1: no token ends a response
    options["eos_token_id"] = -1 if trainer.stop_token_id is None else trainer.stop_token_id
    options["pad_token_id"] = trainer.tokenizer.pad_token_id
    options |= args.generation_kwargs or {}
    # a prompt gets the same random numbers whatever the process that has it
    options["first_prompt"] = accelerator.process_index * (args.local_batch_size or 0)
    options |= {"seed": seed, "logprob_temperature": trainer._score_temperature}
    with accelerator.autocast():
        prompts = [prompt.to(accelerator.device) for prompt in prompts]
        generate = partial(trainer.generator.generate, prompts, **options)
        return distributed.whole(accelerator, trainer._wrapper, generate)


def judge(trainer: "PPOTrainer", rollout: Rollout, columns: dict[str, list]) -> tuple[torch.Tensor, dict]:
    """(scores [B] with missing_eos_penalty, scores of each reward by name), on the CPU."""
    args, tokenizer, responses = trainer.args, trainer.tokenizer, rollout.responses
    whole = [torch.cat([q.to(r.device), r]) for q, r in zip(rollout.prompts, responses, strict=True)]
    tokens_BL = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=tokenizer.pad_token_id)
    lengths_B1 = torch.tensor([[len(ids)] for ids in whole], device=tokens_BL.device)
    real_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) < lengths_B1
    completions = tokenizer.batch_decode(responses, skip_special_tokens=True)
    prompts = next((columns[n] for n in ("prompt", "query") if isinstance(columns.get(n, [None])[0], str)), None)
    if prompts is None:
        prompts = tokenizer.batch_decode(rollout.prompts, skip_special_tokens=True)
    with trainer.accelerator.autocast():
        judged = Judged(tokens_BL, real_BL, list(prompts), list(completions), columns)
        scores_B, named = trainer._rewards(judged)
    if args.missing_eos_penalty is not None:
        ended_B = ((rollout.tokens_BT == tokenizer.eos_token_id) & rollout.mask_BT).any(1).cpu()
        scores_B = scores_B - args.missing_eos_penalty * (~ended_B).float()
    return scores_B, named


def prepare(trainer: "PPOTrainer", rollout: Rollout, scores_B: torch.Tensor) -> tuple[Experience, Sequences]:
    """Log-probs, values and reference log-probs, then rewards, advantages and returns."""
    args, mask_BT, accelerator = trainer.args, rollout.mask_BT, trainer.accelerator
    recompute = args.old_logprobs == "recompute"
    data = learner.sequences(rollout.prompts, rollout.responses, mask_BT)
    policy, reference, value = readers(trainer)
    size = trainer.scored_rows

    def of_policy():
        values_BT, logprobs_BT, ref_BT = rollout.values_BT, rollout.logprobs_BT, None
        if args.deterministic:
            logprobs_BT, values_BT = learner.score_as_learnt(trainer, fused_of(trainer), data)
        else:
            if values_BT is None or recompute:
                values_BT = learner.score(value, data, size)
            if logprobs_BT is None or recompute:
                logprobs_BT = learner.score(policy, data, size)
        if not trainer.reference:
            with trainer.null_ref_context():
                ref_BT = learner.score(reference, data, size)
        return values_BT, logprobs_BT, ref_BT

    with accelerator.autocast():
        values_BT, logprobs_BT, ref_BT = distributed.whole(accelerator, trainer._wrapper, of_policy)
        if trainer.reference:
            of_reference = partial(learner.score, reference, data, size)
            ref_BT = distributed.whole(accelerator, trainer.ref_model, of_reference)
    scores_B = scores_B.to(mask_BT.device)
    shaped = kl_rewards(scores_B, logprobs_BT, ref_BT, mask_BT, kl_coef=args.kl_coef, kind=args.kl_estimator)
    values_BT, advantages_BT, returns_BT = advantages_and_returns(
        values_BT,
        shaped.rewards_BT,
        mask_BT,
        gamma=args.gamma,
        lam=args.lam,
        whiten_rewards=args.whiten_rewards,
        total=partial(distributed.total, accelerator) if accelerator.num_processes > 1 else None,
    )
    experience = Experience(
        queries=rollout.prompts,
        responses=rollout.responses,
        inputs=None,
        mask_BT=mask_BT,
        scores_B=scores_B,
        logprobs_BT=logprobs_BT,
        ref_logprobs_BT=ref_BT,
        values_BT=values_BT,
        rewards_BT=shaped.rewards_BT,
        non_score_BT=shaped.non_score_BT,
        kl_BT=shaped.kl_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT,
        from_rollout=args.old_logprobs == "rollout",
    )
    return experience, data


def optimise(trainer: "PPOTrainer", experience: Experience, data: Sequences, number: int) -> learner.Learner:
    """args.num_ppo_epochs times over the batch, one optimizer step per mini-batch; the learner's `steps` tell of them."""
    args = trainer.args
    fused = fused_of(trainer)
    if fused is None:
        give_back(attention.unwrap(trainer.policy_model))
    draw = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
    orders = [torch.randperm(args.local_batch_size, generator=draw) for _ in range(args.num_ppo_epochs)]
    minibatches = [part.tolist() for order in orders for part in order.split(args.local_mini_batch_size)]
    # beside others a process may have fewer prompts
    groups = [[[row for row in part if row < len(data.tokens)]] for part in minibatches]
    made = learner.Learner(trainer, data, experience)
    with determinism.algorithms(args), made.started(fused):
        made.foresee(groups)
        for group in groups:
            made.steps += made.learn(group)
    distance = made.mismatch.mean
    if experience.from_rollout and distance > args.max_mismatch:
        logger.warning(
            "log-probs of the rollout and of training differ by %.3g nats on average (allowed: max_mismatch=%g); "
            "old_logprobs='recompute' takes them from a pass of their own",
            distance,
            args.max_mismatch,
        )
    return made


def costs(trainer: "PPOTrainer") -> tuple[flops.Cost, flops.Cost | None, flops.Cost]:
    """Of the policy, of a value model, of the reference."""
    policy, value = flops.policy_cost(trainer.policy_model), trainer.value_model
    separate = None if value is None else flops.cost(value, value.score)
    return policy, separate, policy if trainer.reference is None else flops.policy_cost(trainer.reference.packed.model)


def utilisation(trainer: "PPOTrainer", experience: Experience, data: Sequences, clock: Clock) -> dict[str, float]:
    """fastppo/: MFU of this process's prepare and optimise, where all models can be packed."""
    if any(model.packed.why_padded for model in (trainer.policy, trainer.value, trainer.reference or trainer.policy)):
        return {}
    if trainer.costs is None:
        trainer.costs = costs(trainer)
    policy, value, reference = trainer.costs
    sizes = data.lengths, [len(response) for response in experience.responses]
    trained = [(cost.forward(*sizes), cost.trained) for cost in (policy, value) if cost is not None]
    read = [value, reference] if experience.from_rollout else [policy, value, reference]
    prepare = sum(cost.forward(*sizes) for cost in read if cost is not None)
    optimise = trainer.args.num_ppo_epochs * sum(once * times for once, times in trained)
    spent = clock.seconds["forward_pass"], clock.seconds["optimize_step"]
    accelerator = trainer.accelerator
    return flops.utilisation((prepare, spent[0]), (optimise, spent[1]), accelerator.device, accelerator.mixed_precision)


def metrics(
    trainer, rollout: Rollout, experience: Experience, named: dict, learnt: learner.Learner
) -> dict[str, float]:
    """TRL's metrics of one update, over the sequences and response tokens of all processes."""
    accelerator, steps = trainer.accelerator, learnt.steps
    means = sum((step.stats for step in steps[1:]), steps[0].stats).means()
    ratios = torch.tensor([step.stats.means()["ratio"] for step in steps])
    mask_BT = experience.mask_BT
    non_score_B = experience.non_score_BT.sum(1)
    eos = (rollout.tokens_BT == trainer.tokenizer.eos_token_id) & mask_BT
    of_sequences = {
        "objective/kl": experience.kl_BT.sum(1),
        "objective/entropy": (-experience.logprobs_BT * mask_BT).sum(1),
        "objective/non_score_reward": non_score_B,
        "objective/rlhf_reward": non_score_B + experience.scores_B,
        "objective/scores": experience.scores_B,
    } | {f"rewards/{name}": scores_B for name, scores_B in named.items()}
    sums = [len(mask_BT), int(eos.sum()), *(float(x.double().sum()) for x in of_sequences.values())]
    count, num_eos, *sums = distributed.table(accelerator, sums).sum(0).tolist()
    logs = {name: x / count for name, x in zip(of_sequences, sums, strict=True)} | {
        "policy/approxkl_avg": means["approx_kl"],
        "policy/clipfrac_avg": means["policy_clipped"],
        "loss/policy_avg": means["policy_loss"],
        "loss/value_avg": means["value_loss"],
        "val/clipfrac_avg": means["value_clipped"],
        "policy/entropy_avg": means["entropy"],
        "val/ratio": means["ratio"],
        "val/ratio_var": float(ratios.var()) if len(ratios) > 1 else 0.0,
        "grad_norm": sum(step.grad_norm for step in steps) / len(steps),
        "fastppo/mismatch": learnt.mismatch.mean,
        "val/num_eos_tokens": int(num_eos),
    }
    return logs
