"""One process of test_deepspeed.py: two steps of the classic trainer, ZeRO of a stage or DDP, on its share of the rows.

python deepspeed_worker.py FOLDER STAGE       STAGE 0: DDP.   In the environment: what torchrun sets.
"""

import os
import sys
import warnings
from pathlib import Path

import golden_cases
import torch
from accelerate import PartialState
from distributed_worker import GLOBAL, MINI, RANK, WORLD, classic_batches, in_order, own_rows, plain
from safetensors.torch import save_file

import fastppo


def main(folder: Path, stage: int) -> None:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    PartialState(cpu=True)  # accelerate ignores DeepSpeed where cpu=True is given to the Accelerator itself
    if stage:
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    config = {"packed": False, "whiten_rewards": True, "batch_size": GLOBAL // WORLD, "mini_batch_size": MINI // WORLD}
    config |= {"learning_rate": 3e-4, "accelerator_kwargs": {} if stage else {"cpu": True}}
    with in_order():
        made = golden_cases.trainer(fastppo, {"config": config})
        steps = []
        for queries, responses, scores, _ in classic_batches({}):
            rows = own_rows(MINI)
            steps.append(plain(made.step(*([x[i] for i in rows] for x in (queries, responses, scores)))))
        made.generate(queries, return_prompt=False, do_sample=False, max_new_tokens=4, pad_token_id=0)
    model = fastppo.distributed.bare(made.model)
    names = dict(model.named_parameters())
    found = fastppo.distributed.whole(
        made.accelerator, model, lambda: {n: p.detach().clone().contiguous() for n, p in names.items()}
    )
    for number, stats in enumerate(steps):
        found |= {
            f"step {number} {name}": torch.tensor(x, dtype=torch.float64)
            for name, x in stats.items()
            if isinstance(x, float) and not name.startswith("time/")
        }
    save_file(found, folder / f"{stage}.{RANK}.safetensors")
    made.save_pretrained(str(folder / f"policy{stage}"))
    made.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]))
