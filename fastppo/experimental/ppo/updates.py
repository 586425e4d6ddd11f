"""Prepare and optimise for the late trainer: Rollout + scores -> Experience -> optimizer steps -> metrics; resume files.

Suffixes: B sequences, T response tokens.
"""

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from fastppo import distributed
from fastppo.data import Experience, Rollout
from fastppo.experience import advantages_and_returns, kl_rewards
from fastppo.experimental.ppo import learner
from fastppo.experimental.ppo.engines import fused_of
from fastppo.experimental.ppo.state import OnlineTrainerState
from fastppo.kernels.ppo_loss import STATS, PPOBatch, PPOLossOptions, PPOStats
from fastppo.update import clip

if TYPE_CHECKING:
    from fastppo.experimental.ppo.ppo_trainer import PPOTrainer

logger = logging.getLogger(__name__)

VALUE_FILE, RESUME_FILE, STATE_FILE = "value.safetensors", "resume.pt", "trainer_state.json"


def prepare(trainer: "PPOTrainer", rollout: Rollout, scores_B: torch.Tensor) -> tuple[Experience, learner.Sequences]:
    """Log-probs, values and reference log-probs, then rewards, advantages and returns."""
    args, mask_BT = trainer.args, rollout.mask_BT
    size, temperature = args.local_rollout_forward_batch_size, trainer._score_temperature
    data = learner.sequences(rollout.prompts, rollout.responses, mask_BT, trainer.tokenizer.pad_token_id)
    accelerator, recompute = trainer.accelerator, args.old_logprobs == "recompute"

    def of_policy():
        values_BT, logprobs_BT, ref_BT = rollout.values_BT, rollout.logprobs_BT, None
        if values_BT is None or recompute:
            values_BT = learner.score_values(trainer.policy, trainer.value, data, size)
        if logprobs_BT is None or recompute:
            logprobs_BT = learner.score_logprobs(trainer.policy, data, size, temperature)
        if not trainer.reference:
            with trainer.null_ref_context():
                ref_BT = learner.score_logprobs(trainer.policy, data, size, temperature)
        return values_BT, logprobs_BT, ref_BT

    with accelerator.autocast():
        values_BT, logprobs_BT, ref_BT = distributed.whole(accelerator, trainer._wrapper, of_policy)
        if trainer.reference:
            score = partial(learner.score_logprobs, trainer.reference, data, size, temperature)
            ref_BT = distributed.whole(accelerator, trainer.ref_model, score)
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


class Optimised(NamedTuple):
    """One optimizer step: statistics of its mini-batch, this process's share of the mean |new - old log-prob|, gradient
    norm before clipping."""

    stats: PPOStats
    distance: float
    grad_norm: float


def optimise(trainer: "PPOTrainer", experience: Experience, data: learner.Sequences, number: int) -> list[Optimised]:
    """args.num_ppo_epochs times over the batch, one optimizer step per mini-batch."""
    args, steps = trainer.args, []
    old = PPOBatch(experience.logprobs_BT, experience.values_BT, experience.advantages_BT, experience.returns_BT)
    draw = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
    fused = fused_of(trainer)
    with fused.started(experience) if fused else contextlib.nullcontext():
        for _ in range(args.num_ppo_epochs):
            order = torch.randperm(args.local_batch_size, generator=draw).to(data.mask_BT.device)
            for index in order.split(args.local_mini_batch_size):
                index = index[index < len(data.mask_BT)]  # beside others a process may have fewer prompts
                steps.append(_minibatch(trainer, old, data, index, fused))
    distance = float(distributed.table(trainer.accelerator, [steps[0].distance]).sum())
    if experience.from_rollout and distance > args.max_mismatch:
        logger.warning(
            "log-probs of the rollout and of training differ by %.3g nats on average (allowed: max_mismatch=%g); "
            "old_logprobs='recompute' takes them from a pass of their own",
            distance,
            args.max_mismatch,
        )
    return steps


