"""What PPOConfig.deterministic costs: seconds of generate and step, off and on, in turns; medians and their ratio.

python -m bench.determinism_cost --model MODEL [--rounds 9]
"""

import argparse
import statistics
import time
import warnings

import torch


def trainer(model: str, deterministic: bool):
    from transformers import AutoTokenizer

    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = PPOConfig(batch_size=32, mini_batch_size=8, ppo_epochs=4, learning_rate=1e-5, deterministic=deterministic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPOTrainer(config, AutoModelForCausalLMWithValueHead.from_pretrained(model), None, tokenizer)


def once(made) -> tuple[float, float]:
    queries = [torch.arange(3, 11 + i % 9) for i in range(32)]
    marks = [time.perf_counter()]
    responses = made.generate(queries, return_prompt=False, batch_size=32, max_new_tokens=64, do_sample=True)
    marks.append(time.perf_counter())
    made.step(queries, responses, [r.float().mean() / 500 for r in responses])
    marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    made = {name: trainer(options.model, name == "on") for name in ("off", "on")}
    for each in made.values():
        once(each)
    seconds = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, each in made.items():
            seconds[name].append(once(each))
    for stage, what in enumerate(("generate", "step")):
        off, on = (statistics.median(row[stage] for row in seconds[name]) for name in ("off", "on"))
        print(f"{what}: off {off:.4f} s, on {on:.4f} s, ratio {on / off:.2f} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
