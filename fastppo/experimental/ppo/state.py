"""TrainerState of an online trainer."""

from dataclasses import dataclass

from transformers import TrainerState


@dataclass
class OnlineTrainerState(TrainerState):
    """TrainerState; episode: responses that were learnt from."""

    episode: int = 0
