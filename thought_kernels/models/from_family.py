"""A Decoder from a transformers model and the description of its family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from thought_kernels.models.block import Block
from thought_kernels.models.decoder import Decoder
from thought_kernels.models.families import Family
from thought_kernels.models.norm import Norm
from thought_kernels.models.sharded import check_sharding, takes_part

# Where transformers' classes hold the text blocks: nowhere below, or under one of these names.
_TEXT_MODELS = ("", "model", "transformer", "gpt_neox", "language_model", "model.language_model")


def build(model: Any, family: Family) -> Decoder:
    """The Decoder of a model of a family; see thought_kernels.models.describe.

    Raises:
        TypeError: if the family's blocks are not where they are in transformers' classes.
        ValueError: if attention is bidirectional, rotary frequencies depend on the sequence's length, or
            weights are divided among processes in a way that no patch can follow.
    """
    text = _text_model(model, family)
    config = text.config
    _check(config)
    check_sharding(model)
    shares_heads = takes_part(model, f"{family.attention}.{family.o_proj}")
    return Decoder(
        model=model,
        config=config,
        blocks=tuple(
            _block(index, layer, config, family, shares_heads)
            for index, layer in enumerate(getattr(text, family.layers))
        ),
        embed_tokens=getattr(text, family.embedding),
        embedding_multiplier=_setting(config, family.embedding_multiplier, 1.0),
        embed_positions=getattr(text, family.position_embedding) if family.position_embedding else None,
        norm=_norm(getattr(text, family.final_norm), family),
        lm_head=getattr(model, "lm_head", None),
        logit_divisor=_setting(config, family.logit_divisor, 1.0),
        # Only the text class caps its logits; transformers' multimodal class ignores the setting.
        logit_softcap=_setting(config, family.logit_softcap) if getattr(model, "model", None) is text else None,
        frequencies=lambda kind: frequencies(text, kind),
    )


def _text_model(model: Any, family: Family) -> Any:
    for path in _TEXT_MODELS:
        text = model
        for name in filter(None, path.split(".")):
            text = getattr(text, name, None)
        if hasattr(text, family.embedding) and hasattr(text, family.layers):
            return text
    raise TypeError(
        f"describe: model must hold {family.name}'s text blocks itself or at {', '.join(_TEXT_MODELS[1:])}, "
        f"got {type(model).__name__}"
    )


def _check(config: Any) -> None:
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(
            "describe: model must use causal attention, got use_bidirectional_attention=True; "
            "an instruction's keys depend on what follows it there, so no patch can stand for it"
        )
    for layers, rope in _rotary_settings(config):
        if _depends_on_length(rope, config):
            raise ValueError(
                f"describe: model must have rotary frequencies that do not depend on the sequence's length, "
                f"got rope_type={rope['rope_type']!r} for {layers} layers"
            )


def _rotary_settings(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(which layers, their rotary settings): one dictionary for all, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        yield "all", rope
    else:
        yield from ((kind, settings) for kind, settings in rope.items() if isinstance(settings, dict))


def _depends_on_length(rope: dict[str, Any], config: Any) -> bool:
    """Whether a header's keys cannot be rotated further on by themselves."""
    if rope.get("rope_type") != "longrope":
        return rope.get("rope_type") == "dynamic"
    # The long factors are taken beyond the original length, which not every model goes beyond.
    beyond = config.max_position_embeddings > rope["original_max_position_embeddings"]
    return beyond and rope["long_factor"] != rope["short_factor"]


def _block(index: int, layer: Any, config: Any, family: Family, shares_heads: bool) -> Block:
    kind, window = _window(index, config, family)
    attention = getattr(layer, family.attention)
    heads = config.num_attention_heads
    rotary = _setting(config, family.rotary_layers)

    def norm(name: str | None, holder: Any = layer) -> Norm | None:
        return None if name is None else _norm(getattr(holder, name), family)

    return Block(
        index=index,
        kind=kind,
        layer=layer,
        parts=family,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(attention, "head_dim", None) or config.hidden_size // heads,
        window=window,
        scale=attention.scaling,
        softcap=_setting(config, family.softcap),
        rotary=family.position_embedding is None and (rotary is None or bool(rotary[index])),
        shares_heads=shares_heads,
        parallel=bool(_setting(config, family.parallel, False)),
        residual_multiplier=_setting(config, family.residual_multiplier, 1.0),
        input_norm=norm(family.input_norm),
        pre_feedforward_norm=norm(family.pre_feedforward_norm),
        q_norm=norm("q_norm", attention) if family.head_norms else None,
        k_norm=norm("k_norm", attention) if family.head_norms else None,
        post_attention_norm=norm(family.post_attention_norm),
        post_feedforward_norm=norm(family.post_feedforward_norm),
    )


def _window(index: int, config: Any, family: Family) -> tuple[str, int | None]:
    """(the layer's kind, its window)."""
    if family.window == "by_type":
        kind = config.layer_types[index]
        return kind, config.sliding_window if kind == "sliding_attention" else None
    window = getattr(config, "sliding_window", None) if family.window == "all" else None
    return "full_attention" if window is None else "sliding_attention", window


def _norm(module: Any, family: Family) -> Norm:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module, eps=eps, weight_offset=family.weight_offset, centred=family.centred)


def _setting(config: Any, name: str | None, otherwise: Any = None) -> Any:
    return otherwise if name is None else getattr(config, name)


def frequencies(text: Any, kind: str) -> tuple[Tensor, float]:
    """Inverse frequencies and cos/sin factor of a layer kind, from the rotary module that the model holds.

    It has a buffer for each kind where kinds differ, and one for all layers elsewhere.
    """
    rotary = text.rotary_emb
    if hasattr(rotary, f"{kind}_inv_freq"):
        return getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling")
    return rotary.inv_freq, rotary.attention_scaling
