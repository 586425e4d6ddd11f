"""The fused tanh GELU is the function that transformers spells out, forward and backward."""

import torch
from transformers.activations import ACT2FN, NewGELUActivation

from fastppo.activations import fused_gelu


def test_same_values_and_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), ACT2FN["gelu_new"])
    x = torch.linspace(-6, 6, 700).view(100, 7).requires_grad_()

    def run():
        out = model(x)
        return out.detach(), torch.autograd.grad(out.square().sum(), [x, *model.parameters()])

    plain, plain_gradients = run()
    with fused_gelu(model):
        assert "forward" in model[1].__dict__
        fused, fused_gradients = run()
    assert "forward" not in model[1].__dict__
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_gradients, plain_gradients, rtol=1e-4, atol=1e-5)


def test_leaves_what_is_not_ours_alone():
    class Louder(NewGELUActivation):
        def forward(self, input):
            return 2 * super().forward(input)

    model = torch.nn.Sequential(Louder(), torch.nn.GELU(), NewGELUActivation())
    mine = model[2].forward = lambda x: x + 1
    with fused_gelu(model):
        assert "forward" not in model[0].__dict__ and model[2].forward is mine
    assert model[2].forward is mine
