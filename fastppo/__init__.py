"""PPO for language models at the speed of the hardware, behind TRL's API.

Names are imported when they are first used: `import fastppo` costs little more than `import torch`.
"""

from fastppo.lazy import lazy_names

__version__ = "0.1.0"

# name -> module that defines it
_EXPORTS = {
    "PPOConfig": "fastppo.config",
    "PPOTrainer": "fastppo.trainer.ppo_trainer",
    "AutoModelForCausalLMWithValueHead": "fastppo.models",
    "AutoModelForSeq2SeqLMWithValueHead": "fastppo.models",
    "PreTrainedModelWrapper": "fastppo.models",
    "create_reference_model": "fastppo.models",
    "set_seed": "fastppo.core",
    "BestOfNSampler": "fastppo.extras",
    "TextEnvironment": "fastppo.extras",
    "TextHistory": "fastppo.extras",
    "Generator": "fastppo.generation",
    "Rollout": "fastppo.data",
    "SFTConfig": "fastppo.sft",
    "SFTTrainer": "fastppo.sft",
    "RewardConfig": "fastppo.reward",
    "RewardTrainer": "fastppo.reward",
}

__all__ = ["__version__", *_EXPORTS]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
