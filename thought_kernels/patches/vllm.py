"""What vLLM refuses of a LoRA adapter, written out after its loader, so that an export can say so where it is written.

Source: vLLM 0.2x, vllm/lora/peft_helper.py (what a configuration may ask for), lora/lora_model.py and lora/utils.py
(how tensors are named, and that each must be of a linear layer), config/lora.py (the ranks that --max-lora-rank takes),
and docs/models/supported_models.md (which models take adapters).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts; its default is 16

# By config.model_type: families whose implementation there takes no adapters.
_WITHOUT_LORA = {"gpt2": "GPT-2", "gpt_neox": "GPT-NeoX"}
# Mixtures of experts hold what is below .experts in another layout; of the rest every linear layer has its own name.
_NAME = re.compile(r"base_model\.model\.(?:[\w]+\.)*(?P<module>\w+)\.lora_[AB]\.weight")
_LINEAR = {"o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"}


def obstacles(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model_type: str) -> Iterator[str]:
    """Why vLLM would not load an adapter, or would load something else; nothing where it does as peft does.

    Args:
        config: adapter_config.json.
        tensors: adapter_model.safetensors.
        model_type: config.model_type of the base model.
    """
    if model_type in _WITHOUT_LORA:
        yield f"it has no adapters for {_WITHOUT_LORA[model_type]}"
    if any(name.endswith(".bias") for name in tensors) or config.get("bias", "none") != "none":
        yield "it carries vectors as LoRA biases; fold them instead"
    strange = [name for name in tensors if not name.endswith(".bias") and not _is_known(name)]
    if strange:
        yield f"it does not know the tensor {strange[0]}"
    for option in ("use_dora", "use_rslora", "modules_to_save"):
        if config.get(option):
            yield f"it takes no {option}"
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    if rank > VLLM_RANKS[-1]:
        yield f"its rank {rank} is above {VLLM_RANKS[-1]}; truncate it"
    # Older versions scale every module by the one alpha / r, newer ones by their patterns: both must be 1.
    alphas = {**dict.fromkeys(config.get("rank_pattern", {}), config["lora_alpha"]), **config.get("alpha_pattern", {})}
    scales = {alphas[name] / own for name, own in config.get("rank_pattern", {}).items()}
    if scales | {config["lora_alpha"] / config["r"]} != {1.0}:
        yield "its modules must have lora_alpha equal to their rank"


def _is_known(name: str) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and found["module"] in _LINEAR
