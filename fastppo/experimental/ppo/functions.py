"""The module functions of TRL's late PPO trainer, for scripts that import them.

Suffixes: B sequences, T tokens.
"""

from typing import Any

import torch
from torch import nn

from fastppo.core import masked_mean, masked_var, masked_whiten

__all__ = [
    "INVALID_LOGPROB",
    "batch_generation",
    "exact_div",
    "forward",
    "generate",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "print_rich_table",
    "truncate_response",
]

INVALID_LOGPROB = 1.0  # no log-prob is above 0: marks places without a token


def exact_div(a: int, b: int, custom_error_message: str = "") -> int:
    """a / b, which must be whole. ValueError with the message otherwise."""
    if a % b:
        raise ValueError(f"{custom_error_message}, inexact division: {a} / {b} = {a / b}")
    return a // b


def truncate_response(stop_token_id: int, pad_token_id: int, responses: torch.Tensor) -> torch.Tensor:
    """`responses` [B, T] with pad_token_id after the first stop_token_id of each row."""
    stops_BT = (responses == stop_token_id).long()
    after_BT = (stops_BT.cumsum(1) - stops_BT) > 0
    return responses.masked_fill(after_BT, pad_token_id)


def padded_inputs(tokens_BT: torch.Tensor, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Mask, positions that start at 0 after left padding, and tokens without padding ids."""
    mask_BT = tokens_BT != pad_token_id
    positions_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens_BT.masked_fill(~mask_BT, 0), "attention_mask": mask_BT, "position_ids": positions_BT}


def forward(model: nn.Module, query_responses: torch.Tensor, pad_token_id: int) -> Any:
    """The model's output, hidden states included, for padded sequences."""
    inputs = padded_inputs(query_responses, pad_token_id)
    return model(**inputs, return_dict=True, output_hidden_states=True)


def generate(
    lm_backbone: nn.Module, queries: torch.Tensor, pad_token_id: int, generation_config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries and responses [B, T], the logits of each response token [B, T', V]) for left-padded queries."""
    mask_BT = queries != pad_token_id
    output = lm_backbone.generate(
        input_ids=queries.masked_fill(~mask_BT, 0),
        attention_mask=mask_BT,
        generation_config=generation_config,
        return_dict_in_generate=True,
        output_scores=True,
    )
    responses = output.sequences[:, queries.shape[1] :]
    return torch.cat([queries, responses], 1), torch.stack(output.scores, 1)


@torch.no_grad()
def batch_generation(
    model: nn.Module,
    queries: torch.Tensor,
    local_rollout_forward_batch_size: int,
    pad_token_id: int,
    generation_config: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`generate` in chunks; rows that ended earlier are padded, their logits are 0."""
    parts = [
        generate(model, chunk, pad_token_id, generation_config)
        for chunk in queries.split(local_rollout_forward_batch_size)
    ]
    longest = max(tokens.shape[1] for tokens, _ in parts)
    tokens = [nn.functional.pad(x, (0, longest - x.shape[1]), value=pad_token_id) for x, _ in parts]
    steps = max(logits.shape[1] for _, logits in parts)
    logits = [nn.functional.pad(x, (0, 0, 0, steps - x.shape[1])) for _, x in parts]
    return torch.cat(tokens), torch.cat(logits)


def print_rich_table(df: Any) -> None:
    """Print a table: a pandas.DataFrame, or a dict of columns."""
    from rich.console import Console
    from rich.table import Table

    columns = {name: list(df[name]) for name in (df.columns if hasattr(df, "columns") else df)}
    table = Table(show_lines=True)
    for name in columns:
        table.add_column(name)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(str(value) for value in row))
    Console().print(table)
