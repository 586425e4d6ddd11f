"""What the stages hand to each other: prompts -> Rollout -> scores -> Experience -> update.

Suffixes: B sequences, T response tokens (longest in the batch), N packed tokens (prompt + response of every sequence,
one after the other, no padding), R response tokens of all sequences in packed order.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rollout:
    """Responses sampled for B prompts.

    prompts: B 1-D int64 tensors.
    tokens_BT: int64, responses, right-padded with the pad token.
    mask_BT: bool, True on response tokens (the end-of-sequence token counts, padding does not).
    logprobs_BT: float32, log-prob in nats of each token under the policy itself (raw logits / logprob_temperature),
        which PPO uses as old log-prob; 0 where mask_BT is False.
    sampled_logprobs_BT: the same under the distribution that was sampled from (temperature, top-k, ... applied).
    values_BT, entropies_BT: float32 or None. value of the position that predicts the token, i.e. before it is read.
    finish_reasons: "eos", "stop" or "length" per sequence.
    """

    prompts: list[torch.Tensor]
    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    logprobs_BT: torch.Tensor
    sampled_logprobs_BT: torch.Tensor
    values_BT: torch.Tensor | None
    entropies_BT: torch.Tensor | None
    finish_reasons: list[str]

    @property
    def responses(self) -> list[torch.Tensor]:
        """B 1-D int64 tensors without padding."""
        return [tokens[mask] for tokens, mask in zip(self.tokens_BT, self.mask_BT, strict=True)]
