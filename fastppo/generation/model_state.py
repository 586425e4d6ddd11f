"""What a trace of a model has burnt in, as one value that changes with it: code, numbers, flags, and where the tensors lie."""

import torch

_PLAIN = (int, float, str, bool, type(None), torch.dtype)


def model_state(model: torch.nn.Module) -> tuple:
    """Equal for two rollouts when a program traced before the first still stands for the model in the second.

    Not seen: a function replaced in a module of Python (not of torch), which is why programs are checked again now and then.
    """
    return repr(vars(model.config.get_text_config())), *(_module_state(module) for module in model.modules())


def _module_state(module: torch.nn.Module) -> tuple:
    own = vars(module)
    # `training` is switched off for a rollout; ids: a bound method would keep the model alive
    plain = tuple((k, x) for k, x in own.items() if isinstance(x, _PLAIN) and k != "training")
    nested = tuple((k, repr(x)) for k, x in own.items() if type(x) is dict and k[0] != "_" and _is_plain(x))
    called = tuple((k, id(x)) for k, x in own.items() if callable(x))
    hooks = tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"])
    tensors = (*own["_parameters"].items(), *own["_buffers"].items())
    where = tuple((k, x.data_ptr(), x.dtype, x.shape) for k, x in tensors if x is not None)
    return id(type(module)), id(type(module).forward), plain, nested, called, hooks, where


def _is_plain(x: dict) -> bool:
    return all(isinstance(value, _PLAIN) for value in x.values())
