"""What PPOTrainer.__init__ puts together: accelerate, reference, optimizer, controllers."""

import copy
import logging
import os

import torch

from fastppo import attention, distributed, zero
from fastppo.trainer.columns import Batches, EpochSampler
from fastppo.trainer.kl_controller import AdaptiveKLController, FixedKLController
from fastppo.trainer.running_moments import RunningMoments

logger = logging.getLogger(__name__)


def accelerator(config):
    """Accelerator from config.accelerator_kwargs; accumulation is counted in mini-batches only.

    accelerate by itself also ends an accumulation at the last batch of a dataloader, whatever the mini-batch.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

    options = {"log_with": config.log_with, "project_config": ProjectConfiguration(**config.project_kwargs)}
    options["gradient_accumulation_plugin"] = GradientAccumulationPlugin(
        num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
    )
    if config.mixed_precision is not None:
        options["mixed_precision"] = config.mixed_precision
    options |= config.accelerator_kwargs
    handlers = list(options.get("kwargs_handlers") or [])
    if not any(isinstance(handler, InitProcessGroupKwargs) for handler in handlers):
        options["kwargs_handlers"] = [*handlers, distributed.process_group_options(config.ddp_timeout)]
    try:
        made = Accelerator(**options)
    except ValueError as error:
        if "logging_dir" not in str(error):
            raise
        folder = 'project_kwargs={"logging_dir": FOLDER}'
        raise ValueError(f"PPOConfig: log_with={config.log_with!r} needs a folder to write to: {folder}") from error
    distributed.kind(made)  # raises for what is not supported
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched > 1 and made.num_processes == 1:
        logger.warning(
            "%d processes were launched, but this one trains alone: accelerate does not join them. Without a GPU set "
            "ACCELERATE_USE_CPU=1 (accelerate launch --cpu sets it).",
            launched,
        )
    return made


def fill_config(trainer) -> None:
    """The config fields and attributes that follow from the model and the number of processes."""
    config, processes = trainer.config, trainer.accelerator.num_processes
    config.world_size = processes
    config.global_backward_batch_size = config.backward_batch_size * processes
    config.global_batch_size = config.batch_size * processes
    config.is_encoder_decoder, config.is_peft_model = trainer.is_encoder_decoder, trainer.is_peft_model
    trainer.is_distributed = processes > 1
    trainer.current_device = trainer.accelerator.device
    if getattr(trainer.model, "is_sequential_parallel", False):
        # a model split over devices takes its inputs on the first
        trainer.current_device = next(trainer.model.parameters()).device


def enable_gradient_checkpointing(config, model) -> None:
    if not config.gradient_checkpointing:
        return
    # re-entrant checkpoints lose the gradient of frozen embeddings (adapters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def reference(model, ref_model, num_shared_layers):
    """The frozen model that the KL is measured against; None when it is `model` with its adapters off."""
    from fastppo.models import create_reference_model

    if ref_model is not None:
        return ref_model
    if getattr(model, "is_peft_model", False):
        return None
    return create_reference_model(model, num_shared_layers=num_shared_layers)


def default_optimizer(parameters, learning_rate: float) -> torch.optim.Optimizer:
    """Adam; one call for all parameters on a CPU, one fused kernel where torch has one for them."""
    from fastppo.adam import Adam

    plain = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return Adam(parameters, lr=learning_rate, fused=True if plain else None)


def default_collator(tokenizer):
    from transformers import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def kl_controller(config):
    if config.adap_kl_ctrl:
        return AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
    return FixedKLController(config.init_kl_coef)


def running_moments(accelerator) -> RunningMoments:
    return RunningMoments(accelerator)


def prepare_with_accelerate(trainer) -> None:
    """Model, optimizer, collator, dataloader and scheduler through accelerator.prepare; the reference beside them."""
    kind = distributed.kind(trainer.accelerator)
    if kind.startswith("zero"):
        complete_deepspeed_config(trainer)
    prepared = trainer.accelerator.prepare(
        trainer.model, trainer.optimizer, trainer.data_collator, trainer.dataloader, trainer.lr_scheduler
    )
    sampler = getattr(trainer.dataloader, "sampler", None)
    if kind == "zero3":  # the head's parameters are read, not called
        root = distributed.bare(prepared[0])
        zero.gather_with(root, attention.unwrap(root).get_output_embeddings().parameters())
    trainer.model, trainer.optimizer, trainer.data_collator, trainer.dataloader, trainer.lr_scheduler = prepared
    if isinstance(sampler, EpochSampler):
        size, processes = trainer.config.batch_size, trainer.accelerator.num_processes
        trainer.dataloader = Batches(trainer.dataloader, sampler, size, processes)
    if trainer.ref_model is None:
        return
    if kind.startswith("zero"):
        trainer.ref_model = trainer._prepare_deepspeed(trainer.ref_model)
    elif kind == "fsdp2":
        trainer.ref_model = distributed.prepare_frozen(trainer.accelerator, trainer.ref_model)
    else:
        trainer.ref_model = trainer.accelerator.prepare_model(trainer.ref_model, evaluation_mode=True).eval()


def complete_deepspeed_config(trainer) -> None:
    """What DeepSpeed's configuration leaves open: clipping (accelerate would clip at 1.0), mini-batches of an optimizer step,
    and the micro-batch's size, which accelerate looks for in a dataloader."""
    plugin, config = trainer.accelerator.state.deepspeed_plugin, trainer.config
    options = plugin.deepspeed_config
    wanted = {
        "gradient_clipping": config.max_grad_norm or 0.0,
        "train_micro_batch_size_per_gpu": config.mini_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": "auto",  # accelerate multiplies
    }
    # the plugin is every trainer's of this process: what one fills in binds no other
    if not hasattr(plugin, "left_open"):
        open_values = {"gradient_accumulation_steps": ("auto", 1)}  # 1 is what accelerate writes unasked
        plugin.left_open = [n for n in wanted if options.get(n, "auto") in open_values.get(n, ("auto",))]
    options |= {name: wanted[name] for name in plugin.left_open}


def prepare_deepspeed(accelerator, model):
    """`model` in DeepSpeed's inference form; ZeRO below stage 3 keeps it whole on every process."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    sizes = getattr(model.config, "hidden_sizes", None) or [getattr(model.config, "hidden_size", None)]
    stage = config["zero_optimization"]["stage"]
    if stage == 3 and sizes[0] is not None:
        width = max(sizes)
        config["zero_optimization"] |= {
            "reduce_bucket_size": width * width,
            "stage3_param_persistence_threshold": 10 * width,
            "stage3_prefetch_bucket_size": int(0.9 * width * width),
        }
    elif stage != 3:
        config["zero_optimization"]["stage"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # returns nothing
    return engine


def prepare_hub(trainer) -> None:
    """push_to_hub_if_best: highest score so far and how often to compare."""
    options = trainer.config.push_to_hub_if_best_kwargs
    if options:
        trainer.push_to_hub_kwargs = options
        trainer.compare_step = 0
        trainer.highest_reward = torch.tensor(-float("inf"))
