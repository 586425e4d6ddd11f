"""One process of test_distributed.py: two PPO steps on its half of the batches; prints what must be alike everywhere."""

import json
import sys
import warnings

import golden_cases
import torch

import fastppo

warnings.simplefilter("ignore")
torch.set_num_threads(1)
path, spoil = sys.argv[1:]
options = {"accelerator_kwargs": {"cpu": True}, "on_nonfinite": "skip"}
made = golden_cases.trainer(fastppo, {}, packed=path == "packed", **options)
rank, count = made.accelerator.process_index, made.accelerator.num_processes
for number, (queries, responses, scores, _) in enumerate(list(golden_cases.batches({}, 2 * count))[rank::count]):
    if spoil == "nan" and rank == 1 and number == 1:
        scores[0] = torch.tensor(float("nan"))
    stats = made.step(queries, responses, scores)
total = sum(float(p.detach().double().sum()) for p in made.model.parameters())
result = {"rank": rank, "path": type(made._path).__name__, "parameters": total, "loss": stats.get("ppo/loss/total")}
print("RESULT " + json.dumps(result), flush=True)
