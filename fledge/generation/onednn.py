"""Matrix products by oneDNN with prepacked weights, on a CPU and without gradients.

PyTorch uses MKL for float32 products, which is slow on CPUs that are not Intel's, and packs bfloat16 weights again for
every product. The operators here are those that torch.compile uses for the same purpose. They are private: if they are
missing or fail a small trial, layers multiply as usual. `FLEDGE_ONEDNN=0` in the environment turns them off.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fledge.cpu import multiplies_bf16

# Multiplications above which a float32 product gains more than the longer call costs.
WORTH = 1 << 18
# Weights up to this many bytes are prepacked, which takes a second copy of them.
COPIED = 1 << 30


@contextlib.contextmanager
def by_onednn(model: PreTrainedModel) -> Iterator[None]:
    """Inside, linear layers of `model` multiply by oneDNN; their results differ from MKL's only in rounding.

    Entered under autocast to bfloat16, layers in float32 round their inputs and weights as autocast does. The weights
    must not change inside. Entering takes about as long as a few products of every layer.
    """
    wanted = [torch.float32, torch.bfloat16] if multiplies_bf16() else [torch.float32]
    dtypes = [dtype for dtype in wanted if os.environ.get("FLEDGE_ONEDNN") != "0" and works(dtype)]
    rounded = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    changed = {
        part: part.weight.detach().T if isinstance(part, Conv1D) else part.weight.detach()
        for part in model.modules()
        if isinstance(part, nn.Linear | Conv1D)
        and type(part) in (nn.Linear, Conv1D)
        and "forward" not in vars(part)
        and part.weight.device.type == "cpu"
        and part.weight.dtype in dtypes
    }
    is_copied = sum(weight.nbytes for weight in changed.values()) <= COPIED
    for part, weight in changed.items():
        if rounded in dtypes:
            held, bias = _lay_out(weight.to(rounded)), None if part.bias is None else part.bias.detach().to(rounded)
            vars(part)["forward"] = functools.partial(_forward_rounded, held, bias)
        else:
            vars(part)["forward"] = functools.partial(_forward, part, _lay_out(weight) if is_copied else weight)
    try:
        yield
    finally:
        for part in changed:
            vars(part).pop("forward", None)


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether the operators work here. Tried once, with and without bias, for both kinds of layers."""
    ones = functools.partial(torch.ones, dtype=dtype, device="cpu")
    inputs, weight, bias = ones(2, 3, 8), ones(8, 4).T / 2, ones(4)
    try:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            return all(
                torch.allclose(_multiply(inputs, held, added), F.linear(inputs, of_layer, added))
                for of_layer in (weight, weight.contiguous())
                for held in (of_layer, _lay_out(of_layer))
                for added in (bias, None)
            )
    except (AttributeError, RuntimeError, TypeError):  # no such operator, not on this machine, other parameters
        return False


def _lay_out(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _forward_rounded(held: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return _multiply(inputs.to(held.dtype), held, bias)


def _forward(self: nn.Linear | Conv1D, held: Tensor, inputs: Tensor) -> Tensor:
    # Autocast does not cast this operator's inputs, and it cannot multiply bfloat16 inputs by float32 weights.
    plain = inputs.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    is_small = inputs.dtype == torch.float32 and inputs.numel() * self.weight.numel() < WORTH * inputs.shape[-1]
    if not plain or is_small:
        return nn.Linear.forward(self, inputs) if isinstance(self, nn.Linear) else Conv1D.forward(self, inputs)
    return _multiply(inputs, held, self.bias)
