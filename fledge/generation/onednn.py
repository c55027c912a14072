"""Matrix products in float32 by oneDNN instead of MKL, on a CPU and without gradients.

PyTorch gives products in float32 to MKL, which is slow on CPUs that are not Intel's. The operator called here is the
one that PyTorch's own compiler uses for the same purpose. It is private: where it is missing, or fails a small trial,
layers multiply as they always did. `FLEDGE_ONEDNN=0` in the environment turns it off.
"""

import contextlib
import functools
import os
import types
from collections.abc import Iterator

import torch
import torch.nn.functional as F
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
    changed = changed if os.environ.get("FLEDGE_ONEDNN") != "0" and works() else []
    for part in changed:
        part.forward = types.MethodType(_forward, part)
    try:
        yield
    finally:
        for part in changed:
            vars(part).pop("forward", None)


@functools.cache
def works() -> bool:
    """Whether this machine and this torch have the operator: tried once, with and without bias, for both layers."""
    ones = functools.partial(torch.ones, dtype=torch.float32, device="cpu")
    inputs, weight, bias = ones(2, 3, 8), ones(8, 4).T / 2, ones(4)
    try:
        with torch.autocast("cpu", enabled=False):
            return all(
                torch.allclose(_multiply(inputs, of_layer, added), F.linear(inputs, of_layer, added))
                for of_layer in (weight, weight.contiguous())
                for added in (bias, None)
            )
    except (AttributeError, RuntimeError, TypeError):  # no such operator, not on this machine, other parameters
        return False


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _forward(self: nn.Linear | Conv1D, inputs: Tensor) -> Tensor:
    weight = self.weight.T if isinstance(self, Conv1D) else self.weight
    # Autocast leaves this operator as it is, and layers before it give bfloat16, which it does not multiply by float32.
    plain = inputs.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not plain or torch.is_grad_enabled() or inputs.numel() * weight.shape[0] < WORTH:
        return nn.Linear.forward(self, inputs) if isinstance(self, nn.Linear) else Conv1D.forward(self, inputs)
    return _multiply(inputs, weight, self.bias)
