"""One process of test_distributed.py: runs the cases that it is given on its share of the rows and writes what it found.

python distributed_worker.py FOLDER CASE[,CASE...] [fsdp2|zero2|zero3]        under torchrun, or alone for the single-process result
accelerate launch ... distributed_worker.py FOLDER CASE[,CASE...] launched        how parameters lie is the launcher's choice
Every case splits the same 8 (or 7) sequences of a step over the processes, so that mini-batches hold the same ones.
"""

import errno
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import golden_cases
import torch
from distributed_layouts import (
    GLOBAL,
    MINI,
    RANK,
    WORLD,
    ZERO,
    ask_for_deepspeed,
    ask_for_fsdp2,
    cpu_fsdp2,
    evens_first,
    in_order,
    models_are_made_whole,
    own_rows,
    plain,
    weights,
)
from safetensors.torch import load_file, save_file

import fastppo
from fastppo import host_group
from fastppo.distributed import fsdp_units, kind
from fastppo.experimental.ppo.engines import Fused

# --- the classic trainer ----------------------------------------------------------------------------------------------

CLASSIC = {
    "plain": {},
    "everything": {
        "config": {
            "whiten_rewards": True, "use_score_scaling": True, "use_score_norm": True, "max_grad_norm": 0.5,
            "target": 0.1, "horizon": 20, "max_tokens_per_micro_batch": 24,
        },
        "masks": True,
    },
    "early_stopping": {"config": {"early_stopping": True, "target_kl": 0.01, "ppo_epochs": 8}},
    "lora": {"lora": True},
    "padded": {"config": {"packed": False, "whiten_rewards": True}},
    "rollout": {},
    "fewer": {},
    "skipped": {"config": {"on_nonfinite": "skip"}},
    "resume": {"config": {"target": 0.1, "horizon": 20, "use_score_scaling": True, "use_score_norm": True}},
    "resume_lora": {"lora": True},
}  # fmt: skip


def accelerator_options() -> dict:
    """A plugin object, too, where the case's launch has one."""
    from accelerate import FullyShardedDataParallelPlugin

    plugin = {"fsdp_plugin": FullyShardedDataParallelPlugin()} if sys.argv[-1] == "fsdp2" else {}
    return {} if ZERO else {"cpu": True, **plugin}


def classic_trainer(case: dict, whole_batch: bool = False, **extra):
    sizes = {"batch_size": GLOBAL // WORLD, "mini_batch_size": (GLOBAL if whole_batch else MINI) // WORLD}
    models_are_made_whole()
    config = case.get("config", {}) | sizes | {"learning_rate": 3e-4, "accelerator_kwargs": accelerator_options()}
    return golden_cases.trainer(fastppo, {**case, "config": config}, **extra)


def classic_batches(case: dict, count: int = 2):
    config = {"batch_size": GLOBAL}
    yield from golden_cases.batches({**case, "config": config}, count)


def classic(name: str, folder: Path) -> tuple[dict, list[dict]]:
    case, fewer, whole_batch = CLASSIC[name], name == "fewer", name in ("fewer", "rollout")
    extra = {"batch_size": GLOBAL - 1, "mini_batch_size": GLOBAL - 1} if fewer and WORLD == 1 else {}
    made = classic_trainer(case, whole_batch, **extra)
    steps = []
    for number, batch in enumerate(classic_batches(case)):
        if name == "skipped" and number == 1:
            batch[2][GLOBAL - 1] = torch.tensor(float("nan"))  # on the last process only
        rows = [row for row in own_rows(GLOBAL if whole_batch else MINI) if not (fewer and row == GLOBAL - 1)]
        queries, responses, scores, masks = ([part[r] for r in rows] if part else None for part in batch)
        if name == "rollout":
            options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6, "pad_token_id": 0}
            responses = made.generate(queries, batch_size=8, return_prompt=False, eos_token_id=-1, **options)
        steps.append(plain(made.step(queries, responses, scores, masks)) | {"kl_coef": made.kl_ctl.value})
        if name == "rollout":
            (sampled,) = made.accelerator.reduce(torch.stack([torch.stack(responses).sum()]))
            steps[-1]["sampled tokens"] = int(sampled)
    steps.append({"optimizer steps": int(next(iter(made.optimizer.state.values()))["step"])})
    assert bool(fsdp_units(made.model)) == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
    if ZERO:
        made.generate(queries, return_prompt=False, do_sample=False, max_new_tokens=4, pad_token_id=0)
        made.save_pretrained(str(folder / f"{name}-policy"))
    moments = {"mean": float(made.running.mean), "std": float(made.running.std), "count": float(made.running.count)}
    assert type(made._path).__name__ == ("PaddedPath" if name == "padded" else "PackedPath")
    return weights(made.accelerator, made.model), [*steps, moments]


