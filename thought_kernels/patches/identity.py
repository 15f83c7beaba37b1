"""Which model a patch was made for, as few values that travel with it, and how another model differs from that one.

Weights are told by numbers taken evenly from a few of them: their sha256 after rounding to bfloat16, which is the same
in every wider dtype that the model is loaded in but float16, and so once more after rounding to float16 and then to
bfloat16; and some of the numbers themselves, from which follows how far weights are apart that are not the same: the
same model quantised by some percent, another model wholly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from thought_kernels.models import describe
from thought_kernels.models.quantised import weight_of
from thought_kernels.models.sharded import is_sharded, taken
from thought_kernels.ops.caller import warn
from thought_kernels.patches.apply import targets
from thought_kernels.patches.data import PatchData

_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size",
)  # fmt: skip
_OLD = ("hidden_size", "num_hidden_layers", "model_type")  # what patches remember without an identity
MISMATCH = ("warn", "refuse", "ignore")
_HASHED, _KEPT = 4096, 16  # numbers of each weight
_VOCABULARIES: WeakKeyDictionary[Any, tuple[object, str]] = WeakKeyDictionary()  # digests, by tokenizer and its state
_ANOTHER = 0.5  # relative distance beyond which weights have nothing to do with each other; four bits leave about 0.1


def identity(model: Any, tokenizer: Any = None) -> dict[str, Any]:
    """What tells a model and its tokenizer from others.

    Args:
        model: a transformers model that ``describe`` knows.
        tokenizer: a transformers tokenizer, or None to leave it out.

    Returns:
        {"config": {field: value}, "weights": {name: {"sha256", "as_float16", "numbers"}}, "tokenizer": {"vocabulary",
        "template"}}, JSON values only. Quantised weights are told by the numbers that they stand for; those
        that are elsewhere are not among them.
    """
    decoder = describe(model)
    config = json.loads(json.dumps(decoder.config.to_dict(), default=str))
    found: dict[str, Any] = {
        "config": {name: config[name] for name in _FIELDS if config.get(name) is not None},
        "weights": {name: _told(weight) for name, weight in _weights(decoder)},
    }
    if tokenizer is not None:
        found["tokenizer"] = {
            "vocabulary": _vocabulary(tokenizer),
            "template": _digest(str(tokenizer.chat_template or "").encode()),
        }
    return found


def differences(recorded: Mapping[str, Any], model: Any, tokenizer: Any = None) -> list[str]:
    """How a model differs from a recorded one, a clause each; none where it is the same as far as is recorded.

    Args:
        recorded: what ``identity`` made, or some of it.
        model: a transformers model.
        tokenizer: its tokenizer, or None where it is not to be compared.
    """
    found = identity(model, tokenizer)
    return [
        *_of_config(recorded.get("config", {}), found["config"]),
        *_of_weights(recorded.get("weights", {}), found["weights"]),
        *_of_tokenizer(recorded.get("tokenizer", {}), found.get("tokenizer", {})),
    ]


def check_base(patch: PatchData, model: Any, tokenizer: Any, mismatch: str) -> list[str]:
    """Holds a model against the patch's own; ``ThoughtPatch.check`` is the public form and says more."""
    if mismatch not in MISMATCH:
        raise ValueError(f"check: mismatch must be one of {', '.join(MISMATCH)}, got {mismatch!r}")
    for _ in targets("check", patch, model):
        pass  # raises for a model that it does not fit
    found = list(dict.fromkeys(
        clause for recorded in _recorded(patch.provenance) for clause in differences(recorded, model, tokenizer)
    ))  # fmt: skip
    if not found or mismatch == "ignore":
        return found
    sentence = f"check: model should be the one that the patch was made for, got another: {'; '.join(found)}"
    if mismatch == "refuse":
        raise ValueError(sentence.replace("should", "must", 1))
    warn(sentence)
    return found


