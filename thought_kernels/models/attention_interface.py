"""paired_attention and shared_prefix_attention as an attention implementation of any Hugging Face model.

    model.set_attn_implementation(attention_interface.register())
    document = attention_interface.collect_prefix(model, document_ids)                       # once
    start = len(document_ids)

    # each row picks the prefix it sees: many contexts, one forward
    model(ids, position_ids=positions, shared_prefixes=[document, header], prefix_index=torch.tensor([0, 1]))

    # one stream, which sees the document; observe gets each layer's attention without it, and the difference
    model(ids, position_ids=start + arange, with_prefix=document, without_prefix=None, observe=keep)

transformers hands unknown keyword arguments of a forward to the attention function of every layer, so nothing is
stored between calls. A prefix stands right before a row's token 0; positions are the caller's, as the rotary embedding
must know them. Kernels compute causal masks, windows and right padding from numbers: no mask is ever built. A cache of
earlier keys is read as a prefix of each row's own, so that generate() works, of prompts of one length; the package's
own generation and fitting take transformers' eager attention meanwhile (undisturbed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thought_kernels.ops.paired_attention import Prefix, paired_attention
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention

NAME = "thought_kernels"

Observer = Callable[[int, Tensor, Tensor], None]

# Arguments by which models change the scores; ignoring one would be silently wrong.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


def register() -> str:
    """Registers the attention function and its mask function with transformers; a second call changes nothing.

    Returns:
        The name for ``model.set_attn_implementation`` or ``from_pretrained(attn_implementation=)``.

    Raises:
        ImportError: if transformers is not installed, or is older than its attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, padding_mask)  # without it every mask is None, padding included
    return NAME