def _minibatch(trainer: "PPOTrainer", old: PPOBatch, data: learner.Sequences, index: torch.Tensor, fused) -> Optimised:
    while True:
        try:
            stats, distance = _gradients(trainer, old, data, index, fused)
            break
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad()
            if trainer.micro_rows == 1 or trainer.accelerator.num_processes > 1:
                raise
            trainer.micro_rows = -(-trainer.micro_rows // 2)
            logger.warning("out of memory: micro-batches have %d sequences from here on", trainer.micro_rows)
            torch.cuda.empty_cache()
    trainer.accelerator.unscale_gradients(trainer.optimizer)
    (stats,) = distributed.share_stats(trainer.accelerator, [stats])
    norm = clip(trainable(trainer), trainer.args.max_grad_norm or None)
    # fp16's loss scaler expects infinite gradients now and then, and skips those steps itself
    scaled = trainer.accelerator.scaler is not None
    if scaled or trainer.guard.allows("the gradient norm", norm, index.tolist(), trainer.state.global_step + 1):
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return Optimised(stats, distance, norm)


def _gradients(trainer, old: PPOBatch, data: learner.Sequences, index: torch.Tensor, fused) -> tuple[PPOStats, float]:
    """Backward over the mini-batch in micro-batches whose losses add up to its mean over tokens."""
    args, accelerator = trainer.args, trainer.accelerator
    options = PPOLossOptions(args.cliprange, args.cliprange_value, args.vf_coef)
    lengths = data.real_BL[index].sum(1)
    micros = index[lengths.argsort(descending=True, stable=True)].split(trainer.micro_rows) if len(index) else []
    tokens = int(data.mask_BT[index].sum())
    ((normalizer, passes),) = distributed.shares(accelerator, [tokens], [len(micros)])
    # sharded gradients are reduced after each pass: kept whole until the last they would need the memory of all
    keeps_gradients = distributed.kind(accelerator) not in distributed.SHARDED
    results = []
    if fused:
        fused.refresh()
        results = [fused.learn(rows.tolist(), old, options, normalizer) for rows in micros]
        micros, passes = (), 0
    for place in range(passes):
        # passes beyond this process's own keep the others company
        is_own = place < len(micros)
        rows = micros[place] if is_own else torch.zeros(1, dtype=torch.long, device=index.device)
        part, part_old = data.rows(rows), PPOBatch(*(x[rows] for x in old[:4]))
        with contextlib.ExitStack() as stack:
            if keeps_gradients and place < passes - 1:
                stack.enter_context(accelerator.no_sync(trainer.model_wrapped))
            stack.enter_context(trainer.policy.packed.attention())
            if isinstance(trainer.value, learner.SeparateValue):
                stack.enter_context(trainer.value.packed.attention())
            with accelerator.autocast():
                step = _forward(trainer, part, part_old, options, normalizer)
            # accelerate divides by its number of accumulation steps
            accelerator.backward(step.loss * (accelerator.gradient_accumulation_steps if is_own else 0.0))
        if is_own:
            results.append(step)
    stats = sum((step.stats for step in results), PPOStats((torch.zeros(len(STATS)),)))
    distance = float(sum(step.distance for step in results))
    return stats, distance / max(normalizer * accelerator.num_processes, 1.0)


def _forward(trainer, part, old: PPOBatch, options: PPOLossOptions, normalizer: float) -> learner.Step:
    def run() -> learner.Step:
        temperature = trainer._score_temperature
        return learner.micro_step(trainer.policy, trainer.value, part, old, options, temperature, normalizer)

    return learner.as_forward(trainer._wrapper, trainer.model_wrapped, run)


def trainable(trainer: "PPOTrainer") -> list[torch.nn.Parameter]:
    return [parameter for parameter in trainer._wrapper.parameters() if parameter.requires_grad]


def metrics(trainer, rollout: Rollout, experience: Experience, named: dict, steps: list[Optimised]) -> dict[str, float]:
    """TRL's metrics of one update, over the sequences and response tokens of all processes."""
    accelerator = trainer.accelerator
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
    sums = [len(mask_BT), steps[0].distance, int(eos.sum()), *(float(x.double().sum()) for x in of_sequences.values())]
    count, distance, num_eos, *sums = distributed.table(accelerator, sums).sum(0).tolist()
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
        "fastppo/mismatch": distance,
        "val/num_eos_tokens": int(num_eos),
    }
    return logs


# --- resume -----------------------------------------------------------------------------------------------------------


class Resume(NamedTuple):
    """What a policy's folder lacks, with whole tensors. value: parameters of the value function by name."""

    value: dict[str, torch.Tensor]
    optimizer: dict


def collect_resume(trainer: "PPOTrainer") -> Resume:
    """Every process takes part: sharded tensors are gathered."""
    policy = {id(x) for x in trainer.policy_model.parameters()}
    value = {name: x for name, x in trainer._wrapper.named_parameters(remove_duplicate=True) if id(x) not in policy}
    value = {name: distributed.full_tensor(x.detach()).cpu().contiguous() for name, x in value.items()}
    return Resume(value, distributed.optimizer_state(trainer.optimizer))


def save_resume(trainer: "PPOTrainer", folder: Path, resume: Resume) -> None:
    """What a policy's folder lacks: value function, optimizer, schedule, state. Written by one process."""
    save_file(resume.value, folder / VALUE_FILE)
    states = {"optimizer": resume.optimizer, "lr_scheduler": trainer.lr_scheduler.state_dict()}
    torch.save(states | {"micro_rows": trainer.micro_rows}, folder / RESUME_FILE)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        name = type(callback).__name__
        if name in trainer.state.stateful_callbacks:
            trainer.state.stateful_callbacks[name] = callback.state()
    trainer.state.save_to_json(str(folder / STATE_FILE))


def load_weights(trainer: "PPOTrainer", folder: Path) -> None:
    """Put the weights back as they were saved, before accelerate lays them out."""
    for name in (VALUE_FILE, RESUME_FILE, STATE_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"PPOTrainer.train: {folder} is no checkpoint of a run: it has no {name}")
    if distributed.fsdp_units(trainer._wrapper):
        raise ValueError("PPOTrainer.train: its parameters are sharded already; resume with a new trainer")
    # transformers asks trainer.model about missing keys, and looks for FSDP's own files; here parameters are whole
    before = trainer.model, trainer.is_fsdp_enabled
    trainer.model, trainer.is_fsdp_enabled = trainer.policy_model, False
    try:
        trainer._load_from_checkpoint(str(folder), trainer.policy_model)
    finally:
        trainer.model, trainer.is_fsdp_enabled = before
    parameters = dict(trainer._wrapper.named_parameters())
    with torch.no_grad():
        for name, saved in load_file(folder / VALUE_FILE).items():
            parameters[name].copy_(saved)


def load_resume(trainer: "PPOTrainer", folder: Path) -> None:
    """Put optimizer, schedule and state back as `save_resume` found them."""
    states = torch.load(folder / RESUME_FILE, map_location="cpu", weights_only=True)
    distributed.load_optimizer_state(trainer.optimizer, states["optimizer"])
    trainer.lr_scheduler.load_state_dict(states["lr_scheduler"])
    trainer.micro_rows = states["micro_rows"]
    before = trainer.state
    trainer.state = OnlineTrainerState.load_from_json(str(folder / STATE_FILE))
    for name in ("is_local_process_zero", "is_world_process_zero", "max_steps"):
        setattr(trainer.state, name, getattr(before, name))
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
