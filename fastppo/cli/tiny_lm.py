"""A language model small enough to be trained in seconds: the demo's starting point."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

END, PAD = "<|end|>", "<|pad|>"


def train_tokenizer(texts: Sequence[str], vocab_size: int = 640) -> Any:
    """A byte-level BPE tokenizer of the corpus: almost every word of it becomes one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left")


def new_model(tokenizer: Any, hidden: int = 96, layers: int = 2) -> Any:
    """A Llama of about 0.25 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_language_model(
    model: Any, tokenizer: Any, texts: Sequence[str], steps: int, seed: int, on_step: Callable[[int, float], None]
) -> None:
    """Next-token prediction on random windows of the corpus; `on_step(step, loss in nats per token)`."""
    window, batch, peak_lr = 64, 32, 3e-3
    stream_N = torch.tensor([token for ids in tokenizer([t + END for t in texts]).input_ids for token in ids])
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=max(steps, 2), pct_start=0.1)
    model.train()
    for step in range(1, steps + 1):
        starts_B = torch.randint(len(stream_N) - window, (batch, 1), generator=draw)
        tokens_BT = stream_N[starts_B + torch.arange(window)].to(model.device)
        loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step, loss.item())
    model.eval()
