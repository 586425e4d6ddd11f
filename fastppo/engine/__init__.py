"""Training passes on a CPU without autograd: the body of a known model written out over fused kernels.

PyTorch's own modules spend more time between the matrix products than in them when a model is small, and read and write
every intermediate several times when it is large. `Engine` computes the same numbers (a probe compares them with the
model's own when it is made) and puts gradients where autograd would, into .grad.
"""

from fastppo.engine.engine import Engine, engine_for

__all__ = ["Engine", "engine_for"]