def sampled_steps(made, batches) -> list[dict]:
    """Steps on responses of the policy's own: their statistics."""
    found = []
    for queries, _, scores, _ in batches:
        rows = own_rows(GLOBAL)
        queries, scores = [queries[r] for r in rows], [scores[r] for r in rows]
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6, "pad_token_id": 0}
        responses = made.generate(queries, batch_size=8, return_prompt=False, eos_token_id=-1, **options)
        stats = made.step(queries, responses, scores)
        made.log_stats(stats, {"query": queries, "response": responses}, scores)
        found.append(plain(stats) | {"kl_coef": made.kl_ctl.value})
    return found


def resumed(name: str, folder: Path) -> tuple[dict, list[dict]]:
    """A step, a checkpoint, a step that is lost; a new trainer goes on. Also saves the policy, in folder/<name>-policy.

    The logs say whether weights and statistics are bitwise those of a trainer that never stopped.
    """
    case, batches = CLASSIC[name], list(classic_batches(CLASSIC[name], 3))
    straight, stopped = classic_trainer(case, True), classic_trainer(case, True)
    torch.manual_seed(6)
    wanted = sampled_steps(straight, batches)
    torch.manual_seed(6)
    sampled_steps(stopped, batches[:1])
    stopped.save_checkpoint(folder / f"{name}-run")
    sampled_steps(stopped, batches[1:2])
    again = classic_trainer(case, True)
    assert again.load_checkpoint(folder / f"{name}-run").step == 1
    logs = sampled_steps(again, batches[1:])
    found, kept = weights(again.accelerator, again.model), weights(straight.accelerator, straight.model)
    bitwise = all(torch.equal(found[n], kept[n]) for n in kept) and repr(logs) == repr(wanted[1:])
    again.save_pretrained(folder / f"{name}-policy")
    again.accelerator.wait_for_everyone()
    return found, [*logs, {"bitwise": bitwise}]


def deterministic_classic(_: str, folder: Path) -> tuple[dict, list[dict]]:
    """Two runs with other micro-batches and another batching of the rollout: the logs say whether all bits are the same."""
    runs = []
    for config in ({"max_tokens_per_micro_batch": 1000}, {"generation": {"max_num_seqs": 2, "num_blocks": 40}}):
        made = classic_trainer({"config": config | {"deterministic": True}}, True)
        torch.manual_seed(6)
        logs = sampled_steps(made, classic_batches({}))
        runs.append((weights(made.accelerator, made.model), logs))
    return same_bits(*runs)


def deterministic_late(name: str, folder: Path) -> tuple[dict, list[dict]]:
    runs = []
    for rows in (1, 2):
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": GLOBAL // WORLD // rows}
        sizes |= {"local_rollout_forward_batch_size": rows, "num_mini_batches": 2}
        run = late_trainer(folder / name, value=True, deterministic=True, **sizes)
        run.generator.max_num_seqs = rows
        run.train()
        assert isinstance(run.fused, Fused) == (kind(run.accelerator) in ("single", "ddp"))
        exact = [line["fastppo/mismatch"] == 0.0 for line in run.state.log_history]
        runs.append((weights(run.accelerator, run._wrapper), [*late_logs(run), {"exact": exact}]))
    return same_bits(*runs)