@torch.no_grad()
def collect_prefix(model: Any, input_ids: Tensor, **options: Any) -> list[Prefix]:
    """The keys and values of a prefix at every layer, computed once and then shared by any number of rows.

    Args:
        model: a transformers model whose attention implementation is NAME; best without its language-model head.
        input_ids: token ids of the prefix, ``[P]``, P ≥ 1.
        options: further arguments of the model's forward, such as position_ids ``[1, P]``, or with_prefix to extend
            another prefix's reading.

    Returns:
        Per layer (key, value), each ``[Hkv, P, D]``; keys are rotated to positions 0 to P − 1 unless given.

    Raises:
        ValueError: if input_ids is not ``[P]``, or the model does not hand keyword arguments to its attention function.
    """
    if input_ids.dim() != 1 or not len(input_ids):
        raise ValueError(f"collect_prefix: input_ids must have shape [P] with P ≥ 1, got {list(input_ids.shape)}")
    collected: dict[int, Prefix] = {}
    model(input_ids[None], use_cache=False, collect=collected, **options)
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(collected) != list(range(layers)):
        raise ValueError(
            f"collect_prefix: model must call the attention function {NAME!r} with its forward's keyword arguments at "
            f"each of {layers} layers, got {len(collected)} such layers in {type(model).__name__}; "
            "call model.set_attn_implementation(attention_interface.register()) first"
        )
    return [collected[layer] for layer in range(layers)]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prefixes: Sequence[Sequence[Prefix] | Mapping[int, Prefix]] = (),
    prefix_index: Tensor | None = None,
    with_prefix: Sequence[Prefix] | None = None,
    without_prefix: Sequence[Prefix] | None = None,
    observe: Observer | None = None,
    collect: dict[int, Prefix] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; arguments after softcap are the caller's, from model(...).

    Without any of them it is plain causal attention.

    Args:
        module: the attention module, with ``layer_idx``.
        query: ``[B, Hq, T, D]`` after rotary embedding.
        key, value: ``[B, Hkv, T, D]``.
        attention_mask: ``[B, T]`` from padding_mask, or None.
        dropout: must be 0.
        scaling, sliding_window, softcap: scale, window and softcap of paired_attention.
        shared_prefixes: each from collect_prefix; with prefix_index ``[B]``, −1 for none.
        with_prefix: from collect_prefix; the residual stream goes on from attention with it.
        without_prefix: what the other side of the pair sees in its place, or None for nothing.
        observe: called as observe(layer, without, delta) with paired_attention's two outputs, ``[B, Hq, T, D]``.
        collect: receives (key, value) of row 0 by layer.

    Returns:
        (attention output ``[B, T, Hq, D]``, None): attention weights are never formed.

    Raises:
        ValueError: cached keys beside prefixes, a non-causal layer, dropout, gradients, or what paired_attention
            refuses.
    """
    _refuse(module, query, dropout, others)
    layer: int = module.layer_idx  # type: ignore[assignment]
    cached = key.shape[2] - query.shape[2]
    if cached:
        if with_prefix is not None or shared_prefixes:
            raise ValueError(
                f"attend: cache must be empty where prefixes are given, got {cached} keys; use_cache=False"
            )
        shared_prefixes = [{layer: (k, v)} for k, v in zip(key[:, :, :cached], value[:, :, :cached], strict=True)]
        prefix_index, key, value = torch.arange(len(query)), key[:, :, cached:], value[:, :, cached:]
    if collect is not None:
        collect[layer] = (key[0], value[0])
    limits: dict[str, Any] = {
        "lengths": _lengths(attention_mask, query), "window": sliding_window, "scale": scaling, "softcap": softcap,
    }  # fmt: skip
    if with_prefix is not None:
        if prefix_index is not None or shared_prefixes:
            raise ValueError("attend: with_prefix must be None where shared_prefixes are given, got both")
        other = None if without_prefix is None else without_prefix[layer]
        without, delta = paired_attention(query, key, value, with_prefix[layer], other, **limits)
        if observe is not None:
            observe(layer, without, delta)
        return (without.to(delta.dtype) + delta).to(query.dtype).transpose(1, 2), None
    if shared_prefixes and prefix_index is None:
        raise ValueError("attend: prefix_index must say which prefix each row sees, got None beside shared_prefixes")
    index = torch.full((len(query),), -1) if prefix_index is None else prefix_index
    prefixes = [prefix[layer] for prefix in shared_prefixes]
    o = shared_prefix_attention(query, key, value, prefixes, index.to(query.device), **limits)
    return o.transpose(1, 2), None


def padding_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask function that transformers calls: checks what the kernels can express and hands the padding on.

    Args:
        batch_size: rows.
        q_length, kv_length: how many queries and keys; equal where no keys are cached.
        q_offset, kv_offset: the first query's and the first key's place in the sequence.
        mask_function: (batch, head, query, key) -> visible, which must be causal, within a window of local_size or
            without limit.
        attention_mask: ``[B, T]``, zero at padding on the right, or None.
        local_size: the sliding window, or None.
        device: of the model's inputs.
        others: settings of other implementations.

    Returns:
        attention_mask, None where keys are cached.

    Raises:
        ValueError: another pattern (bidirectional, chunked or packed attention), padding on the left or among cached
            keys, or a cache of a fixed size.
    """
    end = int(q_offset) + q_length
    if int(kv_offset) + kv_length != end:
        raise ValueError(
            f"padding_mask: cache must end with the last of {end} tokens, got room for {int(kv_offset) + kv_length}; "
            "use a cache that grows"
        )
    row, i, j = (torch.arange(count, device=device) for count in (batch_size, q_length, kv_length))
    row, i, j = row[:, None, None], i[:, None] + int(q_offset), j + int(kv_offset)
    expected = (j <= i) & (True if local_size is None else i - j < local_size)
    pattern = torch.as_tensor(mask_function(row, torch.zeros_like(row), i, j), device=device)
    if not bool((pattern == expected).all()):
        raise ValueError(
            f"padding_mask: model must attend causally, within a window or without limit, got another pattern over "
            f"{q_length} tokens; use another attention implementation for it"
        )
    if attention_mask is None or q_length == kv_length:
        if attention_mask is not None and (attention_mask[:, 1:].int() > attention_mask[:, :-1].int()).any():
            raise ValueError("padding_mask: attention_mask must be zero on the right only, got padding on the left")
        return attention_mask
    if not bool(attention_mask.all()):
        raise ValueError(
            "padding_mask: attention_mask must be all ones where keys are cached, got padding; take prompts of one "
            "length"
        )
    return None


def _lengths(attention_mask: Tensor | None, query: Tensor) -> Tensor | None:
    if attention_mask is None:
        return None
    expected = [query.shape[0], query.shape[2]]
    if list(attention_mask.shape) != expected:
        raise ValueError(f"attend: attention_mask must have shape {expected}, got {list(attention_mask.shape)}")
    return attention_mask.long().sum(-1)


def _refuse(module: nn.Module, query: Tensor, dropout: float, others: dict[str, Any]) -> None:
    if not getattr(module, "is_causal", True):
        raise ValueError(f"attend: module must be causal, got {type(module).__name__} with is_causal=False")
    if dropout:
        raise ValueError(f"attend: dropout must be 0, got {dropout}; call model.eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("attend: query must not require a gradient, got one; use torch.no_grad()")
    present = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if present:
        raise ValueError(f"attend: model must not pass {' or '.join(_UNSUPPORTED)}, got {', '.join(present)}")
