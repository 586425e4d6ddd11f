"""The value head: one scalar per position from the policy's last hidden state."""

from torch import Tensor, nn

from fastppo.wanted import is_number, want

VALUE_HEAD_ARGUMENTS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
INIT_STRATEGIES = (None, "normal")


def hidden_size_of(config) -> int:
    """Width of the hidden state that the language-model head of a model with this configuration reads."""
    if getattr(config, "is_encoder_decoder", False) and hasattr(getattr(config, "decoder", None), "hidden_size"):
        return config.decoder.hidden_size
    # OPT-350m projects its hidden states down before the head
    for name in ("word_embed_proj_dim", "hidden_size", "d_model"):
        if isinstance(size := getattr(config, name, None), int):
            return size
    if (
        text_config := getattr(config, "text_config", None)
    ) is not None:  # vision-language models nest the language part
        return hidden_size_of(text_config)
    raise ValueError(
        f"ValueHead: {type(config).__name__} names no hidden size; looked for word_embed_proj_dim, hidden_size, d_model, "
        "decoder.hidden_size and text_config. Set config.hidden_size before wrapping the model."
    )


class ValueHead(nn.Module):
    """value = summary(dropout(hidden)), summary: Linear(hidden_size, 1).

    summary_dropout_prob: config.summary_dropout_prob when the configuration has one, else the argument, else 0.1.
    v_head_init_strategy: None leaves nn.Linear's own initialisation; "normal" draws the weight from
        N(0, v_head_initializer_range) and zeroes the bias.
    """

    def __init__(self, config, **kwargs):
        super().__init__()
        dropout_prob = getattr(config, "summary_dropout_prob", kwargs.pop("summary_dropout_prob", 0.1))
        want(is_number(dropout_prob, 0, 1), "ValueHead", "summary_dropout_prob", "a number from 0 to 1", dropout_prob)
        self.dropout = nn.Dropout(dropout_prob) if dropout_prob else nn.Identity()
        self.summary = nn.Linear(hidden_size_of(config), 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., 1], in the head's dtype and on its device."""
        weight = self.summary.weight
        return self.summary(self.dropout(hidden_states).to(device=weight.device, dtype=weight.dtype))

    def init_weights(self, v_head_initializer_range: float = 0.2, v_head_init_strategy: str | None = None) -> None:
        good = is_number(v_head_initializer_range, 0)
        want(good, "ValueHead", "v_head_initializer_range", "a number of at least 0", v_head_initializer_range)
        if v_head_init_strategy not in INIT_STRATEGIES:
            raise ValueError(f"v_head_init_strategy: one of {INIT_STRATEGIES} wanted; got {v_head_init_strategy!r}")
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.summary.weight, mean=0.0, std=v_head_initializer_range)
            nn.init.zeros_(self.summary.bias)