def same_bits(first: tuple[dict, list], second: tuple[dict, list]) -> tuple[dict, list[dict]]:
    same = all(torch.equal(x, second[0][name]) for name, x in first[0].items()) and repr(first[1]) == repr(second[1])
    return first[0], [*first[1], {"bitwise": same}]


# --- the others -------------------------------------------------------------------------------------------------------


def lora(task: str = "CAUSAL_LM"):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task, lora_dropout=0.0)


def late_trainer(folder: Path, value: bool = False, **options):
    import late_cases

    torch.manual_seed(5)
    reward = lambda prompts, completions: [c.split().count("cat") + len(c) / 40 for c in completions]  # noqa: E731
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": GLOBAL // 2 // WORLD}
    options = sizes | options | {"total_episodes": 24, "learning_rate": 3e-4, "reward": reward, "kl_estimator": "k3"}
    options |= {"response_length": 6, "stop_token": "eos", "num_ppo_epochs": 2, "logging_steps": 1}
    return late_cases.trainer(folder, value=value, **options)


TWO_MINIBATCHES = ("late_value", "late_fewer")


def late(name: str, folder: Path) -> tuple[dict, list[dict]]:
    """Three updates; "resume": two, then a new trainer goes on from the checkpoint; "late_fewer": the last process lacks a prompt.

    Also asserts that it ran on the engine, where it can.
    """

    def made(**options):
        options |= {"peft_config": lora()} if name == "late_lora" else {}
        options |= {"num_mini_batches": 2} if name in TWO_MINIBATCHES else {}
        return late_trainer(folder / name, value=name == "late_value", whiten_rewards=name == "late_whiten", **options)

    skip = {"on_nonfinite": "skip"} if name == "late_nan" else {}
    run = made(**({"save_strategy": "steps", "save_steps": 2} if name == "late_resume" else skip))
    if name == "late_nan":
        spoil_second_update(run)
    if name == "late_fewer":
        drop_last_prompt(run)
    run.train()
    whole = name not in ("late_lora", "late_nan") and kind(run.accelerator) in ("single", "ddp")
    assert isinstance(run.fused, Fused) == whole, run.fused
    found, logs = weights(run.accelerator, run._wrapper), late_logs(run)
    if name == "late_resume":
        again = made()
        again.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
        now = weights(again.accelerator, again._wrapper)
        same = all(torch.equal(now[n], found[n]) for n in found) and written(late_logs(again)) == written(logs)
        logs.append({"bitwise": same})
    return found, logs


def written(logs: list[dict]) -> str:
    return json.dumps(logs, sort_keys=True)  # of lines that a checkpoint holds


def late_logs(run) -> list[dict]:
    """What was logged, without clocks and what a process counts for itself."""
    own = ("eps", "epoch", "fastppo/", "time/")
    return [{k: v for k, v in line.items() if not k.startswith(own)} for line in run.state.log_history]


def drop_last_prompt(run) -> None:
    collate = run.data_collator

    def fewer(rows):
        batch = collate(rows)
        keep = len(batch.prompts) - (RANK == WORLD - 1)
        columns = {name: column[:keep] for name, column in batch.columns.items()}
        return batch._replace(prompts=batch.prompts[:keep], columns=columns)

    run.dataloader.collate_fn = fewer


def spoil_second_update(run) -> None:
    """Gradients of the second update are NaN on the last process; the statistics of its passes are not."""
    from fastppo.experimental.ppo import learner

    real = learner.Learner._forward

    def forward(self, packed, count):
        loss, result = real(self, packed, count)
        return loss * (float("nan") if run.state.global_step == 1 and RANK == WORLD - 1 else 1.0), result

    learner.Learner._forward, run.fused = forward, "the models' own modules"


