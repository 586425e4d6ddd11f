"""fastppo.adam against torch.optim.Adam and float64."""

import copy

import pytest
import torch

from fastppo.adam import Adam, AdamW, in_one_call

SIZES = [(1,), (7, 3), (8193,), (3, 8192)]  # one number; odd; a block and one more; several blocks


def run(kind, steps: int, dtype=torch.float32, missing=(), **options):
    """Parameters and optimizer after some steps; parameter 1 has no gradient in the steps of `missing`."""
    g = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*size, generator=g).to(dtype)) for size in SIZES]
    optimizer = kind(parameters, lr=1e-2, **options)
    for step in range(steps):
        for i, p in enumerate(parameters):
            grad = torch.randn(*p.shape, generator=g).to(dtype) * 10.0 ** (i - 2)
            p.grad = None if i == 1 and step in missing else grad
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("missing", [(), (0, 1), (2,)])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_steps_are_torchs(kind, missing):
    decay = {} if kind is Adam else {"weight_decay": 0.0}
    ours, optimizer = run(kind, 5, missing=missing, fused=True, **decay)
    plain, theirs = run(torch.optim.Adam, 5, missing=missing, fused=True)
    truth, exact = run(torch.optim.Adam, 5, torch.float64, missing=missing)
    for a, b, want in zip(ours, plain, truth, strict=True):
        error, plain_error = (float((x.double() - want).abs().max()) for x in (a, b))
        assert error <= 2 * plain_error + 1e-6, f"{error:.2e}, torch {plain_error:.2e}"
    states = (made.state_dict()["state"].values() for made in (optimizer, theirs, exact))
    for a, b, want in zip(*states, strict=True):
        assert set(a) == set(b) and a["step"] == b["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            # to the largest gradient's rounding: where gradients cancel out, torch's own error is as large
            error, plain_error = (float((x[name].double() - want[name]).abs().max()) for x in (a, b))
            assert error <= 2 * plain_error + 1e-7 * float(want[name].abs().max()), (
                f"{name}: {error:.2e}, torch {plain_error:.2e}"
            )


def test_first_steps_by_hand():
    """m / (1 - b1^t) and v / (1 - b2^t) of a constant gradient are g and g^2: every step is lr."""
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adam([p], lr=0.5, fused=True)
    for _ in range(3):
        p.grad = torch.tensor([2.0, -1e-3, 0.0])
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-1.5, 1.5, 0.0]), rtol=1e-4, atol=1e-6)


def test_the_threads_do_not_matter():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(Adam, 3, fused=True)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}])
@pytest.mark.parametrize("kinds", [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_everything_else_is_torchs_own(kinds, options):
    ours, theirs = (run(kind, 3, fused=True, **options)[0] for kind in kinds)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_trainers_take_it_for_torchs_adamw():
    assert in_one_call((torch.optim.AdamW, {"lr": 1.0})) == (AdamW, {"lr": 1.0}) and issubclass(
        AdamW, torch.optim.AdamW
    )
    assert in_one_call((torch.optim.SGD, {})) == (torch.optim.SGD, {})


def test_state_goes_on_and_hooks_run_once_per_step():
    _, optimizer = run(Adam, 3, fused=True)
    parameters, other = run(Adam, 1, fused=True)
    run(torch.optim.Adam, 1)  # torch wraps its class's step once one was made
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    seen = []
    other.register_step_post_hook(lambda *_: seen.append(1))
    for p in parameters:
        p.grad = torch.ones_like(p)
    other.step()
    other.param_groups[0]["weight_decay"] = 0.1  # through torch's
    other.step()
    assert len(seen) == 2 and other.state[parameters[0]]["step"] == 5


def test_a_learning_rate_in_a_tensor_is_torchs_own():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([p], lr=torch.tensor(0.1))
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.8))
