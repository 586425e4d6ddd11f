"""Best-of-n sampling and multi-turn text environments with tools."""

from fastppo.extras.best_of_n import BestOfNSampler
from fastppo.extras.text_environment import TextEnvironment
from fastppo.extras.text_history import TextHistory

__all__ = ["BestOfNSampler", "TextEnvironment", "TextHistory"]