def supervised_trainer(name: str, folder: Path, **options):
    import test_reward
    import test_sft
    from sft_cases import rows

    models_are_made_whole()
    module, data = (test_sft, rows("text")) if name.startswith("sft") else (test_reward, rows("pairs"))
    torch.manual_seed(5)
    options |= {"per_device_train_batch_size": GLOBAL // WORLD, "learning_rate": 3e-4}
    return module.trainer(folder / name, (data * GLOBAL)[: 2 * GLOBAL], **options)


def supervised_logs(run) -> list[dict]:
    keep = ("loss", "grad_norm", "num_tokens", "entropy", "accuracy", "margin", "mean_token_accuracy")
    return [{k: line[k] for k in keep if k in line} for line in run.state.log_history if "loss" in line]


def supervised(name: str, folder: Path) -> tuple[dict, list[dict]]:
    """Three steps; "resume": a new trainer goes on from the checkpoint after the second, and then takes its weights as the best."""
    saving = {"save_strategy": "steps", "save_steps": 2} if name.endswith("resume") else {}
    more = {
        "max_steps": 3,
        **({"peft_config": lora("CAUSAL_LM" if "sft" in name else "SEQ_CLS")} if "lora" in name else {}),
    }
    run = supervised_trainer(name, folder, **more, **saving)
    run.train()
    found, logs = weights(run.accelerator, run.model), supervised_logs(run)
    if name.endswith("resume"):
        again, second = supervised_trainer(name, folder, **more), folder / name / "checkpoint-2"
        again.train(resume_from_checkpoint=str(second))
        now = weights(again.accelerator, again.model)
        same = all(torch.equal(now[n], found[n]) for n in found) and written(supervised_logs(again)) == written(logs)
        again.state.best_model_checkpoint = str(second)
        again._load_best_model()
        best, saved = weights(again.accelerator, again.model), load_file(second / weights_file(name))
        best = {n.replace(".default", "").replace(".modules_to_save", ""): x for n, x in best.items()}
        taken = [torch.equal(best[n], x) for n, x in saved.items() if n in best]  # frozen ones are not in `best`
        logs.append({"bitwise": same, "best": len(taken) == len(best) and all(taken)})
    return found, logs


def weights_file(name: str) -> str:
    return "adapter_model.safetensors" if "lora" in name else "model.safetensors"


# --- failures ---------------------------------------------------------------------------------------------------------


def failing_reward(folder: Path) -> None:
    import late_cases

    def reward(prompts, completions):
        if RANK == 1:
            raise ValueError("no score for 'cat'")
        return [0.0] * len(completions)

    late_cases.trainer(folder, value=False, reward=reward, per_device_train_batch_size=2).train()


def fails(owner, name: str, rank: int, error: Exception) -> None:
    """owner.name() raises on process `rank` at its second call."""
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if rank == RANK and len(calls) == 2:
            raise error
        return real(*args, **kwargs)

    setattr(owner, name, failing)


def failing_stages(folder: Path) -> None:
    """In each stage one process fails: writes down what each process raised."""
    from fastppo import checkpoint

    saving, full = {"save_strategy": "steps", "save_steps": 1}, OSError(errno.ENOSPC, "No space left on device")

    def begin(stage: str) -> None:
        trainer, _, where = stage.partition(" ")
        if trainer == "classic":
            made = classic_trainer({})
            fails(checkpoint, "_write_files", 0, full)
            made.save_checkpoint(folder / "classic")
            made.save_checkpoint(folder / "classic")
            return
        more = saving if where == "save" else {}
        run = late_trainer(folder / stage, **more) if trainer == "late" else supervised_trainer(trainer, folder, **more)
        if where == "save":
            fails(run, "_write_model" if trainer == "late" else "_save", 0, full)
        elif where == "rollout":
            fails(run, "rollout", 1, ValueError("no pages"))
        else:
            owner, name = (run.dataloader, "collate_fn") if trainer == "late" else (run, "data_collator")
            fails(owner, name, 1, ValueError("a row without tokens"))
        run.train()

    raised = {}
    for stage in STAGES:
        try:
            begin(stage)
        except (RuntimeError, ValueError) as error:
            raised[stage] = f"{type(error).__name__}: {error}"
    (folder / f"raised.{RANK}.json").write_text(json.dumps(raised))


STAGES = ("late rows", "late rollout", "late save", "sft rows", "sft save", "reward rows", "classic save")


def killed(folder: Path) -> None:
    """Three steps, a checkpoint after each. When it is started first, process 1 is killed before the third."""
    made = classic_trainer(CLASSIC["resume"], True)
    torch.manual_seed(6)
    found = made.load_checkpoint(folder / "run", missing_ok=True)
    for number, batch in enumerate(classic_batches(CLASSIC["resume"], 3)):
        if found is not None and number < found.step:
            continue
        if found is None and number == 2 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with in_order():
            sampled_steps(made, [batch])
        made.save_checkpoint(folder / "run")
    save_file(weights(made.accelerator, made.model), folder / f"killed.{RANK}.safetensors")


def nan_stops(folder: Path) -> None:
    """Gradients of the second update are NaN on the last process: what was raised, and whether weights were touched."""
    from fastppo.score import NonFinite

    run = late_trainer(folder)
    spoil_second_update(run)
    before = {}
    run.rollout = lambda *args, rollout=run.rollout: (
        before.update(weights(run.accelerator, run._wrapper)),
        rollout(*args),
    )[1]
    try:
        run.train()
    except NonFinite as error:
        now = weights(run.accelerator, run._wrapper)
        same = run.state.global_step == 1 and all(torch.equal(now[name], before[name]) for name in now)
        print(f"NonFinite: {error}; weights as before: {same}")


def step_after(what, seconds: float, folder: Path) -> None:
    """One step, then what() on process 1, then another. seconds: the time-out. folder/ended: process 0 has failed."""
    made = classic_trainer({"config": {"ddp_timeout": seconds}})
    for batch in classic_batches({}):
        queries, responses, scores, _ = ([part[r] for r in own_rows(MINI)] if part else None for part in batch)
        try:
            made.step(queries, responses, scores)
        except RuntimeError:
            (folder / "ended").touch()
            raise
        if RANK == 1:
            what()


def wait_for_the_end(folder: Path) -> None:
    """Until process 0 has given up."""
    while not (folder / "ended").exists():
        time.sleep(0.1)


DETERMINISTIC = {"deterministic": deterministic_classic, "late_deterministic": deterministic_late}
FAILURES = {
    "failing_stages": failing_stages,
    "nan_stops": nan_stops,
    "failing_reward": failing_reward,
    "killed": killed,
    "late_process": lambda folder: step_after(lambda: wait_for_the_end(folder), 10.0, folder),
}


def run_case(name: str, folder: Path) -> None:
    if name in FAILURES:
        FAILURES[name](folder)
        return
    if name in CLASSIC:
        run = resumed if name.startswith("resume") else classic
    else:
        run = DETERMINISTIC.get(name, late if name.startswith("late") else supervised)
    with in_order(), evens_first():
        found, logs = run(name, folder)
    save_file(found, folder / f"{name}.{RANK}.safetensors")
    (folder / f"{name}.{RANK}.json").write_text(json.dumps(logs))


def main() -> None:
    folder, names, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if ZERO:
        ask_for_deepspeed(ZERO)
    elif rest:
        cpu_fsdp2()
    if rest == ["fsdp2"]:
        ask_for_fsdp2()
    for name in names.split(","):
        run_case(name, Path(folder))
    if WORLD > 1:
        shared = host_group.of_world(torch.device("cpu")) is not None
        (Path(folder) / f"shared_memory.{RANK}.json").write_text(json.dumps(shared))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
