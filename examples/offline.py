"""Small inputs for the examples' --offline: a language model trained on the spot, and data of the same kind as the real."""

import json
import random
from pathlib import Path

import torch

from fastppo.cli.stories import corpus
from fastppo.cli.tiny_lm import END, new_model, train_language_model, train_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
)


def language_model(folder: str | Path, texts: list[str], steps: int = 200, seed: int = 0) -> str:
    """A Llama of 0.25 M parameters that has read `texts`, with its tokenizer and a chat template, in `folder`."""
    tokenizer = train_tokenizer(texts)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    train_language_model(model, tokenizer, texts, steps, seed, lambda step, loss: None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def stories(count: int = 2000, seed: int = 0) -> list[tuple[str, str]]:
    """(opening, continuation), as often happy as sad."""
    return corpus(count, seed)


def sums(count: int = 2000, seed: int = 0) -> list[dict]:
    """Word problems of one addition, in GSM8K's format."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(5), draw.randrange(5)
        question = f"Tom has {a} cups and Mia has {b} cups. How many cups do they have?"
        rows.append({"question": question, "answer": f"{a} + {b} = {a + b}\n#### {a + b}"})
    return rows


def read_jsonl(path: str | Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


__all__ = ["END", "language_model", "read_jsonl", "stories", "sums"]
