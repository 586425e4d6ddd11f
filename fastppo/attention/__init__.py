"""Our attention inside unmodified transformers models: packed sequences for training and scoring, pages for decoding.

    with attention.install(model), attention.packed(cu_seqlens, max_seqlen) as layout:
        model(input_ids=tokens_1N, position_ids=layout.position_ids, use_cache=False)

`install` makes the model call `attend`; the layout of the current forward pass reaches it through a context variable,
because some models drop keyword arguments that they don't know.
"""

from fastppo.attention.backends import BACKENDS, choose, missing
from fastppo.attention.interface import Installed, Unsupported, install, packed, unsupported, unwrap
from fastppo.attention.layout import Packed, current, using

__all__ = [
    "BACKENDS",
    "Installed",
    "Packed",
    "Unsupported",
    "choose",
    "current",
    "install",
    "missing",
    "packed",
    "unsupported",
    "unwrap",
    "using",
]
