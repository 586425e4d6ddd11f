"""Gradients side by side in one buffer: where they lie, what is copied, and the engine writing into it."""

import pytest
import torch
from test_engine import CLIPPED, engine_of, made, some_pack
from torch import nn

from fastppo.gradients import ALIGNED, FlatGradients


def parameters(*shapes):
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_by_hand():
    a, b = parameters((2, 16), (3,))
    flat = FlatGradients([a, b])
    assert len(flat.whole) == 32 + ALIGNED and not flat.whole.any()
    a.grad = torch.full((2, 16), 2.0)
    flat.take()
    assert a.grad is flat.views[a] and flat.whole[:32].eq(2).all() and not b.grad.any()
    flat.whole *= 3  # what a reduction does
    assert a.grad.eq(6).all()
    a.grad, b.grad = None, torch.ones(3)
    flat.take()
    assert flat.whole.tolist() == [0.0] * 32 + [1.0] * 3 + [0.0] * (ALIGNED - 3)


def test_neighbours_lie_one_below_the_other():
    first, gap, second, odd = parameters((4, 16), (7,), (2, 16), (3, 5))
    flat = FlatGradients([first, gap, second, odd], [[first, second], [gap, odd], [None, gap]])
    flat.matrix([first, second]).copy_(torch.arange(96.0).view(6, 16))
    assert torch.equal(flat.views[second], torch.arange(64.0, 96.0).view(2, 16))
    assert flat.matrix([second, first]) is None and flat.matrix([gap, odd]) is None
    assert flat.matrix([first, nn.Parameter(torch.ones(1, 16))]) is None, "a frozen one has no place"


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama"])  # one matrix; grouped heads with biases; without
def test_the_engine_writes_into_it(name):
    """Twice: the second micro-batch adds to the first; then again in the same places for the next step."""
    model, (pack, batch) = made(name), some_pack()
    engine = engine_of(model)
    trained = list(model.parameters())
    flat = FlatGradients(trained, engine.spec.neighbours())

    def grads(place):
        model.zero_grad()
        with engine.started(torch.float32, place):
            for _ in range(2):
                engine.learn(pack, batch, CLIPPED, 46.0, True)
        return [p.grad for p in trained]

    own = [grad.clone() for grad in grads(None)]
    for _ in range(2):
        written = grads(flat)
        heads = {id(p) for p in model.v_head.parameters()}
        inside = [grad is flat.views[p] for p, grad in zip(trained, written, strict=True) if id(p) not in heads]
        assert all(inside), "no gradient but the value head's is copied"
        for grad, want in zip(written, own, strict=True):
            torch.testing.assert_close(grad, want, rtol=0, atol=0)
