"""Small runs of the late PPOTrainer that several test files build."""

from sft_cases import make_model, make_tokenizer, sentences

from fastppo.experimental.ppo import PPOConfig, PPOTrainer


def prompts(count: int = 16) -> list[dict]:
    tokenizer = make_tokenizer()
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in sentences(count, 1)]


def trainer(tmp_path, *, value=True, reward=None, ref_model=None, data=None, evaluate=None, policy=None, **options):
    from datasets import Dataset

    args = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    args |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, response_length=6, total_episodes=16)
    args |= dict(learning_rate=1e-3, num_sample_generations=0, temperature=0.9)
    more = {
        name: options.pop(name)
        for name in ("peft_config", "callbacks", "optimizers", "data_collator")
        if name in options
    }
    return PPOTrainer(
        args=PPOConfig(**(args | options)),
        processing_class=make_tokenizer(),
        model=policy or make_model(),
        ref_model=ref_model,
        reward_model=make_model("reward", 2) if reward is None else reward,
        value_model=make_model("reward", 1) if value else None,
        train_dataset=Dataset.from_list(prompts() if data is None else data),
        eval_dataset=None if evaluate is None else Dataset.from_list(evaluate),
        **more,
    )


def words(text: str, word: str) -> float:
    return float(text.split().count(word))
