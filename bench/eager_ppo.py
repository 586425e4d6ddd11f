"""The baseline of gpu_loop.py: one PPO iteration written the plain way that TRL's classic trainer has, from the paper's formulas.

Prompts of one length; model.generate; policy and frozen reference read the padded batch in micro-batches and keep [tokens, vocabulary]
logits; log_softmax + gather; a Python loop for GAE; whitening; ppo_epochs over mini-batches with clipped policy and value losses. bf16
autocast over float32 master weights, Adam. No kernels of ours. Suffixes: B sequences, T response tokens, L prompt + response, V vocabulary.
"""

import time

import torch
from torch import nn


class EagerPPO:
    """model: a transformers causal LM (trained), reference: its frozen copy, or None where `model` has adapters to switch off."""

    def __init__(
        self, model, reference, *, learning_rate=1e-5, mini_batch=4, epochs=4, kl_coef=0.2, gamma=1.0, lam=0.95
    ):
        self.model, self.reference = model, reference
        self.value_head = nn.Linear(model.config.hidden_size, 1, device=model.device)
        trained = [p for p in (*model.parameters(), *self.value_head.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=learning_rate)
        self.mini_batch, self.epochs, self.kl_coef, self.gamma, self.lam = mini_batch, epochs, kl_coef, gamma, lam

    def autocast(self):
        return torch.autocast(self.model.device.type, torch.bfloat16)

    def generate(self, prompts_BP: torch.Tensor, new: int) -> torch.Tensor:
        with torch.no_grad(), self.autocast():
            options = dict(do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
            mask = torch.ones_like(prompts_BP)
            return self.model.generate(input_ids=prompts_BP, attention_mask=mask, max_new_tokens=new, **options)

    def read(self, model, tokens_BL: torch.Tensor, T: int, values: bool):
        """Log-probs [B, T] of the response tokens, and values [B, T]."""
        with self.autocast():
            out = model(input_ids=tokens_BL, use_cache=False, output_hidden_states=values)
        logp_BTV = out.logits[:, -T - 1 : -1].float().log_softmax(-1)
        logprobs_BT = logp_BTV.gather(-1, tokens_BL[:, -T:, None])[..., 0]
        if not values:
            return logprobs_BT, None
        return logprobs_BT, self.value_head(out.hidden_states[-1][:, -T - 1 : -1].float())[..., 0]

    @torch.no_grad()
    def prepare(self, tokens_BL: torch.Tensor, T: int, scores_B: torch.Tensor):
        old, values, reference = [], [], []
        for part_bL in tokens_BL.split(self.mini_batch):
            logprobs_bT, values_bT = self.read(self.model, part_bL, T, True)
            old.append(logprobs_bT)
            values.append(values_bT)
            if self.reference is None:
                with self.model.disable_adapter():
                    reference.append(self.read(self.model, part_bL, T, False)[0])
            else:
                reference.append(self.read(self.reference, part_bL, T, False)[0])
        old_BT, values_BT, reference_BT = (torch.cat(x) for x in (old, values, reference))
        rewards_BT = -self.kl_coef * (old_BT - reference_BT)
        rewards_BT[:, -1] += scores_B
        advantages_BT, after_B, next_B = (
            torch.zeros_like(values_BT),
            torch.zeros_like(scores_B),
            torch.zeros_like(scores_B),
        )
        for t in reversed(range(T)):
            after_B = rewards_BT[:, t] + self.gamma * next_B - values_BT[:, t] + self.gamma * self.lam * after_B
            advantages_BT[:, t], next_B = after_B, values_BT[:, t]
        returns_BT = advantages_BT + values_BT
        advantages_BT = (advantages_BT - advantages_BT.mean()) * (advantages_BT.var() + 1e-8).rsqrt()
        return old_BT, values_BT, advantages_BT, returns_BT

    def optimise(self, tokens_BL: torch.Tensor, T: int, data) -> None:
        for _ in range(self.epochs):
            for rows in torch.randperm(len(tokens_BL), device=tokens_BL.device).split(self.mini_batch):
                old_bT, old_values_bT, advantages_bT, returns_bT = (x[rows] for x in data)
                logprobs_bT, values_bT = self.read(self.model, tokens_BL[rows], T, True)
                ratio_bT = (logprobs_bT - old_bT).exp()
                policy = torch.maximum(-advantages_bT * ratio_bT, -advantages_bT * ratio_bT.clamp(0.8, 1.2)).mean()
                clipped_bT = torch.clamp(values_bT, old_values_bT - 0.2, old_values_bT + 0.2)
                value = 0.5 * torch.maximum((values_bT - returns_bT) ** 2, (clipped_bT - returns_bT) ** 2).mean()
                self.optimizer.zero_grad(set_to_none=True)
                (policy + 0.1 * value).backward()
                self.optimizer.step()

    def iteration(self, prompts_BP: torch.Tensor, new: int, scores_B: torch.Tensor) -> dict[str, float]:
        """Seconds of the three stages."""
        times, seconds = [self._now()], {}
        tokens_BL = self.generate(prompts_BP, new)
        times.append(self._now())
        data = self.prepare(tokens_BL, new, scores_B)
        times.append(self._now())
        self.optimise(tokens_BL, new, data)
        times.append(self._now())
        for name, begin, end in zip(("generate", "prepare", "optimise"), times[:-1], times[1:], strict=True):
            seconds[name] = end - begin
        return seconds

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
