"""RLHF of a chat model with LoRA alone: one copy of the weights is policy, reference (adapter off) and value backbone.

    python examples/lora_chat.py --model Qwen/Qwen3-0.6B --reward-model SOME/reward-model     # network
    python examples/lora_chat.py --offline --episodes 320

The prompts are conversations. The reward model scores text of its own tokenizer; offline, happy words are counted.
"""

import argparse
import tempfile

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastppo.experimental.ppo import PPOConfig, PPOTrainer


def judge(name: str):
    """A reward function around a classifier with a tokenizer and a chat template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, dtype="auto", device_map="auto"
    ).eval()

    @torch.no_grad()
    def reward(prompts, completions, messages):
        texts = [
            tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
            for turns, answer in zip(messages, completions, strict=True)
        ]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        return model(**inputs).logits[:, 0].float()

    return reward


def offline_inputs(folder: str):
    from offline import language_model, stories

    from fastppo.cli.stories import happiness

    pairs = stories()
    rows = [{"messages": [{"role": "user", "content": opening}]} for opening, _ in pairs]
    model = language_model(folder, [f"{opening} {rest}" for opening, rest in pairs])
    return model, rows, lambda prompts, completions: [happiness(text) for text in completions]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--reward-model", default="Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback-prompt")
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--output-dir", default="lora-chat")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if options.offline:
            name, rows, reward = offline_inputs(folder)
            data = Dataset.from_list(rows)
        else:
            name, reward = options.model, judge(options.reward_model)
            data = load_dataset(options.dataset, split="train").rename_column("prompt", "messages")
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    small = {"learning_rate": 3e-3, "response_length": 32, "kl_coef": 0.05} if options.offline else {}
    args = {
        "output_dir": options.output_dir,
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 4,
        "response_length": 512,
        "total_episodes": options.episodes,
        "temperature": 1.0,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "num_sample_generations": 0,
        "report_to": "none",
        "save_steps": 100,
    }
    trainer = PPOTrainer(
        args=PPOConfig(**(args | small)),
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=reward,
        value_model=None,
        train_dataset=data,
        peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    return [line["objective/scores"] for line in trainer.state.log_history if "objective/scores" in line]


if __name__ == "__main__":
    main()
