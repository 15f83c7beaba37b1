"""A patch as a LoRA folder: peft and transformers load it, and the model then does what the applied patch does."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DENSE_CASES, tiny
from models import tiny_gemma3, tiny_multimodal_gemma3
from patches import MATRICES, random_patch, same_bits, token_ids, weights
from safetensors.torch import load_file
from tolerances import largest
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from thought_kernels.demo import CHECKPOINT
from thought_kernels.models import describe
from thought_kernels.patches.export_peft import CONFIG_FILE, WEIGHT_FILE, PeftFolder
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch
from thought_kernels.patches.vllm import VLLM_RANKS, obstacles

peft = pytest.importorskip("peft", reason="reads what export_peft writes; pip install 'thought_kernels[peft]'")

# Relative to the largest logit. float32: B = W U is rounded once, and B (A x) sums in another order than W (Δ x);
# float64: transformers computes norms and the softmax in float32 there, which amplifies a last bit.
LOGITS = {torch.float32: 1e-4, torch.float64: 1e-6}


def matrix_patch(seed: int = 0, **options: Any) -> ThoughtPatch:
    return random_patch(seed, **{"sites": MATRICES, "vectors": False, **options})


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double()


def applied_logits(patch: ThoughtPatch, model: nn.Module, ids: Tensor) -> Tensor:
    with patch.applied(model):
        return logits(model, ids)


def through_peft(model: Any, folder: Path, ids: Tensor) -> Tensor:
    """Logits of a model wrapped by peft; the wrapping is undone."""
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    found = logits(wrapped.eval(), ids)
    wrapped.unload()
    return found


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return largest(actual - expected) <= LOGITS[dtype] * largest(expected)


CONFIGS: dict[str, dict[str, Any]] = {
    "grouped queries, two windows": {},
    "more than twenty modules": {"layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 3},
    "one head, wide mlp": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 40, "intermediate_size": 9},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_does_what_the_applied_patch_does(config: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_gemma3(1, dtype, **CONFIGS[config])
    before = weights(model)
    layers = range(len(describe(model).blocks))
    width = describe(model).blocks[0].mlp_width
    patch, ids = matrix_patch(2, layers=layers, dtype=dtype, intermediate=width), token_ids(length=13)
    written = patch.export_peft(tmp_path / "lora", model)
    assert isinstance(written, PeftFolder) and not written.lossy
    assert written.ranks.keys() == {
        f"model.layers.{layer}.{part}"
        for layer in layers
        for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    expected = applied_logits(patch, model, ids)
    assert not close(logits(model, ids), expected, torch.float32)  # the patch does something
    assert close(through_peft(model, tmp_path / "lora", ids), expected, dtype)
    assert same_bits(model, before)


def test_transformers_loads_the_folder_too(tmp_path: Path) -> None:
    model, patch, ids = tiny_gemma3(), matrix_patch(rank=3), token_ids()
    expected = applied_logits(patch, model, ids)
    patch.export_peft(tmp_path, model)
    model.load_adapter(str(tmp_path))
    assert close(logits(model, ids), expected, torch.float32)


def test_a_shipped_model_and_patch(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    decoder = describe(model)
    patch = matrix_patch(
        layers=range(len(decoder.blocks)), hidden=decoder.hidden_size, size=0.05,
        intermediate=decoder.blocks[0].mlp_width,
        attention=decoder.blocks[0].num_attention_heads * decoder.blocks[0].head_dim,
    )  # fmt: skip
    ids = token_ids(length=20)
    written = patch.export_peft(tmp_path, model)
    assert close(through_peft(model, tmp_path, ids), applied_logits(patch, model, ids), torch.float32)
    assert written.vllm == f"--enable-lora --max-lora-rank {next(r for r in VLLM_RANKS if r >= written.rank)}"
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(CHECKPOINT)


def test_the_multimodal_model_keeps_its_prefix(tmp_path: Path) -> None:
    model, patch, ids = tiny_multimodal_gemma3(), matrix_patch(layers=[1]), token_ids()
    written = patch.export_peft(tmp_path, model)
    parts = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert written.ranks.keys() == {f"model.language_model.layers.1.{part}" for part in parts}
    assert set(load_file(tmp_path / WEIGHT_FILE)) == {
        f"base_model.model.{name}.lora_{side}.weight" for name in written.ranks for side in "AB"
    }
    assert close(through_peft(model, tmp_path, ids), applied_logits(patch, model, ids), torch.float32)


@pytest.mark.parametrize("stored", [None, 6])
def test_a_rank_truncates_as_truncate_does(stored: int | None, tmp_path: Path) -> None:
    model, patch, ids = tiny_gemma3(dtype=torch.float64), matrix_patch(rank=stored, dtype=torch.float64), token_ids()
    written = patch.export_peft(tmp_path, model, rank=2)
    assert set(written.ranks.values()) == {2} and written.lossy
    for key, share in written.truncation.items():
        difference = (patch - patch.truncate(2)).entries[key].norm() / patch.entries[key].norm()
        assert share == pytest.approx(difference, rel=1e-9)
    assert close(through_peft(model, tmp_path, ids), applied_logits(patch.truncate(2), model, ids), torch.float64)


@pytest.mark.parametrize("pad", [False, True])
def test_each_module_has_its_own_rank_unless_padded(pad: bool, tmp_path: Path) -> None:
    model, ids = tiny_gemma3(dtype=torch.float64), token_ids()
    parts = [
        random_patch(i, layers=[i], sites=["attention"], vectors=False, rank=i + 1, dtype=torch.float64)
        for i in range(3)
    ]
    # The same factors twice: the sum's factors are twice as wide as its rank.
    patch = parts[0] + parts[1] + parts[2] + parts[2]
    assert patch.entries[2, "attention"].rank == 6
    written = patch.export_peft(tmp_path, model, pad=pad)
    assert list(written.ranks.values()) == ([3, 3, 3] if pad else [1, 2, 3]) and written.rank == 3
    assert not written.lossy
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == {n: r for n, r in written.ranks.items() if r < 3}
    assert written.vllm == "--enable-lora --max-lora-rank 8"
    assert close(through_peft(model, tmp_path, ids), applied_logits(patch, model, ids), torch.float64)


def test_a_compiled_model_s_modules_have_their_own_names(tmp_path: Path) -> None:
    model = tiny_gemma3()
    patch = matrix_patch()
    assert patch.export_peft(tmp_path, torch.compile(model)).ranks == patch.export_peft(tmp_path, model).ranks


def test_dropout_and_autocast_are_no_part_of_an_adapter_s_weights(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"], lora_dropout=0.5, init_lora_weights=False)
    model, patch = peft.get_peft_model(tiny_gemma3(), lora), matrix_patch()

    def exported() -> dict[str, Tensor]:
        patch.export_peft(tmp_path, model)
        return load_file(tmp_path / WEIGHT_FILE)

    model.eval()
    expected = exported()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = exported()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert model.training


def test_gate_and_up_share_their_input_side(tmp_path: Path) -> None:
    matrix_patch().export_peft(tmp_path, tiny_gemma3())
    tensors = load_file(tmp_path / WEIGHT_FILE)
    prefix = "base_model.model.model.layers.2.mlp"
    assert torch.equal(tensors[f"{prefix}.gate_proj.lora_A.weight"], tensors[f"{prefix}.up_proj.lora_A.weight"])
    assert not torch.equal(tensors[f"{prefix}.gate_proj.lora_B.weight"], tensors[f"{prefix}.up_proj.lora_B.weight"])


def test_bfloat16_weights_give_float32_factors(tmp_path: Path) -> None:
    model, patch = tiny_gemma3(dtype=torch.bfloat16), matrix_patch(rank=2)
    patch.export_peft(tmp_path, model)
    tensors = load_file(tmp_path / WEIGHT_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    name = "model.layers.0.self_attn.o_proj"
    weight = model.get_submodule(name).weight.double()
    product = (
        tensors[f"base_model.model.{name}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{name}.lora_A.weight"].double()
    )
    expected = weight @ patch.to(dtype=torch.float64).matrix(0, "attention")
    assert largest(product - expected) <= 1e-6 * largest(expected)


class Opaque(nn.Module):
    """A linear map that shows no plain weight, as quantised modules do."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.packed = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x)


