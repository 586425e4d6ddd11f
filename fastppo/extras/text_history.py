"""One episode of a text environment: who said what, as text and as tokens."""

import torch
from torch import Tensor

from fastppo.wanted import want


class TextHistory:
    """Segments of the system (prompt, tool answers) and of the model, in turn.

    text, tokens (int64 [T]): everything so far. token_masks: int64 [T], 1 on the model's tokens.
    text_spans, token_spans: (start, end) of each segment; system_spans: whether the system said it. reward: set at the end.
    Raises ValueError for a segment without text or tokens.
    """

    prompt_color = "black on grey85"
    system_color = "black on cyan3"
    model_color = "black on deep_sky_blue1"
    reward_color = "black on plum1"

    def __init__(self, text: str, tokens: Tensor, system: bool = True):
        self.system_spans: list[bool] = []
        self.text_spans: list[tuple[int, int]] = []
        self.token_spans: list[tuple[int, int]] = []
        self.text = ""
        self.tokens = tokens[:0] if isinstance(tokens, Tensor) else torch.zeros(0, dtype=torch.int64)
        self.token_masks = torch.zeros_like(self.tokens)
        self.completed = False
        self.truncated = False
        self.reward = 0.0
        self.append_segment(text, tokens, system=system)

    def append_segment(self, text: str, tokens: Tensor, system: bool = True) -> None:
        want(isinstance(text, str), "TextHistory", "text", "a text", text)
        want(
            isinstance(tokens, Tensor) and tokens.dim() == 1,
            "TextHistory",
            "tokens",
            "a 1-D tensor of its tokens",
            tokens,
        )
        if len(text) == 0 or len(tokens) == 0:
            raise ValueError(f"Can't append empty text or token list to history: {text!r} with {len(tokens)} tokens")
        self.text_spans.append((len(self.text), len(self.text) + len(text)))
        self.token_spans.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.system_spans.append(system)
        self.text += text
        self.tokens = torch.cat([self.tokens, tokens.to(self.tokens.device)])
        mask = torch.full_like(tokens, 0 if system else 1, device=self.tokens.device)
        self.token_masks = torch.cat([self.token_masks, mask])

    def complete(self, truncated: bool = False) -> None:
        """The episode is over; truncated when it ran out of room."""
        self.completed = True
        self.truncated = truncated

    @property
    def last_text_segment(self) -> str:
        start, end = self.text_spans[-1]
        return self.text[start:end]

    def split_query_response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """(first segment, everything after it, mask of what came after): what PPOTrainer.step takes."""
        at = self.token_spans[0][1]
        return self.tokens[:at], self.tokens[at:], self.token_masks[at:]

    # --- on the terminal ---------------------------------------------------------------------------------------------

    def show_text(self, show_legend: bool = False) -> None:
        """Print the text, coloured by speaker, and the reward."""
        from rich.text import Text

        text = Text(self.text)
        for index, span in enumerate(self.text_spans):
            text.stylize(self._color(index), *span)
        self._print(text, show_legend)

    def show_tokens(self, tokenizer, show_legend: bool = False) -> None:
        """Print the tokens one by one, coloured by speaker, and the reward."""
        from rich.text import Text

        text = Text()
        for index, (start, end) in enumerate(self.token_spans):
            for token in self.tokens[start:end].tolist():
                text.append(tokenizer.convert_ids_to_tokens(token), style=self._color(index))
                text.append(" ")
        self._print(text, show_legend)

    def show_colour_legend(self) -> None:
        from rich import print as rich_print
        from rich.text import Text

        colors = {"Prompt": self.prompt_color, "System": self.system_color, "Model": self.model_color}
        parts = [(name, color) for name, color in {**colors, "Reward": self.reward_color}.items()]
        rich_print(Text("\n(Colour Legend: ") + Text("|").join(Text(*part) for part in parts) + Text(")"))

    def _color(self, segment: int) -> str:
        if segment == 0:
            return self.prompt_color
        return self.system_color if self.system_spans[segment] else self.model_color

    def _print(self, text, show_legend: bool) -> None:
        from rich import print as rich_print

        text.append(f"\n\nReward: {self.reward}", style=self.reward_color)
        rich_print(text)
        if show_legend:
            self.show_colour_legend()
