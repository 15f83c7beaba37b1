"""Models whose weights tensor parallelism has divided among processes, as transformers' ``tp_plan="auto"`` does.

Their weights are DTensors: queries, keys, values and the MLP's inputs have some rows of W in each process, o_proj and
down_proj some columns. So a process has some of the heads and some of the MLP's width, and what stands before o_proj
and down_proj is a part, until an all-reduce behind them makes the residual stream whole again. Patches act on the whole
of it: here parts are put together and cut. All processes must make the same calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thought_kernels.models.linear import input_width


def is_sharded(weight: Any) -> bool:
    """Whether a weight is a DTensor, of which this process has a part."""
    return hasattr(weight, "device_mesh")


def _by_columns(weight: Any) -> bool:
    """Whether a weight is divided by columns, which only tensor parallelism does: FSDP takes rows."""
    return is_sharded(weight) and weight.dim() == 2 and [p.is_shard(1) for p in weight.placements] == [True]


def group_of(model: Any) -> dist.ProcessGroup | None:
    """The processes among which a model's weights are divided, None where each has them all."""
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)  # of a Decoder
    weights: Iterable[Any] = module.parameters() if isinstance(module, nn.Module) else ()
    return next((weight.device_mesh.get_group() for weight in weights if _by_columns(weight)), None)


def check_whole(function: str, model: Any) -> None:
    """Raises ValueError, which opens with the function's name, for a model whose weights are divided in any way."""
    for name, weight in model.named_parameters():
        if is_sharded(weight):
            raise ValueError(
                f"{function}: model must have whole weights in each process, got {name} divided among "
                f"{weight.device_mesh.size()} of them; load it without tp_plan or FSDP, with device_map='auto' if it "
                "is too large for one device"
            )


def check_sharding(model: Any) -> None:
    """Raises ValueError for a model that is divided in another way than this module knows."""
    size = getattr(model, "_tp_size", None)
    if getattr(model, "_device_mesh", None) is None and size in (None, 1):  # as transformers leaves them
        return
    advice = "load it with distributed_config=DistributedConfig(tp_plan='auto') alone, or with device_map='auto'"
    for name, module in model.named_modules():
        if getattr(module, "_hf_quantized_needs_local_tp", False):
            raise ValueError(f"describe: a model that is divided must be without quantisation, got {name}; {advice}")
    for name, weight in model.named_parameters():
        if is_sharded(weight) and weight.device_mesh.ndim > 1:
            raise ValueError(
                f"describe: model must be divided by tensor parallelism alone, got {name} divided over "
                f"{weight.device_mesh.mesh_dim_names}; {advice}"
            )


def takes_part(model: Any, name: str) -> bool:
    """Whether modules of this name take a part of their input: those that cut it themselves take the whole."""
    plan = getattr(model, "tp_plan", None) or {}
    return any(key.endswith(f".{name}") and style == "rowwise" for key, style in plan.items())


def whole(module: Any, x: Tensor, *, for_part: bool = False) -> Tensor:
    """A linear module's input [..., d_in] from the parts of it that the processes have; x itself where it is whole.

    Args:
        module: the module.
        x: its input, or this process's part of it.
        for_part: whether each process makes something else of it, so that their gradients are to be added up.
    """
    weight: Any = getattr(module, "weight", None)
    if not _by_columns(weight) or x.shape[-1] == input_width(module):
        return x
    from torch.distributed.tensor import DTensor, Partial, Shard

    shape = torch.Size([*x.shape[:-1], input_width(module)])  # told, since the last part may be narrower
    stride = torch.empty(shape, device="meta").stride()
    x = x.contiguous()
    parts = DTensor.from_local(x, weight.device_mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)
    return parts.full_tensor(grad_placements=[Partial()] if for_part else None)


def part(module: Any, x: Tensor) -> Tensor:
    """This process's part of a linear module's whole input [..., d_in]; x itself where nothing is divided."""
    weight: Any = getattr(module, "weight", None)
    if not _by_columns(weight):
        return x
    width, start = _share(x.shape[-1], weight.device_mesh)
    return x[..., start : start + width].contiguous()


def _share(width: int, mesh: Any) -> tuple[int, int]:
    """How wide a process's part is at most, and where this one's begins: the last may have less, as DTensor cuts."""
    size = -(-width // mesh.size())
    return size, mesh.get_local_rank() * size


def part_of_rows(module: Any, tensor: Tensor) -> Tensor:
    """Those rows of a tensor, or numbers of a vector, that belong to this process's part of the module's input."""
    return part(module, tensor.T).T.contiguous() if tensor.dim() > 1 else part(module, tensor)


def summed(module: Any, x: Tensor) -> Tensor:
    """The sum over all processes of what each has made of its part of a linear module's input."""
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(x, module.weight.device_mesh, [Partial()], run_check=False).full_tensor()


def gathered(weight: Any) -> Any:
    """A weight from all processes; the weight itself where it is whole."""
    return weight.detach().full_tensor() if is_sharded(weight) else weight


def local(weight: Any) -> Any:
    """What this process holds of a weight, in the same memory."""
    return weight.detach().to_local() if is_sharded(weight) else weight


@torch.no_grad()
def taken(weight: Any, rows: Tensor, columns: Tensor) -> Tensor:
    """The numbers weight[rows, columns], from whichever processes hold them."""
    mine = local(weight)
    if mine is weight or not any(placement.is_shard() for placement in weight.placements):
        return mine[rows, columns]
    dim = weight.placements[0].dim
    places, mesh = [rows, columns], weight.device_mesh
    places[dim] = places[dim] - _share(weight.shape[dim], mesh)[1]
    here = (places[dim] >= 0) & (places[dim] < mine.shape[dim])
    # As integers, whose sum with zeros is exact: of floats -0 + 0 is 0.
    numbers = torch.zeros(len(rows), dtype=torch.int64, device=mine.device)
    numbers[here] = mine[places[0][here], places[1][here]].double().view(torch.int64)
    dist.all_reduce(numbers, group=mesh.get_group())
    return numbers.view(torch.float64).to(weight.dtype)


@torch.no_grad()
def put_back(weight: Any, changed: Tensor) -> None:
    """Writes what ``gathered`` gave, and was changed since, into each process's part."""
    if not is_sharded(weight):
        return
    from torch.distributed.tensor import distribute_tensor

    # No process sends anything: all have the same.
    mine = distribute_tensor(changed, weight.device_mesh, weight.placements, src_data_rank=None)
    local(weight).copy_(mine.to_local())


def agreed(numbers: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The group's first process's numbers, in place: one rounding must not part what processes write."""
    if group is not None:
        dist.broadcast(numbers, src=dist.get_global_rank(group, 0), group=group)
    return numbers
