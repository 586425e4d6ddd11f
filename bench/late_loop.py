"""The late trainer's whole loop, under fastppo or under TRL 1.12.0 (in its own environment): tokens/s, memory, curve.

    python bench/late_loop.py speed fastppo --value-head --steps 6
    python bench/late_loop.py speed trl --ragged                      # with trl==1.12.0 installed
    python bench/late_loop.py learn fastppo ../shared/models/stories260K --seed 1

`speed`: GPT-2 of 4.6 M parameters, prompts of 32 tokens, responses of 64, batch 16 in 4 mini-batches, 4 epochs.
`learn`: stories260K, reward = happy words minus sad words. One JSON object is printed.
"""

import argparse
import importlib
import json
import os
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
HAPPY = set(
    [
        "happy",
        "happily",
        "smile",
        "smiled",
        "smiling",
        "laugh",
        "laughed",
        "fun",
        "love",
        "loved",
        "loves",
        "joy",
        "excited",
        "glad",
        "good",
        "nice",
        "kind",
    ]
)
HAPPY |= {"friend", "friends", "played", "play"}
SAD = set(
    [
        "sad",
        "sadly",
        "cry",
        "cried",
        "crying",
        "angry",
        "mad",
        "scared",
        "afraid",
        "hurt",
        "bad",
        "mean",
        "lost",
        "no",
        "not",
    ]
)
OPENINGS = ["Once upon a time", "One day", "Lily", "Tom and his mom", "The little dog", "A big bear", "The cat"]
OPENINGS += ["There was a boy named Tim", "The sun", "In the park", "Mom said", "Sara had a toy"]
STOP, VOCABULARY = 3, 5000


def happiness(text: str) -> float:
    words = re.findall(r"[a-z]+", text.lower())
    return max(-3.0, min(3.0, float(sum(w in HAPPY for w in words) - sum(w in SAD for w in words))))


class WordReward(nn.Module):
    """TRL takes reward models only: a "backbone" that writes the text's score at every position, and no head."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer):
        super().__init__()
        self.backbone, self.score = WordBackbone(tokenizer), nn.Identity()


class WordBackbone(nn.Module):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, input_ids, attention_mask=None, **_):
        rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        scores = torch.tensor([happiness(text) for text in self.tokenizer.batch_decode(rows)])
        states = scores[:, None, None].expand(*input_ids.shape, 1)
        return argparse.Namespace(hidden_states=[states])


class Clock(TrainerCallback):
    """Wall and CPU seconds of each update but the first, which warms up."""

    def __init__(self):
        self.marks = []

    def on_step_end(self, *_, **__):
        self.marks.append((time.perf_counter(), time.process_time()))

    def seconds(self, which: int) -> list[float]:
        return [b[which] - a[which] for a, b in zip(self.marks, self.marks[1:], strict=False)]


def tiny_tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token=f"w{STOP}", unk_token="w1")


def tiny(kind, ragged: bool, seed: int):
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=512, n_embd=256, n_layer=4, n_head=4, pad_token_id=0)
    config.num_labels, config.bos_token_id, config.eos_token_id = 1, 1, STOP
    torch.manual_seed(seed)
    model = kind(config)
    if ragged:  # the stop token gets a probability of about 1/36 at every position
        with torch.no_grad():
            direction = nn.functional.normalize(torch.randn(256), dim=0)
            model.transformer.ln_f.bias.copy_(direction)
            model.transformer.wte.weight[STOP] = 4.9 * direction
    return model


def speed(options) -> dict:
    module = importlib.import_module(f"{options.package}.experimental.ppo")
    more = {} if options.package == "trl" else {"gradient_checkpointing": False}
    args = module.PPOConfig(
        output_dir="/tmp/late_loop", report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, gradient_accumulation_steps=4, num_mini_batches=4 if options.package != "trl" else 1,
        num_ppo_epochs=4, total_episodes=16 * (options.steps + 1), response_length=64, num_sample_generations=0,
        temperature=1.0, stop_token="eos" if options.ragged else None, **more,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(4, VOCABULARY, (64, 32), generator=draw).tolist()
    clock, before_mb = Clock(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    shared = options.value_head and options.package != "trl"
    trainer = module.PPOTrainer(
        args=args,
        processing_class=tiny_tokenizer(),
        model=tiny(GPT2LMHeadModel, options.ragged, 0),
        ref_model=tiny(GPT2LMHeadModel, options.ragged, 0),
        reward_model=tiny(GPT2ForSequenceClassification, False, 2),
        value_model=None if shared else tiny(GPT2ForSequenceClassification, False, 1),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        eval_dataset=Dataset.from_list([{"input_ids": row} for row in rows[:2]]),
        callbacks=[clock],
    )
    trainer.train()
    tokens = 16 * (64 if not options.ragged else 30.4)  # 30.4: mean of min(geometric(1/36), 64)
    wall, cpu = clock.seconds(0), clock.seconds(1)
    rate = tokens / statistics.median(wall)
    return {"tokens_per_s": rate, "wall_s": wall, "cpu_s": cpu, "imports_mb": before_mb}


def learn(options) -> dict:
    module = importlib.import_module(f"{options.package}.experimental.ppo")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    args = module.PPOConfig(
        output_dir="/tmp/late_loop", report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=32, gradient_accumulation_steps=1, num_mini_batches=4, num_ppo_epochs=4,
        total_episodes=32 * options.steps, response_length=48, num_sample_generations=0, temperature=1.0,
        learning_rate=3e-4, lr_scheduler_type="constant", kl_coef=0.05, seed=options.seed, stop_token="eos", logging_steps=1,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(options.seed)
    picks = torch.randint(len(OPENINGS), (512,), generator=draw).tolist()
    rows = [{"input_ids": [1, *tokenizer.encode(OPENINGS[i], add_special_tokens=False)]} for i in picks]
    load = AutoModelForCausalLM.from_pretrained
    torch.manual_seed(options.seed)
    value = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1)
    reward = WordReward(tokenizer)
    if options.package != "trl":
        reward = lambda prompts, completions: [happiness(p + c) for p, c in zip(prompts, completions, strict=True)]  # noqa: E731
    trainer = module.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=load(options.model),
        ref_model=load(options.model),
        reward_model=reward,
        value_model=None if options.value_head and options.package != "trl" else value,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
    )
    began = time.time()
    trainer.train()
    scores = [line["objective/scores"] for line in trainer.state.log_history if "objective/scores" in line]
    kl = [line["objective/kl"] for line in trainer.state.log_history if "objective/kl" in line]
    means = {"first5": sum(scores[:5]) / 5, "last5": sum(scores[-5:]) / 5, "kl": kl[-1]}
    return {**means, "seconds": time.time() - began, "scores": scores, "kls": kl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "learn"))
    parser.add_argument("package", choices=("fastppo", "trl"))
    parser.add_argument("model", nargs="?", help="folder of stories260K, for learn")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ragged", action="store_true", help="responses end after 1 to 64 tokens")
    parser.add_argument("--value-head", action="store_true", help="fastppo: one backbone with a value head")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    result = (speed if options.what == "speed" else learn)(options)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({**vars(options), **result, "peak_mb": peak_mb, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
