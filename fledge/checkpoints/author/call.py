"""Calls the author's module: finds the arguments of its forward, and the logits in its result."""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor, nn

from fledge.checkpoints.author.kinds import Shapes
from fledge.checkpoints.author.sandbox import author_runs
from fledge.checkpoints.author.stand_ins import OpenName
from fledge.checkpoints.proof import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE
from fledge.errors import UserError


# What a forward may want beside the ids (B, T), by words of the argument's name; the first that works is taken.
def _masks(ids: Tensor) -> list[Tensor]:
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    added = torch.zeros(length, length, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    square = [allowed, added, ~allowed, allowed.double()]
    return [*square, *(m[None, None] for m in square), *(m[None] for m in square), torch.ones_like(ids)]


EXTRA = {
    r"mask": _masks,
    r"target|label|^y$|tgt": lambda ids: [ids],
    r"pos": lambda ids: [torch.arange(ids.shape[1]), torch.arange(ids.shape[1])[None].expand_as(ids), 0],
    r"type|segment": lambda ids: [torch.zeros_like(ids)],
    r"": lambda ids: [None, 0, False, ids],
}


NOT_CAUSAL = "In its forward a later token changes an earlier logit: is a mask or a transpose missing?"
RANDOM = "Its forward draws random numbers, so that it computes something else each time."
NOT_MIXING = "In its forward no token changes the logits of a later one: does attention run along the batch?"


class Author:
    """The author's module as a function: token ids (B, T) → logits (B, T or 1, V) in float64.

    Attributes:
        tolerance: how far from these logits float rounding inside the author's forward may lead.
        avoid: ids that its code treats apart, as padding.
        notes: sentences about how it was built and is called.
        values: name → (value, who says so) of what its code needed.
        context_length: what the code says of it, and where; None if it says nothing, or two things.
        doubt: a sentence about its forward if a later token changes an earlier logit, none changes a later one, or
            it draws random numbers.
    """

    def __init__(self, module: nn.Module, label: str, tensors: Mapping[str, Tensor]):
        self.module, self.label = module, label
        self.avoid = padding_ids(module)
        self.tolerance = FLOAT64_TOLERANCE
        self.doubt = ""
        self.widen: str | None = "doubles"
        self.length: int | None = None
        self.notes: list[str] = []
        self.values: dict[str, tuple[object, str]] = {}
        self.context_length: tuple[int, str] | None = None
        self.extra: dict[str, int] = {}
        self.transposed = False
        self.lengths = sorted({dim for t in tensors.values() for dim in t.shape if 1 < dim <= 4096})
        self.vocabulary = Shapes.of(tensors).by_kind["vocabulary"][0]
        self._settle_call()

    def __call__(self, ids: Tensor) -> Tensor:
        try:
            return self._run(ids)
        except Exception as error:  # whatever the author's code does
            raise UserError(
                f"--reference {self.label} fails in its forward: {type(error).__name__}: {one_line(error)}."
            ) from error

    def without_padding(self, ids: Tensor) -> Tensor:
        """Token ids in which each id that the code treats as padding is replaced by another."""
        other = next((i for i in range(self.vocabulary) if i not in self.avoid), 0)
        for padding in self.avoid:
            ids = torch.where(ids == padding, other, ids)
        return ids

    def agrees_with(self, other: "Author") -> bool:
        ids = self._probe()
        try:
            return bool((self(ids) - other(ids)).abs().max() <= 1e-9 * max(1.0, self(ids).abs().max().item()))
        except UserError:
            return True  # a value under which it does not run is none

    def describe(self, found: object, values: dict[str, tuple[object, str]]) -> None:
        self.values = values
        said = ", ".join(f"{name} {value} ({source})" for name, (value, source) in values.items())
        self.notes.insert(0, f"--reference is {found}" + (f" with {said}." if said else "."))
        if self.avoid:
            self.notes.append(
                f"Its code treats id {', '.join(map(str, sorted(self.avoid)))} as padding; probes leave it out."
            )

    def _probe(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.vocabulary, (1, min(4, *self.lengths)), generator=generator)
        return self.without_padding(ids)

    @torch.no_grad()
    def _run(self, ids: Tensor) -> Tensor:
        padded, length = ids, ids.shape[1]
        if self.length and length < self.length:
            filler = ids[:, -1:].expand(-1, self.length - length)
            padded = torch.cat([ids, filler], dim=1)
        extra = {name: _choices(name, padded)[index] for name, index in self.extra.items()}
        with author_runs("cpu", self.widen):
            output = self.module(padded.T if self.transposed else padded, **extra)
        logits = _logits(output, padded.shape[0], padded.shape[1], self.transposed)
        if logits.shape[1] > length:
            logits = logits[:, :length]
        logits = logits.double()
        are_shares = bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-6).all())
        return logits.log() if are_shares else logits

    def _settle_call(self) -> None:
        """Finds the arguments of the forward: precision, length, and what it takes besides the ids.

        The first way that is causal and reads earlier tokens is taken, or else the best one that works.

        Raises:
            UserError: it cannot be called.
            OpenName: it reads a value that nobody gave yet.
        """
        first: Exception | None = None
        works = None
        for extra, transposed in self._ways():
            self.extra, self.transposed = extra, transposed
            try:
                quality = self._try()
            except OpenName:
                raise
            except Exception as error:  # whatever the author's code does
                first = first or error
                continue
            if works is None or sum(quality) > sum(works[0]):
                works = quality, self.extra, self.transposed, self.widen, self.length
            if quality == (True, True):
                break
        if works is None:
            assert first
            raise UserError(
                f"--reference {self.label} fails in its forward: {type(first).__name__}: {one_line(first)}."
            ) from first
        (causal, mixing), self.extra, self.transposed, self.widen, self.length = works
        self.doubt = "" if causal and mixing else NOT_CAUSAL if mixing else NOT_MIXING
        self.doubt = self.doubt if self._repeats() else RANDOM
        if self.widen is None:
            self.tolerance = FLOAT32_TOLERANCE * self(self._probe()).abs().max().item()
            self.notes.append(f"Its forward runs in float32 only; logits are compared within {self.tolerance:.1e}.")
        else:
            self.module.double()
        for name, index in self.extra.items():
            self.notes.append(f"Its forward is given {name} {_named(name, self._probe(), index)}.")

    def _ways(self) -> Iterator[tuple[dict[str, int], bool]]:
        """Which of its `_choices` each argument gets, and whether the ids are (T, B); a mask is tried last."""
        parameters = list(inspect.signature(self.module.forward).parameters.values())[1:]
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needed = [p.name for p in plain if p.default is p.empty]
        masks = [p.name for p in plain if "mask" in p.name.lower() and p.name not in needed]
        probe = self._probe()
        for optional in ([], *([name] for name in masks)):
            wanted = [*needed, *optional]
            for indices in product(*(range(len(_choices(name, probe))) for name in wanted)):
                for transposed in (False, True):
                    yield dict(zip(wanted, indices, strict=True)), transposed

    def _try(self) -> tuple[bool, bool]:
        """Calls the forward in one way, in float64 where that works, and padded to a length where it must be.

        Returns:
            Whether no later token changes an earlier logit, and whether an earlier token changes a later one.
        """
        failure: Exception | None = None
        for widen, length in product(("doubles", "all", None), (None, *self.lengths[::-1])):
            if length is not None and length > 2048:
                continue
            self.widen, self.length = widen, length
            # to(float64) would drop the imaginary part of a complex table of rotations.
            self.module.double() if widen else self.module.float()
            try:
                ids = self._probe()
                logits = self._run(ids)
            except OpenName:
                raise
            except Exception as error:  # whatever the author's code does
                failure = failure or error
                continue
            if not logits.isfinite().all():
                raise ValueError("its logits are not finite")
            return self._quality(ids, logits)
        assert failure
        raise failure

    def _repeats(self) -> bool:
        """Whether its logits do not depend on the state of the random numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = self._run(self._probe())
            torch.manual_seed(2)
            second = self._run(self._probe())
        # Some CPUs round by where a tensor lies in memory.
        rounding = FLOAT32_TOLERANCE * first.nan_to_num(0, 0, 0).abs().max().item()
        return torch.allclose(first, second, rtol=0, atol=rounding, equal_nan=True)

    def _quality(self, ids: Tensor, logits: Tensor) -> tuple[bool, bool]:
        if ids.shape[1] < 2 or logits.shape[1] < ids.shape[1]:
            return True, True
        swap = next(i for i in range(self.vocabulary) if i not in self.avoid and i not in ids[0])
        late, early = ids.clone(), ids.clone()
        late[0, -1], early[0, 0] = swap, swap
        causal = bool(torch.allclose(self._run(late)[:, :-1], logits[:, :-1], atol=1e-6))
        return causal, not torch.allclose(self._run(early)[:, -1], logits[:, -1], atol=1e-12)


def _choices(name: str, ids: Tensor) -> list:
    return next(make(ids) for words, make in EXTRA.items() if re.search(words, name.lower()))


def _named(name: str, ids: Tensor, index: int) -> str:
    value = _choices(name, ids)[index]
    return f"of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else repr(value)


def _logits(output: object, batch: int, length: int, transposed: bool) -> Tensor:
    """The logits (B, T or 1, V) in the result of a forward: a tensor, or one in a tuple, a mapping or an object."""
    if isinstance(output, Mapping):
        output = output.get("logits", list(output.values()))
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)):
        tensors = [item for item in output if isinstance(item, Tensor) and item.is_floating_point()]
        output = next((item for item in tensors if item.dim() >= 2), None)
    if not isinstance(output, Tensor) or output.dim() not in (2, 3):
        raise TypeError("it must return logits (B, T, V), alone or beside a loss")
    if output.dim() == 2:
        output = (
            output.unflatten(0, (batch, length)) if len(output) == batch * length and length > 1 else output[:, None]
        )
    return output.transpose(0, 1) if transposed else output


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def padding_ids(module: nn.Module) -> set[int]:
    """Ids that attributes of a module name as padding."""
    found = set()
    for part in module.modules():
        for name, value in vars(part).items():
            if re.search(r"pad_?(token)?_?(id|idx|index|token)$|padding_idx", name) and type(value) is int:
                found.add(value)
    return found
