"""Adam in one call for all parameters, on a CPU: torch's own takes one loop over threads per tensor, and some Python for each."""

import torch

from fastppo.kernels._backend import extension


class Adam(torch.optim.Adam):
    """torch.optim.Adam, fused, with the same state and to rounding the same steps (Kingma and Ba, 2015, algorithm 1).

    m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    float32 parameters on a CPU without weight decay or amsgrad step in C++; everything else, and the first step, as torch has it.
    """

    @torch.no_grad()
    def step(self, closure=None):
        ready = closure is None and not isinstance(extension(), str) and getattr(self, "grad_scale", None) is None
        if not ready or not all(self._in_one_call(group) for group in self.param_groups):
            # its hooks are run around this method already, and not around torch's too
            plain = torch.optim.Adam.step
            return (plain.__wrapped__ if getattr(plain, "hooked", False) else plain)(self, closure)
        for group in self.param_groups:
            self._step_group(group)
        return None

    def _in_one_call(self, group: dict) -> bool:
        unusual = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable")
        if any(group[name] for name in unusual) or isinstance(group["lr"], torch.Tensor):
            return False
        return all(_plain(p) and _plain(p.grad) and len(self.state[p]) == 3 for p in _with_gradients(group))

    def _step_group(self, group: dict) -> None:
        parameters = _with_gradients(group)
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        addresses = [
            (p.data_ptr(), p.grad.data_ptr(), state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr())
            for p, state in zip(parameters, states, strict=True)
        ]
        options = (group["lr"], *group["betas"], group["eps"])
        extension().adam(addresses, [p.numel() for p in parameters], [int(t) for t in steps], options)


class AdamW(Adam, torch.optim.AdamW):
    """torch.optim.AdamW, in one call where it decays no weights."""


def in_one_call(optimizer: tuple[type, dict]) -> tuple[type, dict]:
    """What Trainer.get_optimizer_cls_and_kwargs returns, with AdamW for torch's."""
    cls, options = optimizer
    return AdamW if cls is torch.optim.AdamW else cls, options


def _with_gradients(group: dict) -> list[torch.Tensor]:
    return [p for p in group["params"] if p.grad is not None]


def _plain(x: torch.Tensor) -> bool:
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous()
    )
