"""`--reference`: finds the author's module in their files and builds it with the checkpoint's weights.

This is the one place where Fledge runs somebody's code, because they asked for it by name.
"""

import contextlib
import json
from collections.abc import Mapping
from itertools import combinations, product

import torch

from fledge.checkpoints.author.call import Author
from fledge.checkpoints.author.files import Files, Found
from fledge.checkpoints.author.kinds import HEADS, kind_of
from fledge.checkpoints.author.search import prefix_of
from fledge.checkpoints.author.stand_ins import OpenName
from fledge.checkpoints.loading import Checkpoint
from fledge.errors import UserError

MOST_CHANGES, MOST_RUNS = 200, 12
SIZES = ("width", "layers")
"""Kinds of values that tell the code's models apart."""

HARMLESS_KINDS = ("dropout", "device", "padding", "context", "vocabulary", "vocabulary itself", "width", "layers")
"""Kinds of values that either change the shapes or change no logits."""


def load_reference(
    spec: str, kwargs: str | None, checkpoint: Checkpoint, told: Mapping[str, object] | None = None
) -> Author:
    """The author's own module with the checkpoint's weights: token ids (B, T) → logits (B, T or 1, V), in float64.

    Args:
        spec: `FILE`, `FILE:CLASS`, or a folder; scripts and notebooks, of which only definitions are run.
        kwargs: JSON of values for names in its code: arguments, fields of its config, globals.
        checkpoint: the loaded file.
        told: what flags say, such as `n_head`.

    Raises:
        UserError: no such file or class, none that has the checkpoint's tensors, a value that nothing shows and on
            which the logits depend, or a forward that fails.
    """
    try:
        given = json.loads(kwargs) if kwargs else {}
    except ValueError as error:
        raise UserError(f"--reference_kwargs is no JSON object: {error}.") from error
    if not isinstance(given, dict):
        raise UserError(f"--reference_kwargs is no JSON object: it is a {type(given).__name__}.")
    files = Files(spec, given, checkpoint, told or {})
    fitting: list[Author] = []
    tried: list[Found] = []
    for source, name in files.candidates():
        print(f"--reference runs {name} of {files.label(source)}, and what it uses.", flush=True)
        found = files.solve(source, name)
        if any(found.solution.score):
            tried.append(found)
            continue
        fitting.append(author_of(found, checkpoint))
        if not fitting[0].agrees_with(fitting[-1]):
            raise UserError(
                f"--reference {spec}: {fitting[0].label} and {fitting[-1].label} both have its tensors and "
                "compute different logits; name the one that trained it as FILE:CLASS."
            )
    if not fitting:
        raise UserError(_why_none(spec, files, tried))
    fitting[0].context_length = files.context_length(fitting[0])
    return fitting[0]


def author_of(found: Found, checkpoint: Checkpoint) -> Author:
    """The module with its weights, after checking whether values that no shape shows change its logits.

    Raises:
        UserError: one does, and nobody states it.
    """
    _complete(found, checkpoint)
    values, others = found.solution.values, _same_shapes(found)
    runs = [(change, author) for change in others if (author := _running(found, values | change, checkpoint))]
    author = _running(found, values, checkpoint)
    if author is None and runs:  # a guess that has the shapes, and with which the forward fails
        (change, author), *runs = runs
        values |= change
        found.solution.sources.update(dict.fromkeys(change, "the first that runs"))
    author = author or _loaded(found, values, checkpoint)
    different = [change for change, other in runs if not author.agrees_with(other)]
    if different:
        names = list(dict.fromkeys(name for other in different for name in other))
        choices = [", ".join(f"{n} {(values | other)[n]}" for n in names) for other in [{}, *different][:6]]
        said = json.dumps({name: values[name] for name in names})
        raise UserError(
            f"--reference {found} fits the checkpoint's shapes with {'; '.join(dict.fromkeys(choices))}, which compute "
            "different logits, and neither the checkpoint nor the code says which; pass the right one as "
            f"--reference_kwargs '{said}'."
        )
    author.describe(found, {n: (v, found.solution.sources[n]) for n, v in values.items()})
    return author


def _complete(found: Found, checkpoint: Checkpoint) -> None:
    """Adds the values that only the forward reads, such as config fields that no constructor uses.

    Raises:
        UserError: nothing shows what one of them is.
    """
    values, solver = found.solution.values, found.solver
    while True:
        try:
            _loaded(found, values, checkpoint)
        except OpenName as error:
            slot = solver.slots.setdefault(error.name, solver.make_slot(error))
            if error.name in values or not slot.values():
                raise UserError(
                    f"--reference {found} reads {error.name} in its forward, and nothing shows what it is; pass it as "
                    "--reference_kwargs JSON."
                ) from error
            values[error.name], found.solution.sources[error.name] = slot.values()[0]
        except UserError:  # another value of what is guessed may run
            return
        else:
            return


def _same_shapes(found: Found) -> list[dict[str, object]]:
    """Changes of one or two values that nothing clearly states and that keep all shapes."""
    values, unsure = found.solution.values, {}
    sizes = [(found.solver.slots.get(name), value) for name, value in values.items() if kind_of(name) in SIZES]
    others_size = any(slot and slot.stated and not slot.states(value) for slot, value in sizes)
    for name, value in values.items():
        slot, kind = found.solver.slots.get(name), kind_of(name)
        # Where the code states a model of another size, its number of heads is that model's.
        doubtful = others_size and kind in HEADS and slot is not None and slot.only_in_code()
        if slot and kind not in (*HARMLESS_KINDS, None) and (doubtful or not slot.is_sure(value)):
            stated = [v for v, _, _ in slot.stated]
            choices = stated if value in stated and not doubtful else [v for v, _ in slot.values()]
            unsure[name] = [v for v in dict.fromkeys(choices) if v != value][:12]
    changes = [{name: value} for name, choices in unsure.items() for value in choices]
    for one, two in sorted(combinations(unsure, 2), key=lambda pair: -sum(kind_of(name) in HEADS for name in pair)):
        changes += [{one: a, two: b} for a, b in product(unsure[one][:6], unsure[two][:6])]
    fitting = [change for change in changes[:MOST_CHANGES] if not any(found.solver.score(values | change)[0])]
    return fitting[:MOST_RUNS]


def _running(found: Found, values: Mapping[str, object], checkpoint: Checkpoint) -> Author | None:
    try:
        return _loaded(found, values, checkpoint)
    except UserError:
        return None


def _loaded(found: Found, values: Mapping[str, object], checkpoint: Checkpoint) -> Author:
    module = found.build(values, "cpu")
    prefix = prefix_of(module, checkpoint.tensors)
    module.load_state_dict({prefix + name: tensor for name, tensor in checkpoint.tensors.items()}, strict=False)
    own = module.state_dict()
    for name, tensor in checkpoint.tensors.items():
        if not torch.equal(own[prefix + name].to(tensor.dtype), tensor):
            raise UserError(
                f"--reference {found} ties {name} to another tensor, and the checkpoint has two different ones."
            )
    return Author(module.double().eval(), str(found), checkpoint.tensors)


def _why_none(spec: str, files: Files, tried: list[Found]) -> str:
    best = min(tried, key=lambda found: found.solution.score)
    cannot_be_built, *_ = best.solution.score
    values = ", ".join(f"{k}={v}" for k, v in best.solution.values.items() if kind_of(k) not in ("dropout", "device"))
    if cannot_be_built:
        return (
            f"--reference {spec}: {best} cannot be built from {values or 'nothing'} ({best.solution.error}); pass what "
            f"it needs as --reference_kwargs JSON{files.broken()}."
        )
    with contextlib.suppress(Exception):
        module = best.build(best.solution.values, "meta")
        own, wanted = module.state_dict(), best.files.checkpoint.tensors
        prefix = prefix_of(module, wanted)
        own = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
        only = [f"{name} (only in the checkpoint)" for name in wanted if name not in own]
        only += [
            f"{name} (only in the code)"
            for name, _ in module.named_parameters()
            if name.removeprefix(prefix) not in wanted
        ]
        shapes = [
            f"{name} {tuple(wanted[name].shape)} and not {tuple(own[name].shape)}"
            for name in wanted
            if name in own and wanted[name].shape != own[name].shape
        ]
        return (
            f"--reference {spec}: no class there has this checkpoint's tensors; {best} comes nearest, with "
            f"{values or 'no values'}, and differs in {', '.join([*only, *shapes][:3])}{files.broken()}; "
            "did this code train it?"
        )
    return f"--reference {spec}: no class there has this checkpoint's tensors{files.broken()}."
