"""The classic trainer and what it is made of; names are imported when they are first used."""

import importlib

# name -> module that defines it
_EXPORTS = {
    "AdaptiveKLController": "fastppo.trainer.kl_controller",
    "FixedKLController": "fastppo.trainer.kl_controller",
    "PPOConfig": "fastppo.config",
    "PPOTrainer": "fastppo.trainer.ppo_trainer",
    "RunningMoments": "fastppo.trainer.running_moments",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_EXPORTS))}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
