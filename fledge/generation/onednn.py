"""Matrix products in float32 by oneDNN instead of MKL, on a CPU and without gradients.

PyTorch gives products in float32 to MKL, which is slow on CPUs that are not Intel's. The operator called here is the
one that PyTorch's own compiler uses for the same purpose.
"""

import contextlib
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Multiplications from which a product gains more than the longer call costs.
WORTH = 1 << 18


@contextlib.contextmanager
def by_onednn(model: PreTrainedModel) -> Iterator[None]:
    """Inside, linear layers of `model` multiply by oneDNN; their results differ from MKL's in rounding alone."""
    linear = [part for part in model.modules() if type(part) in (nn.Linear, Conv1D) and "forward" not in vars(part)]
    changed = [part for part in linear if part.weight.device.type == "cpu" and part.weight.dtype == torch.float32]
    changed = changed if torch.backends.mkldnn.is_available() else []
    for part in changed:
        part.forward = types.MethodType(_forward, part)
    try:
        yield
    finally:
        for part in changed:
            vars(part).pop("forward", None)


def _forward(self: nn.Module, inputs: Tensor) -> Tensor:
    weight = self.weight.T if isinstance(self, Conv1D) else self.weight
    if torch.is_grad_enabled() or inputs.numel() * weight.shape[0] < WORTH:
        return type(self).forward(self, inputs)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, self.bias, "none", [], "")
