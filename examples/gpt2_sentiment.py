"""GPT-2 sentiment control: a prompt that starts with [positive] or [negative] is to be continued in that mood.

    python examples/gpt2_sentiment.py                                   # gpt2, IMDB, a DistilBERT classifier: network
    python examples/gpt2_sentiment.py --offline --steps 20              # a tiny model on stories, nothing downloaded

The classic API: generate, score, step.
"""

import argparse
import random
import tempfile

import torch
from transformers import AutoTokenizer, pipeline

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

MOODS = {"[positive]": 1.0, "[negative]": -1.0}


def real_inputs(options):
    """(model name, openings, texts -> how positive each is)"""
    from datasets import load_dataset

    reviews = load_dataset("stanfordnlp/imdb", split="train").shuffle(seed=0).select(range(4000))
    openings = [" ".join(text.split()[:6]) for text in reviews["text"]]
    classifier = pipeline("sentiment-analysis", model="lvwerra/distilbert-imdb", device=0 if options.cuda else -1)

    def positivity(texts):
        outputs = classifier(texts, top_k=None, function_to_apply="none", batch_size=16, truncation=True)
        return [next(x["score"] for x in output if x["label"] == "POSITIVE") for output in outputs]

    return options.model, openings, positivity


def offline_inputs(folder):
    from offline import language_model, stories

    from fastppo.cli.stories import happiness

    pairs = stories()
    # the mood words are in the corpus, without a meaning: PPO has to give them one
    texts = [f"{random.Random(i).choice(list(MOODS))} {a} {b}" for i, (a, b) in enumerate(pairs)]
    return language_model(folder, texts), [opening for opening, _ in pairs], lambda texts: [happiness(t) for t in texts]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output-dir", default="gpt2-sentiment-control")
    options = parser.parse_args(argv)
    options.cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        name, openings, positivity = offline_inputs(folder) if options.offline else real_inputs(options)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rate = 5e-4 if options.offline else 1.41e-5
    config = PPOConfig(batch_size=options.batch_size, mini_batch_size=8, learning_rate=rate, max_grad_norm=1.0)
    trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)
    draw, history = random.Random(0), []
    sampling = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 24,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for step in range(options.steps):
        moods = [draw.choice(list(MOODS)) for _ in range(options.batch_size)]
        prompts = [f"{mood} {draw.choice(openings)}" for mood in moods]
        queries = [tokenizer(prompt, return_tensors="pt").input_ids[0].to(trainer.current_device) for prompt in prompts]
        responses = trainer.generate(queries, return_prompt=False, **sampling)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = [MOODS[mood] * x for mood, x in zip(moods, positivity(texts), strict=True)]
        stats = trainer.step(queries, list(responses), [torch.tensor(score) for score in scores])
        history.append(sum(scores) / len(scores))
        print(f"step {step + 1}: reward {history[-1]:.2f}, KL {stats['objective/kl']:.2f}", flush=True)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    return history


if __name__ == "__main__":
    main()
