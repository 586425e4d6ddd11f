"""Verifiable rewards: word problems whose answers a checker can check; no reward model.

    python examples/word_problems.py --data gsm8k-test.jsonl --model Qwen/Qwen3-0.6B          # network
    python examples/word_problems.py --offline --episodes 640

--data: one {"question", "answer"} per line, the answer ending in "#### number" as in GSM8K. The answer column reaches the
checker by its name.
"""

import argparse
import re
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.experimental.ppo import PPOConfig, PPOTrainer

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
INSTRUCTION = "\nThink step by step, then write the answer as: #### number"


def final_number(text: str) -> float | None:
    """The number after the last ####, else the last number of the text, None without any."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found = NUMBER.findall(marked)
    if not found:
        return None
    return float((found[0] if "####" in text else found[-1]).replace(",", ""))


def is_right(prompts, completions, answer):
    """1 for the right number, 0 else; a tenth for a wrong one that was marked as asked."""
    scores = []
    for text, wanted in zip(completions, answer, strict=True):
        given = final_number(text)
        right = given is not None and abs(given - final_number(wanted)) < 1e-6
        scores.append(1.0 if right else 0.1 * ("####" in text))
    return scores


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--output-dir", default="word-problems")
    options = parser.parse_args(argv)
    if not (options.offline or options.data):
        parser.error("one of --offline and --data is needed")
    from offline import END, language_model, read_jsonl, sums

    with tempfile.TemporaryDirectory() as folder:
        rows = sums() if options.offline else read_jsonl(options.data)
        if options.offline:  # it has seen problems with answers, a third of them wrong
            texts = [f"{row['question']} {row['answer'] if i % 3 else 'I guess #### 4'}" for i, row in enumerate(rows)]
            name = language_model(folder, [text + END for text in texts], steps=300)
        else:
            name = options.model
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    instruction = "" if options.offline else INSTRUCTION
    data = [
        {"prompt": [{"role": "user", "content": row["question"] + instruction}], "answer": row["answer"]}
        for row in rows
    ]
    args = {
        "output_dir": options.output_dir,
        "learning_rate": 5e-4 if options.offline else 1e-6,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 4,
        "response_length": 20 if options.offline else 512,
        "total_episodes": options.episodes,
        "temperature": 1.0,
        "kl_coef": 0.01,
        "stop_token": "eos",
        "num_sample_generations": 0,
        "report_to": "none",
        "save_steps": 100,
    }
    trainer = PPOTrainer(
        args=PPOConfig(**args),
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=is_right,
        value_model=None,
        train_dataset=Dataset.from_list(data),
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    return [line["objective/scores"] for line in trainer.state.log_history if "objective/scores" in line]


if __name__ == "__main__":
    main()
