"""The runs that test_plan.py measures: a PPO step of a new model each, and the most memory they take.

python plan_worker.py FOLDER '{"name": {"model": ["gpt2", {...}], ...}, ...}'      writes FOLDER/name.json: {"peak": bytes}
A process of its own that never trains: it forks each run (two for two processes), so that a run costs no imports.
"""

import json
import os
import socket
import sys
import traceback
import warnings
from pathlib import Path

import distributed_layouts
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fastppo
from fastppo.trainer import engines

warnings.filterwarnings("ignore")


def tokenizer(vocabulary: int):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)} | {"</s>": vocabulary}  # no response ends early
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="w0", unk_token="w1")


def trainer(case: dict):
    kind, sizes = case["model"]
    model, extra = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)), {}
    if case.get("lora_rank"):
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=case["lora_rank"], task_type="CAUSAL_LM")
    policy = fastppo.AutoModelForCausalLMWithValueHead.from_pretrained(model, **extra)
    if not case.get("engine", True):
        engines.engine_for = lambda *_: "this case measures the model's own modules"
    options = {"learning_rate": 1e-5, "ppo_epochs": 2, "accelerator_kwargs": {"cpu": True}} | case["config"]
    return fastppo.PPOTrainer(fastppo.PPOConfig(**options), policy, None, tokenizer(sizes["vocab_size"]))


def steps(case: dict) -> None:
    """A rollout and a step of two epochs: the second has the optimizer's state."""
    made, (prompt, response) = trainer(case), case["lengths"]
    vocabulary = case["model"][1]["vocab_size"]
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "eos_token_id": -1}
    queries = [torch.randint(1, vocabulary, (prompt,)) for _ in range(made.config.batch_size)]
    answers = made.generate(queries, return_prompt=False, max_new_tokens=response, **options)
    made.step(queries, answers, [torch.randn(()) for _ in answers])


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(case: dict) -> int:
    if case.get("strategy") == "fsdp":
        distributed_layouts.cpu_fsdp2()
        distributed_layouts.ask_for_fsdp2()
    small = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 1}
    warm = {"model": ["gpt2", small], "config": {"batch_size": 2, "mini_batch_size": 2}, "lengths": [4, 4]}
    steps(case | warm)  # what libraries load and allocate for themselves
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    steps(case)
    return status("VmHWM") - before


def start(case: dict, place: Path, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    failed = 1
    try:
        torch.set_num_threads(1)
        if case.get("strategy"):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ |= {name: str(x) for name, x in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
        peak = measure(case)
        if rank == 0:
            place.write_text(json.dumps({"peak": peak}))
        failed = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(failed)


def main(folder: Path, cases: dict[str, dict]) -> int:
    failed = 0
    for name, case in cases.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [start(case, folder / f"{name}.json", rank, port) for rank in range(1 + ("strategy" in case))]
        failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in ranks)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
