"""The late trainer's loop under fastppo or TRL 1.12.0 (in its own environment): a worker of bench_late_loop.py, and curves.

    python bench/late_loop.py speed fastppo '{"value_head": true}'    reads a line, makes an update, writes a JSON line
    python bench/late_loop.py learn trl ../shared/models/stories260K --seed 1

`speed`: GPT-2 of 4.6 M parameters, prompts of 32 tokens, responses of 64, batch 16 in 4 mini-batches, 4 epochs.
`learn`: stories260K, reward = happy words minus sad words; one JSON object at the end.
"""

import argparse
import importlib
import json
import os
import re
import resource
import sys
import tempfile
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
BATCH, RESPONSE = 16, 64  # of `speed`, where no response ends early


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


class InTurn(TrainerCallback):
    """Reads a line from standard input before each update, and writes its wall seconds and the peak memory after it."""

    def __init__(self, out, imports_mb: float):
        self.out, self.imports_mb, self.began = out, imports_mb, 0.0

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self.began = time.perf_counter()

    def on_train_begin(self, *_, **__):
        self.wait()

    def on_step_end(self, *_, **__):  # TRL's loop calls no on_step_begin
        found = {"wall_s": time.perf_counter() - self.began, "peak_mb": peak_mb(), "imports_mb": self.imports_mb}
        found["tokens"] = BATCH * RESPONSE
        print(json.dumps(found), file=self.out, flush=True)
        self.wait()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tiny_tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token=f"w{STOP}", unk_token="w1")


def tiny(kind, ragged: bool, seed: int):
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=512, n_embd=256, n_layer=4, n_head=4, pad_token_id=0)
    config.num_labels, config.bos_token_id, config.eos_token_id = 1, 1, STOP
    torch.manual_seed(seed)
    model = kind(config)
    if (
        ragged
    ):  # the head reads 1 in dimension 0, so that the stop token has a probability of about 1/40 at every position
        with torch.no_grad():
            model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
            model.transformer.wte.weight[STOP] = 0.0
            model.transformer.wte.weight[STOP, 0] = 4.9
    return model


def speed(package: str, spec: dict) -> None:
    """spec: value_head (fastppo alone), ragged, threads, config (more of PPOConfig)."""
    torch.set_num_threads(spec.get("threads", 2))
    module = importlib.import_module(f"{package}.experimental.ppo")
    ours, ragged = package != "trl", spec.get("ragged", False)
    args = module.PPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, gradient_accumulation_steps=BATCH // 4, num_mini_batches=4 if ours else 1,
        num_ppo_epochs=4, total_episodes=BATCH * 1000, response_length=RESPONSE, num_sample_generations=0,
        temperature=1.0, stop_token="eos" if ragged else None, **({"gradient_checkpointing": False} if ours else {}),
        **spec.get("config", {}),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(4, VOCABULARY, (64, 32), generator=draw).tolist()
    imports_mb = peak_mb()
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    trainer = module.PPOTrainer(
        args=args,
        processing_class=tiny_tokenizer(),
        model=tiny(GPT2LMHeadModel, ragged, 0),
        ref_model=tiny(GPT2LMHeadModel, ragged, 0),
        reward_model=tiny(GPT2ForSequenceClassification, False, 2),
        value_model=None if spec.get("value_head") else tiny(GPT2ForSequenceClassification, False, 1),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        eval_dataset=Dataset.from_list([{"input_ids": row} for row in rows[:2]]),
        callbacks=[InTurn(out, imports_mb)],
    )
    trainer.train()


def learn(options) -> dict:
    module = importlib.import_module(f"{options.package}.experimental.ppo")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    args = module.PPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
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
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if sys.argv[1:2] == ["speed"]:
        return speed(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn",), help="speed is told by a program: see bench_late_loop.py")
    parser.add_argument("package", choices=("fastppo", "trl"))
    parser.add_argument("model", help="folder of stories260K")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--value-head", action="store_true", help="fastppo: one backbone with a value head")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps({**vars(options), **learn(options), "peak_mb": peak_mb(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
