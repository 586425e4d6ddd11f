"""Detoxification: continue prompts that invite toxic text without any, rewarded by a hate-speech classifier.

    python examples/detoxification.py --model EleutherAI/gpt-neo-125m    # RealToxicityPrompts, RoBERTa: network
    python examples/detoxification.py --offline --steps 20               # sad words stand for toxic ones

The classic API, with an adaptive KL coefficient and a reference that shares the lower layers.
"""

import argparse
import random
import tempfile

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model


def real_inputs(options):
    """(model name, prompts, texts -> how harmless each is)"""
    from datasets import load_dataset

    rows = load_dataset("allenai/real-toxicity-prompts", split="train")
    toxic = [row["prompt"]["text"] for row in rows if (row["prompt"]["toxicity"] or 0) > 0.3]
    judge_name = "facebook/roberta-hate-speech-dynabench-r4-target"
    tokenizer = AutoTokenizer.from_pretrained(judge_name)
    judge = AutoModelForSequenceClassification.from_pretrained(judge_name).eval()

    @torch.no_grad()
    def harmlessness(texts):
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return judge(**inputs).logits[:, 0].tolist()  # label 0: no hate

    return options.model, toxic, harmlessness


def offline_inputs(folder):
    from offline import language_model, stories

    from fastppo.cli.stories import SAD_WORDS

    pairs = stories()
    model = language_model(folder, [f"{opening} {rest}" for opening, rest in pairs])
    return model, [o for o, _ in pairs], lambda texts: [-float(len(SAD_WORDS & set(t.lower().split()))) for t in texts]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--model", default="EleutherAI/gpt-neo-125m")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-shared-layers", type=int, default=1)
    parser.add_argument("--output-dir", default="detoxified")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        name, prompts, harmlessness = offline_inputs(folder) if options.offline else real_inputs(options)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    reference = create_reference_model(model, num_shared_layers=options.num_shared_layers)
    rate = 5e-4 if options.offline else 1.41e-5
    config = PPOConfig(batch_size=options.batch_size, mini_batch_size=8, learning_rate=rate, max_grad_norm=1.0)
    trainer = PPOTrainer(config, model, reference, tokenizer)
    draw, history = random.Random(0), []
    sampling = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 30,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for step in range(options.steps):
        batch = draw.choices(prompts, k=options.batch_size)
        queries = [tokenizer(text, return_tensors="pt").input_ids[0].to(trainer.current_device) for text in batch]
        responses = trainer.generate(queries, return_prompt=False, **sampling)
        scores = harmlessness(tokenizer.batch_decode(responses, skip_special_tokens=True))
        stats = trainer.step(queries, list(responses), [torch.tensor(float(score)) for score in scores])
        history.append(sum(scores) / len(scores))
        print(f"step {step + 1}: harmlessness {history[-1]:.2f}, KL {stats['objective/kl']:.2f}", flush=True)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    return history


if __name__ == "__main__":
    main()
