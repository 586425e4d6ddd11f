"""The whole pipeline on preference pairs: supervised fine-tuning, reward model, PPO against it, and plots of all three.

    python examples/preference_pipeline.py --model stories260K --reviews rt-polarity-train.jsonl --test-reviews rt-polarity-test.jsonl
    python examples/preference_pipeline.py --offline --episodes 320

--reviews: one {"text", "label"} per line; label 1 is preferred over 0. --pairs: one {"prompt", "chosen", "rejected"} per
line. Each stage writes its model to --output-dir; curves.png and results.json stand beside them. A run that was
killed goes on where it was when started again.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from offline import language_model, read_jsonl, stories
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastppo import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastppo.experimental.ppo import PPOConfig, PPOTrainer

PROMPT_WORDS = 5


def review_pairs(path: str, count: int | None) -> list[dict]:
    rows = read_jsonl(path)
    draw = random.Random(0)
    liked, disliked = ([row["text"] for row in rows if row["label"] == label] for label in (1, 0))
    draw.shuffle(liked)
    draw.shuffle(disliked)
    return [{"prompt": "", "chosen": a, "rejected": b} for a, b in zip(liked, disliked, strict=False)][:count]


def story_pairs(count: int, seed: int = 0) -> list[dict]:
    """The same opening with the happier and the sadder of two continuations."""
    from fastppo.cli.stories import happiness

    made = stories(2 * count, seed)
    pairs = []
    for (opening, a), (_, b) in zip(made[::2], made[1::2], strict=True):
        if happiness(a) != happiness(b):
            better, worse = (a, b) if happiness(a) > happiness(b) else (b, a)
            pairs.append({"prompt": opening, "chosen": f" {better}", "rejected": f" {worse}"})
    return pairs


def load_pairs(options) -> tuple[list[dict], list[dict]]:
    """(training pairs, held-out pairs)"""
    if options.offline:
        return story_pairs(1000), story_pairs(150, seed=1)
    pairs = review_pairs(options.reviews, options.count) if options.reviews else read_jsonl(options.pairs)
    if options.test_reviews:
        return pairs, review_pairs(options.test_reviews, 500)
    cut = len(pairs) * 9 // 10
    return pairs[:cut], pairs[cut:]


def common(options, stage: str, rate: float, **more) -> dict:
    return {
        "output_dir": str(Path(options.output_dir) / stage),
        "learning_rate": rate,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 1,
        "disable_tqdm": True,
        "seed": options.seed,
        "gradient_checkpointing": torch.cuda.is_available(),
        **more,
    }


def fine_tune(options, model: str, tokenizer, pairs: list[dict]) -> SFTTrainer:
    data = Dataset.from_list([{"text": pair["prompt"] + pair["chosen"]} for pair in pairs])
    args = common(options, "sft", options.sft_rate, per_device_train_batch_size=16, num_train_epochs=1, max_length=128)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = SFTTrainer(model=policy, args=SFTConfig(**args), train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    return trainer


def train_reward(options, model: str, tokenizer, pairs: list[dict], held_out: list[dict]) -> RewardTrainer:
    torch.manual_seed(options.seed)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    epochs = {"num_train_epochs": options.reward_epochs, "warmup_steps": 30, "lr_scheduler_type": "cosine"}
    sizes = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64, "max_length": 128}
    args = common(options, "reward", options.reward_rate, eval_strategy="epoch", **epochs, **sizes)
    trainer = RewardTrainer(
        model=classifier,
        args=RewardConfig(**args),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.evaluate()
    trainer.save_model()
    return trainer


def improve(options, tokenizer, reward_model, pairs: list[dict]) -> PPOTrainer:
    prompts = [pair["prompt"] or " ".join(pair["chosen"].split()[:PROMPT_WORDS]) for pair in pairs]
    sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_mini_batches": 4}
    lengths = {"response_length": 40, "total_episodes": options.episodes, "temperature": 1.0, "stop_token": "eos"}
    args = common(options, "ppo", options.ppo_rate, num_sample_generations=3, kl_coef=0.05, **sizes, **lengths)
    trainer = PPOTrainer(
        args=PPOConfig(**args),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(Path(options.output_dir) / "sft"),
        ref_model=None,
        reward_model=reward_model,
        value_model=None,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        eval_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts[:8]]),
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    return trainer


def column(history: list[dict], name: str) -> list[float]:
    return [line[name] for line in history if name in line]


def plot(path: Path, histories: dict[str, list[dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("sft", "loss"), ("reward", "loss"), ("reward", "eval_accuracy")]
    panels += [("ppo", "objective/scores"), ("ppo", "objective/kl"), ("ppo", "policy/entropy_avg")]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (stage, name) in zip(axes.flat, panels, strict=True):
        lines = [line for line in histories[stage] if name in line]
        axis.plot(
            [line["step"] for line in lines], [line[name] for line in lines], marker="." if len(lines) < 8 else ""
        )
        axis.set(title=f"{stage}: {name}", xlabel="step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="a tiny model on generated stories")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B-Base")
    parser.add_argument("--pairs", help='jsonl of {"prompt", "chosen", "rejected"}')
    parser.add_argument("--reviews", help='jsonl of {"text", "label"}')
    parser.add_argument("--test-reviews")
    parser.add_argument("--count", type=int, default=2000, help="pairs made of --reviews")
    parser.add_argument("--episodes", type=int, default=1280)
    parser.add_argument("--sft-rate", type=float, default=5e-4)
    parser.add_argument("--reward-rate", type=float, default=1e-3)
    parser.add_argument("--reward-epochs", type=float, default=2)
    parser.add_argument("--ppo-rate", type=float, default=3e-4)
    parser.add_argument("--output-dir", default="preference-pipeline")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not (options.offline or options.pairs or options.reviews):
        parser.error("one of --offline, --pairs and --reviews is needed")
    folder = Path(options.output_dir)
    pairs, held_out = load_pairs(options)
    base = options.model
    if options.offline:
        base = str(folder / "base")
        if not (folder / "base" / "config.json").is_file():
            language_model(base, [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")])
    tokenizer = AutoTokenizer.from_pretrained(base)
    sft = fine_tune(options, base, tokenizer, pairs)
    reward = train_reward(options, str(folder / "sft"), tokenizer, pairs, held_out)
    ppo = improve(options, tokenizer, reward.model, pairs)
    histories = {"sft": sft.state.log_history, "reward": reward.state.log_history, "ppo": ppo.state.log_history}
    scores = column(histories["ppo"], "objective/scores")
    results = {
        "reward_accuracy_held_out": column(histories["reward"], "eval_accuracy")[-1],
        "score_first_5_updates": sum(scores[:5]) / len(scores[:5]),
        "score_last_5_updates": sum(scores[-5:]) / len(scores[-5:]),
        "kl_last": column(histories["ppo"], "objective/kl")[-1],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(folder / "curves.png", histories)
    print(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
