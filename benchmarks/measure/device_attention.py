"""paired_attention on a device, against torch's flash attention and against the device's own speed."""

from __future__ import annotations

import harness  # puts tests/ and peers/ on the path
import torch
from dense_attention import dense_attention
from device_section import Section
from flash_attention import attention_peers
from harness import Case, Provider
from torch import Tensor

import thought_kernels as tk

# (tokens, prefix keys, head_dim, window, query heads, key heads), 2048 tokens a call or more. Heads of 256 are those of
# Gemma 3 4B; SmolLM2 135M and Qwen2.5 0.5B have heads of 64, Llama 3 8B and 70B of 128.
GEMMA = [(length, 256, 256, None, 8, 4) for length in (512, 1024, 128, 32, 4096)]
OTHERS = [
    (length, 256, head_dim, None, *heads)
    for length in (1024, 128)
    for head_dim, heads in ((64, (9, 3)), (128, (32, 8)), (64, (14, 2)), (128, (64, 8)))
]
FURTHER = [(1024, 256, 256, 512, 8, 4), (32, 1024, 256, None, 8, 4), (512, 2048, 256, None, 8, 4)]
FURTHER += [(length, 256, head_dim, None, 8, 4) for head_dim in (128, 64) for length in (512, 32, 4096)]
ATTENTION = [*GEMMA[:2], *OTHERS, *GEMMA[2:], *FURTHER]
TINY = [(8, 4, 16, None, 6, 2), (8, 4, 16, 5, 8, 4)]


def rates(section: Section) -> tuple[float, float]:
    """This device's FLOP/s of a large bfloat16 product, and bytes/s of a large copy."""
    n = 64 if section.tiny else 8192
    a = torch.randn(n, n, device=section.device, dtype=torch.bfloat16)
    source = torch.empty(n * n * 8, device=section.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    runs = {"product": lambda: a @ a, "copy": lambda: target.copy_(source)}
    providers = [Provider(name, run, dict) for name, run in runs.items()]
    case = Case("machine", "bfloat16 product; copy", f"{n}", "bfloat16")
    rows = section.measure(case, providers, {}, {})
    product, copy = (float(row["value"]) / 1e3 for row in rows)
    return 2 * n**3 / product, 2 * source.numel() / copy


def attention(section: Section) -> None:
    device = section.device
    flops, bandwidth = rates(section)
    for length, count, head_dim, window, heads, key_heads in section.cases(ATTENTION, TINY):
        batch = 2 if section.tiny else max(1, 2048 // length)
        shape = f"{batch}x{heads}/{key_heads} T{length} P{count} D{head_dim}"
        sizes = (batch, length, count, head_dim, window, heads, key_heads)
        run = lambda shape=shape, sizes=sizes: attention_case(section, shape, *sizes)  # noqa: E731
        rows = section.attempt(f"paired_attention {shape}", run) or []
        pairs = length * (length + 1) // 2 + length * count
        if window is not None:
            pairs = sum(min(window, count + i + 1) for i in range(length))
        own_bytes = batch * heads * length * head_dim * (2 + 2 + 4)
        own_bytes += 2 * 2 * key_heads * head_dim * (batch * length + count)
        floor = 1e3 * max(batch * heads * 4 * head_dim * pairs / flops, own_bytes / bandwidth)
        shares = [
            harness.row(
                Case(row["op"], row["case"], shape, row["dtype"]), row["provider"], "share of the floor",
                100 * floor / float(row["value"]), "%", device,
            )
            for row in rows
            if row["provider"].startswith("paired_attention")
        ]  # fmt: skip
        section.record(shares)


def attention_case(
    section: Section, shape: str, batch: int, length: int, count: int, head_dim: int, window: int | None, heads: int,
    key_heads: int,
) -> list[dict]:  # fmt: skip
    torch.manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=section.device).bfloat16()

    query = normal(batch, length, heads, head_dim).transpose(1, 2)  # as projections leave them
    key, value = (normal(batch, length, key_heads, head_dim).transpose(1, 2) for _ in range(2))
    prefix = (normal(key_heads, count, head_dim), normal(key_heads, count, head_dim))
    own = (query, key, value)
    one = slice(-1, None)  # of the batch: a float64 softmax of all would take longer than the timing

    def dense(dtype: torch.dtype) -> dict[str, Tensor]:
        rows = tuple(part[one] for part in own)
        together = dense_attention(*rows, prefix, window=window, dtype=dtype)
        without = dense_attention(*rows, window=window, dtype=dtype)
        return {"with": together, "without": without, "delta": together - without, "rounded delta": together - without}

    narrow, truth = dense(torch.bfloat16), dense(torch.float64)
    candidates = []
    peers = attention_peers(section.device, own, prefix) if window is None else {}
    for name, peer in peers.items():
        result = lambda peer=peer: {name: part[one] for name, part in peer().items()}  # noqa: E731
        candidates.append(Provider(name, peer, result))
    for backend in section.backends("paired_attention"):
        run = lambda backend=backend: tk.paired_attention(*own, prefix, window=window, backend=backend)  # noqa: E731
        result = lambda run=run: {  # noqa: E731
            name: part[one] for name, part in zip(("without", "delta"), run(), strict=True)
        }
        candidates.append(Provider(f"paired_attention ({backend})", run, result))
    case = Case("paired_attention", "full" if window is None else f"window of {window}", shape, "bfloat16")
    return section.measure(case, candidates, truth, narrow)