def test_a_module_without_plain_weights_is_asked_itself(tmp_path: Path) -> None:
    model, patch = tiny_gemma3(dtype=torch.float64), matrix_patch(dtype=torch.float64, sites=["attention"])
    patch.export_peft(tmp_path / "plain", model)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Opaque(layer.self_attn.o_proj)
    patch.export_peft(tmp_path / "opaque", model)
    plain, opaque = (load_file(tmp_path / name / WEIGHT_FILE) for name in ("plain", "opaque"))
    assert plain.keys() == opaque.keys()
    for name, tensor in plain.items():
        assert largest(opaque[name] - tensor) <= 1e-13 * largest(tensor)


def with_vectors(**options: Any) -> ThoughtPatch:
    return random_patch(sites=MATRICES, vectors=True, **options)


@pytest.mark.parametrize("rank", [None, 4])
def test_vectors_are_refused_unless_folded_and_then_counted(
    rank: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, patch, ids = tiny_gemma3(dtype=torch.float64), with_vectors(rank=rank, dtype=torch.float64), token_ids()
    with pytest.raises(ValueError, match=r"export_peft: patch must have no vector where .*; block 0, site 'attention'"):
        patch.export_peft(tmp_path / "lora", model)
    assert not (tmp_path / "lora").exists()
    with caplog.at_level(logging.WARNING):
        written = patch.export_peft(tmp_path / "lora", model, fold=True)
    assert written.lossy and written.fold_residuals == dict.fromkeys(patch.entries, 0.1)
    assert "block 2, site 'mlp': vector folded into the matrix, relative squared error 0.1" in caplog.text
    found = through_peft(model, tmp_path / "lora", ids)
    with patch.merge_(model, fold=True):
        assert close(found, logits(model, ids), torch.float64)


def test_vectors_become_biases_where_the_modules_have_them(tmp_path: Path) -> None:
    model = tiny_gemma3(attention_bias=True, dtype=torch.float64)
    patch = random_patch(sites=["attention"], vectors=True, dtype=torch.float64) + matrix_patch(3, dtype=torch.float64)
    ids = token_ids()
    written = patch.export_peft(tmp_path, model)
    assert not written.lossy and written.has_bias and "vLLM cannot" in written.vllm
    with pytest.warns(UserWarning, match="lora_bias"):  # of the MLP's modules, which have none and get zeros
        found = through_peft(model, tmp_path, ids)
    assert close(found, applied_logits(patch, model, ids), torch.float64)


def refusals() -> dict[str, tuple[ThoughtPatch, dict[str, Any], str]]:
    nan = torch.full((40, 40), float("nan"))
    return {
        "residual": (random_patch(sites=["attention", "residual"], vectors=False), {}, "no residual vector"),
        "hidden size": (random_patch(hidden=24, sites=["mlp"]), {}, "hidden size 36, got 24"),
        "missing block": (matrix_patch(layers=[7]), {}, r"blocks 0 to 2 only, got \[7\]"),
        "rank zero": (matrix_patch(), {"rank": 0}, "rank must be a positive integer or None, got 0"),
        "rank of another kind": (matrix_patch(), {"rank": 2.0}, "rank must be a positive integer or None, got 2.0"),
        "nothing": (0.0 * matrix_patch(), {}, "must have a nonzero matrix, got none"),
        "nan": (ThoughtPatch({(0, "attention"): SitePatch(nan)}), {}, "matrix must be finite"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refusals_write_nothing(case: str, tmp_path: Path) -> None:
    patch, options, sentence = refusals()[case]
    with pytest.raises(ValueError, match=f"export_peft: .*{sentence}"):
        patch.export_peft(tmp_path / "lora", tiny_gemma3(), **options)
    assert not (tmp_path / "lora").exists()


def test_a_file_is_not_a_folder_and_bad_weights_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(ValueError, match="export_peft: directory must be a folder, got the file"):
        matrix_patch().export_peft(path, tiny_gemma3())
    assert path.read_text() == "kept"
    model = tiny_gemma3()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj must have finite weights"):
        matrix_patch().export_peft(tmp_path / "lora", model)
    assert not (tmp_path / "lora").exists()


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    model = tiny_gemma3()
    matrix_patch(rank=5).export_peft(tmp_path, model)
    matrix_patch(rank=2).export_peft(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CONFIG_FILE, WEIGHT_FILE])
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["r"] == 2


def test_dropped_vectors_are_named_and_are_no_part_of_what_the_adapter_does(tmp_path: Path) -> None:
    model, ids = tiny_gemma3(dtype=torch.float64), token_ids()
    patch = random_patch(vectors=True, dtype=torch.float64)
    written = patch.export_peft(tmp_path, model, drop=True)
    assert set(written.dropped) == set(patch.entries) and written.lossy
    matrices = {key: replace(e, vector=None) for key, e in patch.entries.items() if key[1] != "residual"}
    expected = applied_logits(ThoughtPatch(matrices), model, ids)
    assert close(through_peft(model, tmp_path, ids), expected, torch.float64)
    assert close(applied_logits(ThoughtPatch(written.entries), model, ids), expected, torch.float64)


A, B = (f"base_model.model.model.layers.0.self_attn.o_proj.lora_{side}.weight" for side in "AB")
ROUTER = A.replace("o_proj", "router")


@pytest.mark.parametrize(
    ("config", "tensors", "model_type", "told"),
    [
        ({}, [A, B], "llama", []),
        ({"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 2}}, [A, B], "gemma3_text", []),
        ({}, [A, B], "gpt2", ["it has no adapters for GPT-2"]),
        ({}, [A, B.replace("weight", "bias")], "qwen2", ["it carries vectors as LoRA biases; fold them instead"]),
        ({}, [A[11:], B], "qwen2", [f"it does not know the tensor {A[11:]}"]),
        ({}, [ROUTER], "qwen2", [f"it does not know the tensor {ROUTER}"]),
        ({"use_dora": True, "modules_to_save": ["x"]}, [A], "llama",
         ["it takes no use_dora", "it takes no modules_to_save"]),
        ({"rank_pattern": {"o_proj": 513}, "alpha_pattern": {"o_proj": 513}}, [A], "llama",
         ["its rank 513 is above 512; truncate it"]),
        ({"lora_alpha": 8}, [A], "llama", ["its modules must have lora_alpha equal to their rank"]),
        ({"rank_pattern": {"o_proj": 2}}, [A], "llama", ["its modules must have lora_alpha equal to their rank"]),
    ],
)  # fmt: skip
def test_vllms_rules_are_written_out(config: Any, tensors: list[str], model_type: str, told: list[str]) -> None:
    assert list(obstacles({"r": 4, "lora_alpha": 4, **config}, dict.fromkeys(tensors), model_type)) == told


@pytest.mark.parametrize("family", DENSE_CASES)
def test_vllm_would_load_what_is_written_for_every_family_that_it_serves_with_adapters(
    family: str, tmp_path: Path
) -> None:
    model = tiny(family)
    decoder = describe(model)
    block = decoder.blocks[0]
    patch = matrix_patch(
        hidden=decoder.hidden_size, attention=block.attention_width, intermediate=block.mlp_width, rank=3
    )
    expected = (
        "vLLM cannot load it: it has no adapters for GPT" if family[:2] in ("gp", "py") else "--enable-lora --max"
    )
    assert patch.export_peft(tmp_path, model).vllm.startswith(expected)
