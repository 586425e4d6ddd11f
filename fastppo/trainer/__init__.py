"""The classic trainer and what it is made of; names are imported when they are first used."""

from fastppo.lazy import lazy_names

# name -> module that defines it
_EXPORTS = {
    "AdaptiveKLController": "fastppo.trainer.kl_controller",
    "FixedKLController": "fastppo.trainer.kl_controller",
    "PPOConfig": "fastppo.config",
    "PPOTrainer": "fastppo.trainer.ppo_trainer",
    "RunningMoments": "fastppo.trainer.running_moments",
}

__all__ = list(_EXPORTS)

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
