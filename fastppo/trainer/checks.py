"""What PPOTrainer accepts, and the words in which it declines the rest."""

import sys
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from fastppo.wanted import is_flag, is_ids, is_whole, want


def check_init(config, model, ref_model, tokenizer, dataset, num_shared_layers) -> None:
    """ValueError for an argument of the wrong type; warnings for what is probably a slip."""
    from transformers import PreTrainedTokenizerBase

    from fastppo.config import PPOConfig
    from fastppo.models import SUPPORTED_ARCHITECTURES

    if not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a PPOConfig, got {type(config)}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "tokenizer must be a PreTrainedTokenizerBase like a PreTrainedTokenizer or a PreTrainedTokenizerFast, "
            f"got {type(tokenizer)}"
        )
    names = " or ".join(cls.__name__ for cls in SUPPORTED_ARCHITECTURES)
    for name, given, optional in (("model", model, False), ("ref_model", ref_model, True)):
        if not isinstance(given, SUPPORTED_ARCHITECTURES) and not (optional and given is None):
            raise ValueError(
                f"{name} must be a PreTrainedModelWrapper{' or `None`' * optional}, got {type(given)} - supported "
                f"architectures are: {names}; wrap it: {names.split(' or ')[0]}.from_pretrained({name})"
            )
    if ref_model is model:
        raise ValueError(
            "ref_model is the model itself: the KL between them would always be 0; pass None for a frozen copy"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no parameter that trains: every one has requires_grad=False")
    if dataset is not None and not isinstance(dataset, torch.utils.data.Dataset) and not is_hf_dataset(dataset):
        raise ValueError(f"dataset must be a torch.utils.data.Dataset or datasets.Dataset, got {type(dataset)}")
    if ref_model is not None and num_shared_layers is not None:
        warnings.warn("num_shared_layers is ignored when ref_model is provided", UserWarning, stacklevel=3)
    if dataset is None:
        warnings.warn(
            "No dataset is provided. Make sure to set config.batch_size to the correct value before training.",
            UserWarning,
            stacklevel=3,
        )
    if config.push_to_hub_if_best_kwargs and "repo_id" not in config.push_to_hub_if_best_kwargs:
        raise ValueError("You have to specify repo_id in order to push the model to the hub!")


def is_hf_dataset(dataset) -> bool:
    """Whether it is a datasets.Dataset; the library (80 MB with pandas and pyarrow) is not imported to find out."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.Dataset)


def check_optimizer(model, optimizer, lr_scheduler) -> None:
    """ValueError for an optimizer or scheduler that is none, or that steps something else."""
    if optimizer is not None and type(optimizer).__name__ != "DummyOptim":  # accelerate's, for DeepSpeed's own
        wanted = "None or a torch.optim.Optimizer over the model's parameters"
        want(isinstance(optimizer, torch.optim.Optimizer), "PPOTrainer", "optimizer", wanted, optimizer)
        own = {id(parameter) for parameter in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("PPOTrainer: optimizer holds none of the model's parameters, so nothing would be learnt")
    if lr_scheduler is not None and not isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise ValueError(f"lr_scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {type(lr_scheduler)}")
    if lr_scheduler is not None and getattr(lr_scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("PPOTrainer: lr_scheduler belongs to another optimizer; pass that one as optimizer, too")


def check_collators(**collators) -> None:
    for name, collator in collators.items():
        want(
            collator is None or callable(collator), "PPOTrainer", name, "None or a function of a list of rows", collator
        )


def check_generate(query_tensor, length_sampler, batch_size, **flags) -> None:
    """ValueError for arguments of PPOTrainer.generate that its Generator does not look at."""
    where = "PPOTrainer.generate"
    if isinstance(query_tensor, list):
        for row, query in enumerate(query_tensor):
            wanted = "a 1-D tensor of token ids (tokenizer(text, return_tensors='pt').input_ids[0] is one)"
            want(isinstance(query, torch.Tensor), where, f"query_tensor[{row}]", wanted, query)
    want(length_sampler is None or callable(length_sampler), where, "length_sampler", "a function", length_sampler)
    want(is_whole(batch_size, 1), where, "batch_size", "a whole number of at least 1", batch_size)
    for name, flag in flags.items():
        want(is_flag(flag), where, name, "True or False", flag)


def check_log_stats(stats, batch, rewards, columns) -> None:
    """ValueError for what can't be logged; without a tracker it would pass in silence."""
    where = "PPOTrainer.log_stats"
    want(isinstance(stats, dict) and stats, where, "stats", "the dictionary that step() returned", stats)
    want(isinstance(batch, Mapping), where, "batch", "a dictionary with the columns of the batch", batch)
    good = (
        isinstance(rewards, (list, tuple, torch.Tensor, np.ndarray))
        and getattr(rewards, "shape", (1,))
        and len(rewards)
    )
    want(good, where, "rewards", "a list of numbers, one per sequence, as handed to step()", rewards)
    for row, reward in enumerate(rewards):
        good = reward.numel() == 1 if isinstance(reward, torch.Tensor) else hasattr(reward, "__float__")
        want(good, where, f"rewards[{row}]", "a number", reward)
    want(isinstance(columns, (list, tuple)), where, "columns_to_log", "a list of column names", columns)


def check_pairs(where: str, queries, responses) -> None:
    """ValueError unless these are two lists of as many 1-D tensors of token ids."""
    wanted = "a list of 1-D tensors of token ids"
    for name, rows in (("queries", queries), ("responses", responses)):
        good = isinstance(rows, (list, tuple)) and len(rows) > 0 and all(is_ids(x) and x.dim() == 1 for x in rows)
        want(good, where, name, wanted, rows)
    want(len(queries) == len(responses), where, "responses", f"as many as queries, {len(queries)}", len(responses))


def check_step(batch_size: int, device, queries, responses, scores, masks=None):
    """(queries, responses, scores, masks) on `device`; every score 0-D. ValueError says which list is wrong and why."""
    named = {"queries": queries, "responses": responses, "scores": scores}
    if masks is not None:
        named["masks"] = masks
    for name, tensors in named.items():
        if not isinstance(tensors, list):
            raise ValueError(f"{name} must be a list of tensors - got {type(tensors)}")
        for element in tensors:
            if not isinstance(element, torch.Tensor):
                raise ValueError(f"Elements in {name} must be tensors - got {type(element)}")
        if len(tensors) != batch_size:
            raise ValueError(
                f"Batch size ({batch_size}) does not match number of examples - but got {len(tensors)} for: {name}"
            )
    queries, responses, scores = ([x.to(device) for x in xs] for xs in (queries, responses, scores))
    _check_shapes(queries, responses, scores, masks)
    scores = [score.reshape(()).float() for score in scores]
    return queries, responses, scores, None if masks is None else [mask.to(device) for mask in masks]


def check_lengths(model, queries, responses) -> None:
    """ValueError where query + response is longer than a decoder-only model can be, or a token is outside its vocabulary."""
    vocabulary = getattr(model.config, "vocab_size", None)
    low, high = (int(x) for x in torch.cat([*queries, *responses]).aminmax())
    if vocabulary and not 0 <= low <= high < vocabulary:
        raise ValueError(
            f"PPOTrainer.step: queries and responses have tokens from {low} to {high}; the model's vocabulary is "
            f"0 .. {vocabulary - 1} (was the tokenizer given new tokens without model.resize_token_embeddings?)"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        if limit and len(query) + len(response) > limit:
            raise ValueError(
                f"PPOTrainer.step: sequence {row} has {len(query)} + {len(response)} tokens, the model's limit is {limit} "
                "(max_position_embeddings)"
            )


def _check_shapes(queries, responses, scores, masks) -> None:
    for name, tensors in (("queries", queries), ("responses", responses)):
        for row, ids in enumerate(tensors):
            if ids.dim() != 1 or not is_ids(ids):
                raise ValueError(f"{name}[{row}] must be a 1-D tensor of token ids, got {ids.dtype} {tuple(ids.shape)}")
    for row, ids in enumerate(queries):
        if len(ids) == 0:
            raise ValueError(f"queries[{row}] is empty; the first token needs one before it, e.g. the bos token")
    if all(len(ids) == 0 for ids in responses):
        raise ValueError("every response is empty; there is nothing to learn from")
    for row, score in enumerate(scores):
        if score.numel() != 1:
            raise ValueError(
                f"Scores must be 1-dimensional - got {tuple(score.shape)} for scores[{row}]: one number each"
            )
        want(not score.is_complex(), "PPOTrainer.step", f"scores[{row}]", "a real number", score)
    for row, mask in enumerate(masks or []):
        if mask.shape != responses[row].shape:
            raise ValueError(
                f"masks[{row}] must have the shape of its response {tuple(responses[row].shape)}, got {tuple(mask.shape)}"
            )
        good = bool(((mask == 0) | (mask == 1)).all())
        want(good, "PPOTrainer.step", f"masks[{row}]", "1 where a token counts and 0 elsewhere", mask.tolist())
