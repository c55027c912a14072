"""Runs the author's code: on one device, without dropout, in float64, without output."""

import contextlib
import io
import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PLACE = types.SimpleNamespace(device="cpu")
"""The device of tensors that the author's code creates; tensors that a file computes for itself are always real."""

NARROW = (torch.float32, torch.float16, torch.bfloat16)

FILLED = {
    "normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_",
    "xavier_normal_", "orthogonal_", "zeros_", "ones_", "constant_", "zero_", "fill_",
}  # fmt: skip
"""Functions that only set the values of a tensor, which have no effect on the meta device."""

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)

CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class Tamed(TorchFunctionMode):
    """Keeps the author's code on one device, without dropout, and at full precision.

    `widen` says which tensors stay in float64: "doubles", those that are and that the code would round to float32, or
    "all", those too that it makes in float32.
    """

    def __init__(self, widen: str | None = None):
        super().__init__()
        self.widen = widen

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0].to(PLACE.device) if PLACE.device == "cpu" else args[0]
        if PLACE.device == "meta" and getattr(func, "__name__", "") in FILLED:
            return args[0] if args else kwargs["tensor"]
        args = tuple(self._here(argument) for argument in args)
        kwargs = {key: self._here(value) for key, value in kwargs.items()}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0} | ({"is_causal": args[5]} if len(args) > 5 else {})
        if self.widen:
            args, kwargs = self._wide(func, args, kwargs)
            if func in CASTS:
                return self._cast(func, args)
        return func(*args, **kwargs)

    def _here(self, value: object) -> object:
        is_device = isinstance(value, torch.device) or (
            isinstance(value, str) and re.fullmatch(r"(cuda|mps|xpu|cpu)(:\d+)?", value)
        )
        return PLACE.device if is_device else value

    def _wide(self, func: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        narrowed = self.widen == "all" or (args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64)
        if narrowed:
            args = tuple(torch.float64 if _is_narrow(value) else value for value in args)
            kwargs = {key: torch.float64 if _is_narrow(value) else value for key, value in kwargs.items()}
        return args, kwargs

    def _cast(self, func: Callable, args: tuple) -> Tensor:
        if args[0].dtype == torch.float64 or self.widen == "all":
            return args[0].double()
        return func(*args)


def _is_narrow(value: object) -> bool:
    return isinstance(value, torch.dtype) and value in NARROW


@contextlib.contextmanager
def author_runs(device: str = "cpu", widen: str | None = None) -> Iterator[None]:
    """Runs the author's code so that its output, random numbers and compilation affect nothing else."""
    compiler, before, dtype = torch.compile, PLACE.device, torch.get_default_dtype()
    torch.compile, PLACE.device = _not_compiled, device
    try:
        if widen == "all":
            torch.set_default_dtype(torch.float64)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            torch.random.fork_rng(devices=[]),
            torch.device(device),  # what is made without a device
            Tamed(widen),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile, PLACE.device = compiler, before
        torch.set_default_dtype(dtype)


def _not_compiled(model: Callable | None = None, **options: object) -> Callable:
    return model if model is not None else lambda function: function


def on_cpu(value: object) -> object:
    """The value itself, or the CPU in place of another device."""
    if isinstance(value, str) and re.fullmatch(r"(cuda|mps|xpu)(:\d+)?", value):
        return "cpu"
    if isinstance(value, torch.device) and value.type not in ("cpu", "meta"):
        return torch.device("cpu")
    return value
