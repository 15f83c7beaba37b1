"""Whether operators may be called for what they compute alone."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_eager() -> bool:
    """Whether nothing compiles, traces, transforms, fakes or counts what is called, or derives it forward.

    Else operators are to be torch's own: those of oneDNN and of this package have no derivatives and no lowering.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )
