"""A patch written into a model's weights, from which it can be undone bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from thought_kernels.models import describe
from thought_kernels.models.linear import is_linear, is_plain, linear_weight
from thought_kernels.models.sharded import gathered, is_sharded, local, put_back
from thought_kernels.ops.caller import warn
from thought_kernels.ops.checks import addresses
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import SitePatch, is_finite
from thought_kernels.patches.vectors import Placed, placed

_ROWS_PER_CHUNK = 4096
_logger = logging.getLogger(__name__)


class _Left(NamedTuple):
    """What a merge left behind: the patch's checksums, and those of the weights that it wrote, by name."""

    patch: tuple[Any, ...]
    weights: dict[str, int]


# Whether or not the handles were kept, for the patch that is merged a second time. Entries go with their models.
_LEFT: WeakKeyDictionary[nn.Module, list[_Left]] = WeakKeyDictionary()


class MergedPatch:
    """A patch written into a model's weights; ``ThoughtPatch.merge_`` makes it, ``undo`` ends it.

    Attributes:
        fold_residuals: per (block, site) whose vector was folded into Δ, the relative squared error of doing so on the
            fitted rows, None where it is unknown.
        dropped: (block, site) whose vector was left out.

    Args:
        patch: the patch.
        model: a transformers model.
        fold: whether vectors may be folded into matrices.
        drop: whether vectors may be left out that have no place.
        backup_device: where the originals are kept, None for beside the weights.
        function: opens the sentences of refusal.
        instead: what else can be done with a vector that has no place.
    """

    def __init__(
        self,
        patch: PatchData,
        model: Any,
        *,
        fold: bool,
        drop: bool = False,
        backup_device: torch.device | str | None,
        function: str = "merge_",
        instead: str = "use applied",
    ) -> None:
        self._function = function
        self.fold_residuals: dict[tuple[int, str], float | None] = {}
        plan: list[_Edit] = []
        parts, self.dropped = placed(function, patch, model, instead=instead, fold=fold, drop=drop)
        for part in parts:
            plan.extend(self._planned(part))
        self._model: nn.Module = describe(model).model
        names = {id(p): name for name, p in self._model.named_parameters()}
        _check_writable(function, self._model, plan, names)
        for (layer, site), residual in self.fold_residuals.items():
            known = "unknown" if residual is None else f"{residual:.3g}"
            _logger.warning(
                "%s: block %d, site %r: vector folded into the matrix, relative squared error %s",
                function,
                layer,
                site,
                known,
            )

        merged = _checksums(patch)
        _warn_of_a_second(self._model, merged)
        self._originals: list[tuple[str, Tensor, Tensor]] = []
        try:
            self._write(plan, names, backup_device)
        except BaseException:
            self._restore()
            raise
        self._written = [checksum(parameter) for _, parameter, _ in self._originals]
        written = {name: total for (name, _, _), total in zip(self._originals, self._written, strict=True)}
        self._left = _Left(merged, written)
        _LEFT.setdefault(self._model, []).append(self._left)

    def undo(self) -> None:
        """Restores the weights bit for bit; calling it again does nothing.

        Raises:
            ValueError: the weights changed since, by a later merge (undo that first) or otherwise, or were replaced by
                other parameters; nothing is written, and the originals are kept.
        """
        # By identity: load_state_dict(assign=True) and assignments leave a parameter here that the model no longer has.
        present = {id(parameter) for parameter in self._model.parameters()}
        replaced = [name for name, parameter, _ in self._originals if id(parameter) not in present]
        if replaced:
            raise ValueError(
                f"undo: weights must be the parameters that merge_ wrote, got another at {replaced[0]}; put them back, "
                "or load the model anew"
            )
        for (_, parameter, original), written in zip(self._originals, self._written, strict=True):
            if parameter.dtype != original.dtype or checksum(parameter) != written:
                raise ValueError(
                    "undo: weights must be as merge_ left them, got other values; undo later merges first, latest first"
                )
        self._restore()

    def __enter__(self) -> MergedPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.undo()
        except ValueError as undo_error:
            if error is None:
                raise
            error.add_note(str(undo_error))  # what went wrong first is what the caller must see

    def _planned(self, part: Placed) -> Iterator[_Edit]:
        (layer, site), entry = part.key, part.entry
        where = f"block {layer}, site {site!r}"
        named = zip(part.modules, part.names, strict=True)
        linears = [_plain_linear(self._function, module, name, entry.input_width, where) for module, name in named]
        change = entry if entry.matrix is not None or entry.factors is not None else None
        if part.folds:
            self.fold_residuals[part.key] = entry.fit.fold_residual if entry.fit is not None else None
            change = entry.to(dtype=torch.float64).folded()
        for linear in linears:
            yield _Edit(linear, change, None if part.folds else entry.vector, site == "down")

    @torch.no_grad()
    def _write(self, plan: list[_Edit], names: dict[int, str], backup_device: torch.device | str | None) -> None:
        for linear, change, bias, adds in plan:
            weight = gathered(linear_weight(linear))
            if bias is not None:
                wide = _wide(weight)
                shift = bias.to(wide)
                self._back_up(names[id(linear.bias)], linear.bias, backup_device)
                changed = gathered(linear.bias)
                changed.copy_(_wide(changed) + (shift if adds else wide @ shift))
                self._put_back(linear.bias, changed)
            if change is not None:
                self._back_up(names[id(linear.weight)], linear.weight, backup_device)
                _write(weight, change, adds)
                self._put_back(linear_weight(linear), weight)

    def _put_back(self, parameter: Tensor, changed: Tensor) -> None:
        """Leaves in a parameter, or in each process's part of it, what it was changed to."""
        if not is_finite(changed):
            raise ValueError(f"{self._function}: patch must fit into {changed.dtype}, got an overflow; scale it down")
        put_back(parameter, changed)

    def _back_up(self, name: str, parameter: Tensor, device: torch.device | str | None) -> None:
        mine = local(parameter.detach())
        self._originals.append((name, parameter, mine.to(device or mine.device, copy=True)))

    def _restore(self) -> None:
        with torch.no_grad():
            while self._originals:
                _, parameter, original = self._originals[-1]
                local(parameter).copy_(original)
                self._originals.pop()
        self._written = []
        left = _LEFT.get(self._model, [])
        left[:] = [one for one in left if one is not getattr(self, "_left", None)]


class _Edit(NamedTuple):
    """What is written into one module: W <- W (1 + Δ) and b <- b + W v, or where it adds, W <- W + Δ and b <- b + v.

    Attributes:
        linear: the module.
        change: Δ, whose vector is not read, or None.
        bias: v, or None.
        adds: whether Δ and v are of the module's output.
    """

    linear: Any
    change: SitePatch | None
    bias: Tensor | None
    adds: bool


def _plain_linear(function: str, module: Any, name: str, width: int | None, where: str) -> Any:
    if not is_linear(module):
        raise ValueError(
            f"{function}: {name} must be a torch.nn.Linear, got {type(module).__module__}.{type(module).__name__}; "
            f"{where}: use applied, or export a LoRA"
        )
    for parameter in (module.weight, module.bias):
        if parameter is None:
            continue
        ordinary = type(parameter) is nn.Parameter or is_sharded(parameter)
        if not ordinary or not is_plain(local(parameter)):
            raise ValueError(
                f"{function}: {name} must have plain floating weights, got {type(parameter.data).__name__} of "
                f"{parameter.dtype} on {parameter.device}; {where}: quantised weights are never written, use applied, "
                "or export a LoRA"
            )
    found = linear_weight(module).shape[1]
    if width not in (None, found):
        raise ValueError(f"{function}: {name} must take inputs of width {width}, got {found}; {where}")
    return module


def _check_writable(function: str, model: nn.Module, plan: list[_Edit], names: dict[int, str]) -> None:
    """Raises unless what is to be written is finite and belongs to one parameter each."""
    written = [edit.linear.weight for edit in plan if edit.change is not None]
    written += [edit.linear.bias for edit in plan if edit.bias is not None]
    _check_unshared(function, model, written)
    for parameter in written:
        if not is_finite(gathered(parameter)):
            raise ValueError(
                f"{function}: {names[id(parameter)]} must be finite, got NaN or an infinity before the patch"
            )


def _check_unshared(function: str, model: nn.Module, written: list[Tensor]) -> None:
    """Raises if memory to be written belongs to another parameter as well, which would change along with it."""
    owners = [
        (name, parameter, *addresses(local(parameter)))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.numel() and not parameter.is_meta
    ]
    for target in written:
        start, end = addresses(local(target))
        names = [
            name
            for name, parameter, low, high in owners
            if low < end and start < high and parameter.device == target.device
        ]
        if len(names) > 1:
            raise ValueError(
                f"{function}: weights must not be shared, got {' and '.join(names)} as one memory; use applied"
            )


def _wide_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(_wide_dtype(weight))


def _write(weight: Tensor, change: SitePatch, adds: bool) -> None:
    """W <- W + W Δ, or W + Δ, some rows at a time: wide copies of a whole weight would be several times its size."""
    # Factors are multiplied out in float64: their product is not to be rounded before it meets the weights.
    matrix = (change.to(dtype=torch.float64) if change.rank else change).dense()
    assert matrix is not None
    matrix = matrix.to(weight.device, _wide_dtype(weight))
    for start in range(0, weight.shape[0], _ROWS_PER_CHUNK):
        chunk = slice(start, start + _ROWS_PER_CHUNK)
        wide = _wide(weight[chunk])
        weight[chunk] = wide + (matrix[chunk] if adds else wide @ matrix)


def _checksums(patch: PatchData) -> tuple[Any, ...]:
    """What tells one patch's numbers from another's."""
    return tuple(
        (key, *((name, checksum(tensor)) for name, tensor in entry.tensors().items()))
        for key, entry in patch.entries.items()
    )


def _warn_of_a_second(model: nn.Module, patch: tuple[Any, ...]) -> None:
    """Warns where the same patch is in the weights already and they are as it left them: it would act twice."""
    earlier = [left for left in _LEFT.get(model, []) if left.patch == patch]
    if not earlier:
        return
    parameters = dict(model.named_parameters())
    for left in earlier:
        if all(name in parameters and checksum(parameters[name]) == total for name, total in left.weights.items()):
            warn(
                "merge_: patch should be merged once, got one that is in these weights already and now acts twice; "
                "undo() one of the two, or say 2 * patch if that is meant"
            )
            return


def checksum(parameter: Tensor) -> int:
    """The sum of a parameter's bit patterns modulo 2⁶⁴: any edit but a permutation is all but certain to change it."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = local(parameter).contiguous().view(integers[parameter.element_size()])
    return int(bits.sum(dtype=torch.int64))
