"""The model card that travels with a saved policy."""

import os

CARD = """---
license: apache-2.0
library_name: fastppo
tags:
- fastppo
- ppo
- transformers
- reinforcement-learning
---

# {name}

This is a language model fine-tuned with reinforcement learning (PPO) by
fastppo. It generates text like any transformers model, and the value head that
was trained with it is in the checkpoint.

## Use

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{model_id}")
outputs = generator("Hello, my llama is cute")
```

With the value head:

```python
from transformers import AutoTokenizer
from fastppo import {wrapper}

tokenizer = AutoTokenizer.from_pretrained("{model_id}")
model = {wrapper}.from_pretrained("{model_id}")
logits, loss, values = model(**tokenizer("Hello, my llama is cute", return_tensors="pt"))
```
"""


def write_card(path: str, model_name: str, wrapper: str) -> None:
    """README.md in `path` (made when absent)."""
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
        file.write(CARD.format(name=model_name, model_id=path, wrapper=wrapper))
