"""What the stages hand to each other: prompts -> Rollout -> scores -> Experience -> update.

Suffixes: B sequences, T response tokens (longest in the batch), N packed tokens (prompt + response of every sequence,
one after the other, no padding), R response tokens of all sequences in packed order. In Experience T counts predicted
positions: column t is about token t + 1 of a padded row, T = longest prompt + response - 1.
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


@dataclass(frozen=True)
class Experience:
    """A scored batch, ready to learn from. All [B, T] tensors are float32 and mean something where mask_BT is True.

    queries, responses: B 1-D int64 tensors each.
    inputs: what the padded forward pass takes (input_ids, attention_mask [B, T + 1], ...); None on the packed path.
    mask_BT: bool, response tokens that count (response_masks applied).
    scores_B: after scaling and clipping.   logprobs_BT: old log-probs of the policy, in nats.   values_BT: old values.
    rewards_BT: -beta * KL, plus the score on the last token.   non_score_BT: without the score.   kl_BT: per-token KL.
    advantages_BT: whitened over mask_BT.   returns_BT: advantage before whitening + value.
    from_rollout: whether logprobs_BT and values_BT were taken while sampling.
    """

    queries: list[torch.Tensor]
    responses: list[torch.Tensor]
    inputs: dict[str, torch.Tensor] | None
    mask_BT: torch.Tensor
    scores_B: torch.Tensor
    logprobs_BT: torch.Tensor
    ref_logprobs_BT: torch.Tensor
    values_BT: torch.Tensor
    rewards_BT: torch.Tensor
    non_score_BT: torch.Tensor
    kl_BT: torch.Tensor
    advantages_BT: torch.Tensor
    returns_BT: torch.Tensor
    from_rollout: bool = False