def _recorded(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a patch remembers of its model, and where it is a sum whose parts remember different ones, each of these."""
    if made.get("base"):
        return [made["base"]]
    of_parts = [one for part in made.get("parts", []) if part.get("base") for one in _recorded(part)]
    return of_parts or [{"config": {name: made[name] for name in _OLD if made.get(name) is not None}}]


def _of_config(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for name, value in recorded.items():
        if name in found and found[name] != value:
            yield f"its {name} is {found[name]}, not {value}"


def _of_weights(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    common = [name for name in recorded if name in found]
    changed = [name for name in common if not _digests(recorded[name]) & _digests(found[name])]
    if recorded and not common:
        yield "its weights cannot be compared"
    if not changed:
        return
    distance = max(_distance(recorded[name]["numbers"], found[name]["numbers"]) for name in changed)
    if distance > _ANOTHER:
        yield f"its weights are others ({len(changed)} of {len(common)} compared, {changed[0]} among them)"
    else:
        yield (
            f"its weights differ by up to {100 * distance:.2g} % in {len(changed)} of {len(common)} compared, as those "
            "of a model do that was quantised, rounded, tuned or patched"
        )


def _digests(told: Mapping[str, Any]) -> set[str]:
    """Of the numbers as they are, and as they would be in a model loaded in float16."""
    return {told[name] for name in ("sha256", "as_float16") if name in told}


def _of_tokenizer(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for name, what in (("vocabulary", "tokenizer has another vocabulary"), ("template", "chat template is another")):
        if name in recorded and name in found and recorded[name] != found[name]:
            yield f"its {what}"


def _weights(decoder: Any) -> Iterator[tuple[str, Tensor]]:
    """The embedding as it is, and W [d_out, d_in] of what is patched in the first, a middle and the last block."""
    named = [("embedding", decoder.embed_tokens)]
    for index in sorted({0, len(decoder.blocks) // 2, len(decoder.blocks) - 1}):
        block = decoder.blocks[index]
        named += [(f"block {index}, attention", block.o_proj), (f"block {index}, down", block.down_proj)]
    for name, module in named:
        held = getattr(module, "weight", None)
        weight = held if is_sharded(held) else weight_of(module, decoder.dtype, decoder.device)
        if weight is not None and weight.dim() == 2:
            yield name, weight


@torch.no_grad()
def _told(weight: Tensor) -> dict[str, Any]:
    columns = weight.shape[1]
    count = min(_HASHED, weight.numel())
    # Evenly, in integers: float positions would not be exact in a large vocabulary's embedding.
    places = torch.arange(count, dtype=torch.int64) * (weight.numel() // count)
    numbers = taken(weight, (places // columns).to(weight.device), (places % columns).to(weight.device))
    rounded, twice = (numbers.to("cpu", dtype).to(torch.bfloat16) for dtype in (numbers.dtype, torch.float16))
    kept = rounded[:: max(1, count // _KEPT)][:_KEPT].float().tolist()
    digests = (_digest(bits.view(torch.int16).numpy().tobytes()) for bits in (rounded, twice))
    return {**dict(zip(("sha256", "as_float16"), digests, strict=True)), "numbers": kept}


def _vocabulary(tokenizer: Any) -> str:
    """The digest of a tokenizer's tokens. Of 262,144 it takes about a second, and so it is kept until they change."""
    try:
        state = len(tokenizer), id(getattr(tokenizer, "_tokenizer", None))
        known, digest = _VOCABULARIES.get(tokenizer, (None, ""))
        if known != state:
            digest = _digest_of_tokens(tokenizer)
            _VOCABULARIES[tokenizer] = state, digest
        return digest
    except TypeError:  # of a kind that has no length, or cannot be a key
        return _digest_of_tokens(tokenizer)


def _digest_of_tokens(tokenizer: Any) -> str:
    return _digest(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def _distance(recorded: list[float], found: list[float]) -> float:
    """‖a − b‖ / ‖a‖."""
    a, b = (torch.tensor(numbers, dtype=torch.float64) for numbers in (recorded, found))
    if len(a) != len(b):
        return float("inf")
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a).clamp_min(1e-300))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
