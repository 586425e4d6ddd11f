"""Runs of the trainers over transformers.Trainer that save after every step, for tests of stopping and going on."""

from datasets import Dataset
from sft_cases import make_model, make_tokenizer, rows

from fastppo import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastppo.experimental.ppo import PPOConfig, PPOTrainer

COMMON = dict(
    use_cpu=True, report_to="none", save_strategy="steps", save_steps=1, save_total_limit=2, disable_tqdm=True
)
COMMON |= dict(per_device_train_batch_size=4, learning_rate=1e-2, seed=7)


def words(prompts, completions):
    return [float(len(set(text.split()))) for text in completions]


def build(kind: str, folder: str, evaluate: bool = False, **options):
    """A trainer of 12 optimizer steps ("sft", "reward") or 5 updates ("ppo"), with a checkpoint after each."""
    if kind == "ppo":
        data = Dataset.from_list([{"text": row["text"]} for row in rows("text")])
        own = dict(total_episodes=40, response_length=5, num_sample_generations=0, num_mini_batches=2)
        args = PPOConfig(**{"output_dir": folder, **COMMON, **own, **options})
        models = dict(model=make_model(), ref_model=None, reward_model=words, value_model=make_model("reward", 1))
        return PPOTrainer(args=args, processing_class=make_tokenizer(), train_dataset=data, **models)
    config, trainer = (SFTConfig, SFTTrainer) if kind == "sft" else (RewardConfig, RewardTrainer)
    own = dict(max_steps=12, gradient_accumulation_steps=2)
    args = config(**{"output_dir": folder, **COMMON, **own, **options})
    model = make_model("causal" if kind == "sft" else "reward")
    data = Dataset.from_list(rows("text" if kind == "sft" else "pairs"))
    held_out = data if evaluate else None
    return trainer(model, args, train_dataset=data, eval_dataset=held_out, processing_class=make_tokenizer())
