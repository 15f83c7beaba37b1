"""A patch as GGUF files: the gguf package reads them, and llama.cpp then does what the applied patch does."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import numpy as np
import pytest
import torch
from families import SLIDING, tiny
from models import tiny_gemma3, tiny_multimodal_gemma3
from patches import fitting_patch, random_patch, token_ids
from tolerances import largest
from torch import Tensor

from thought_kernels.models import describe
from thought_kernels.models.linear import linear_weight
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))

import llama_runner

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "qwen2": ("qwen2", {}),
    "granite": ("granite", {}),
    # As many layers of each kind, and the score scale, as llama.cpp takes for granted.
    "gemma3": ("gemma3", {
        "layer_types": [SLIDING] * 5 + ["full_attention"], "num_hidden_layers": 6, "query_pre_attn_scalar": 12,
    }),
}  # fmt: skip


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}


def product(tensors: dict[str, Tensor], name: str, alpha: float) -> Tensor:
    """What llama.cpp adds to a weight."""
    a, b = (tensors[f"{name}.weight.lora_{side}"].double() for side in "ab")
    return alpha / b.shape[1] * b @ a


@pytest.mark.parametrize("family", ["gemma3", "llama", "gpt2", "pythia", "phi3", "qwen3", "olmo2", "smollm3"])
def test_an_adapter_holds_each_modules_change_at_its_own_rank(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    patch = fitting_patch(model, rank=2) + fitting_patch(model, seed=1, sites=["mlp"], layers=[2], rank=3)
    written = patch.export_gguf_lora(tmp_path / "deep" / "adapter.gguf", model)
    assert not written.lossy and written.llama_cpp == f"--lora {written.file}"
    fields, tensors = read(written.file)
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] in gguf.MODEL_ARCH_NAMES.values()
    alpha = fields["adapter.lora.alpha"]
    assert alpha == written.rank == 5 and set(written.ranks.values()) == {2, 5}
    block = describe(model).blocks[2]
    mlp = patch.matrix(2, "mlp").double()
    for name, module in zip(block.parts.mlp_inputs, block.mlp_inputs, strict=True):
        known = "ffn_gate" if name == "gate_proj" else "ffn_up"
        expected = linear_weight(module).double() @ mlp
        assert largest(product(tensors, f"blk.2.{known}", alpha) - expected) <= 1e-5 * largest(expected)
    attention = linear_weight(block.o_proj).double() @ patch.matrix(2, "attention").double()
    assert largest(product(tensors, "blk.2.attn_output", alpha) - attention) <= 1e-5 * largest(attention)
    down = patch.matrix(0, "down").double()
    assert largest(product(tensors, "blk.0.ffn_down", alpha) - down) <= 1e-5 * largest(down)
    assert len(tensors) == 2 * len(written.ranks)
    again = (0.5 * patch).export_gguf_lora(written.file, model)  # takes the first one's place
    assert [path.name for path in again.file.parent.iterdir()] == ["adapter.gguf"]


def test_a_control_vector_names_the_model_as_llama_cpp_does(tmp_path: Path) -> None:
    vector = random_patch(sites=("residual",), layers=(1,))
    vector.export_control_vector(tmp_path / "vector.gguf", tiny_gemma3())
    assert read(tmp_path / "vector.gguf")[0]["controlvector.model_hint"] == "gemma3"


def test_the_multimodal_model_has_the_names_of_its_text(tmp_path: Path) -> None:
    model = tiny_multimodal_gemma3()
    fitting_patch(model).export_gguf_lora(tmp_path / "adapter.gguf", model)
    fields, tensors = read(tmp_path / "adapter.gguf")
    assert fields["general.architecture"] == "gemma3" and "blk.2.ffn_gate.weight.lora_a" in tensors


def test_what_an_adapter_cannot_carry_is_refused_folded_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "adapter.gguf", tiny("gpt2")  # whose biases the format has no place for
    patch = fitting_patch(model, sites=("attention", "residual"), vectors=True)
    with pytest.raises(ValueError, match="export_gguf_lora: patch must have no residual vector.*format has no bias"):
        patch.export_gguf_lora(path, model, fold=True)
    matrices = fitting_patch(model, sites=("attention",), vectors=True)
    with pytest.raises(ValueError, match=r"export_gguf_lora: patch must have no vector where .*drop=True \(--drop\)"):
        matrices.export_gguf_lora(path, model)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gguf", None)
        with pytest.raises(ValueError, match="^export_gguf_lora: gguf must be installed"):
            matrices.export_gguf_lora(path, model, drop=True)
    assert not path.exists()
    folded = patch.export_gguf_lora(path, model, fold=True, drop=True)
    assert folded.dropped == ((0, "residual"), (2, "residual")) and len(folded.fold_residuals) == 2 and folded.lossy
    dropped = patch.export_gguf_lora(path, model, drop=True)
    assert dropped.dropped == ((0, "residual"), (2, "residual"), (0, "attention"), (2, "attention"))
    assert all(entry.vector is None for entry in dropped.entries.values())


def test_an_energy_is_kept_in_as_few_singular_values_as_hold_it(tmp_path: Path) -> None:
    model = tiny_gemma3()
    values = torch.tensor([4.0, 3.0, 1.0, 0.5])
    matrix = torch.zeros(40, 40)
    matrix[range(4), range(4)] = values
    patch = ThoughtPatch({(1, "attention"): SitePatch(matrix)})
    for energy, rank in ((0.3, 1), (0.6, 1), (0.62, 2), (0.95, 2), (0.96, 3), (1.0, 4)):
        for written in (
            patch.export_gguf_lora(tmp_path / "adapter.gguf", model, energy=energy),
            patch.export_peft(tmp_path / "lora", model, energy=energy),
        ):
            assert written.rank == rank and written.lossy == (rank < 4), energy
            cut = float(values[rank:].norm() / values.norm())
            assert written.truncation == ({(1, "attention"): pytest.approx(cut)} if rank < 4 else {})
    assert patch.export_gguf_lora(tmp_path / "adapter.gguf", model, energy=0.96, rank=2).rank == 2
    rough = ThoughtPatch({(1, "attention"): SitePatch(torch.randn(40, 40, dtype=torch.float64))})
    assert rough.export_gguf_lora(tmp_path / "adapter.gguf", model, energy=1.0).rank == 40
    for energy in (0, 1.5, True, "1"):
        with pytest.raises(ValueError, match="energy must be above 0 and at most 1, or None"):
            patch.export_peft(tmp_path / "other", model, energy=energy)  # type: ignore[arg-type]


def test_paths_and_models_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    patch = fitting_patch(tiny_gemma3())
    for path in (tmp_path, tmp_path / "adapter.bin"):
        with pytest.raises(ValueError, match="export_gguf_lora: file must be a file's path that ends in .gguf"):
            patch.export_gguf_lora(path, tiny_gemma3())
    model = tiny("ministral")
    with pytest.raises(ValueError, match="model must be of a type that llama.cpp has a name for, got 'ministral'"):
        fitting_patch(model).export_gguf_lora(tmp_path / "adapter.gguf", model)
    assert not list(tmp_path.iterdir())


def test_a_control_vector_comes_back_as_a_patch(tmp_path: Path) -> None:
    model = tiny("granite")  # without norms behind down_proj, with a residual multiplier
    vectors = fitting_patch(model, sites=("residual",), layers=(1, 2)) + fitting_patch(
        model, seed=3, sites=("down",), layers=(2,), vectors=True
    )
    path = tmp_path / "vector.gguf"
    with pytest.raises(ValueError, match="constants of blocks' outputs, got a matrix; block 2, site 'down'"):
        vectors.export_control_vector(path, model)
    assert not path.exists()
    written = vectors.export_control_vector(path, model, drop=True)
    assert written.dropped == ((2, "down"),) and written.llama_cpp == f"--control-vector {path}"
    fields, tensors = read(path)
    assert fields["general.architecture"] == "controlvector" and fields["controlvector.model_hint"] == "granite"
    assert fields["controlvector.layer_count"] == 2 and tensors.keys() == {"direction.1", "direction.2"}
    back = ThoughtPatch.from_control_vector(path)
    assert back.provenance == {"control_vector": "vector.gguf", "model_type": "granite", "hidden_size": 48}
    ids = token_ids()
    only = {key: SitePatch(vector=entry.vector) for key, entry in vectors.entries.items()}
    with ThoughtPatch(only).applied(model):
        expected = model(ids).logits
    with back.applied(model):
        assert largest(model(ids).logits - expected) <= 1e-4 * largest(expected)
    assert largest(model(ids).logits - expected) > 0.01 * largest(expected)


def test_what_a_control_vector_cannot_carry_is_refused(tmp_path: Path) -> None:
    model, path = tiny_gemma3(), tmp_path / "vector.gguf"
    for sites, layer, told in (
        (("residual",), 0, "got a vector of block 0, where llama.cpp adds none"),
        (("attention",), 1, "got a matrix"),
        (("down",), 1, "got a matrix"),
    ):
        with pytest.raises(ValueError, match=f"export_control_vector: .*{told}"):
            random_patch(sites=sites, layers=[layer]).export_control_vector(path, model)
    down = ThoughtPatch({(1, "down"): SitePatch(vector=torch.ones(36))})
    with pytest.raises(ValueError, match="a vector before the end of the block, where a norm stands behind down_proj"):
        down.export_control_vector(path, model)
    with pytest.raises(ValueError, match="must have a nonzero vector that a control vector can carry, got none"):
        down.export_control_vector(path, model, drop=True)
    assert not path.exists()


def as_repeng(path: Path, directions: dict[int, Any], **changes: Any) -> Path:
    """A file as repeng's ControlVector.export_gguf writes it."""
    writer = gguf.GGUFWriter(path, changes.get("architecture", "controlvector"))
    if "model_hint" not in changes:
        writer.add_string("controlvector.model_hint", "gemma3_text")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"{changes.get('name', 'direction')}.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_repeng_vector_becomes_a_patch(dtype: Any, tmp_path: Path) -> None:
    directions = {layer: np.random.default_rng(layer).normal(size=36).astype(dtype) for layer in (2, 0, 1)}
    patch = ThoughtPatch.from_control_vector(as_repeng(tmp_path / "happy.gguf", directions))
    assert patch.layers == (0, 1, 2) and patch.sites == ("residual",) and patch.hidden_size == 36
    for layer, direction in directions.items():
        assert torch.equal(patch.vector(layer, "residual"), torch.from_numpy(direction.astype(np.float32)))
    with (0.8 * patch).applied(tiny_gemma3()):
        pass


@pytest.mark.parametrize(
    ("directions", "changes", "told"),
    [
        ({1: np.ones(4, np.float32)}, {"architecture": "llama"}, "a file of the architecture 'llama'"),
        ({1: np.ones(4, np.float32)}, {"model_hint": None}, "no controlvector.model_hint"),
        ({1: np.ones(4, np.float32)}, {"name": "token_embd"}, "a tensor named 'token_embd.1'"),
        ({-1: np.ones(4, np.float32)}, {}, "a tensor named 'direction.-1'"),
        ({1: np.ones((0, 4), np.float32)}, {}, "a tensor without numbers"),
        ({1: np.ones((2, 4), np.float32)}, {}, r"direction.1 of the shape \[2, 4\]"),
        ({1: np.full(4, np.nan, np.float32)}, {}, "NaN or none in direction.1"),
        ({1: np.ones(4, np.float32), 2: np.ones(5, np.float32)}, {}, r"directions of the widths \[4, 5\]"),
        ({1: np.ones(4, np.float64)}, {}, "a tensor 'direction.1' that is neither float32 nor float16"),
    ],
)
def test_other_files_are_no_control_vectors(directions: Any, changes: Any, told: str, tmp_path: Path) -> None:
    path = as_repeng(tmp_path / "vector.gguf", directions, **changes)
    with pytest.raises(ValueError, match=f"from_control_vector: .* a GGUF control vector, got {told}: .*gguf"):
        ThoughtPatch.from_control_vector(path)


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got No such file or directory: "):
        ThoughtPatch.from_control_vector(tmp_path / "nowhere.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ValueError, match="got an empty file: "):
        ThoughtPatch.from_control_vector(tmp_path / "empty.gguf")


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_hold_what_was_written(count: int, tmp_path: Path) -> None:
    """No crash, no hang, and as the file carries its tensors' sha256, no other numbers."""
    model, path = tiny_gemma3(), tmp_path / "vector.gguf"
    patch = random_patch(sites=("residual",), layers=(1, 2))
    patch.export_control_vector(path, model)
    whole, draw, loaded = path.read_bytes(), random.Random(0), 0
    for _ in range(count):
        path.write_bytes(mutated(whole, draw))
        try:
            found = ThoughtPatch.from_control_vector(path)
        except ValueError as error:
            assert str(error).startswith("from_control_vector: file must be a GGUF control vector, got ")
            continue
        loaded += 1
        same = {key[0]: entry.vector for key, entry in patch.entries.items()}
        digest_gone = b"thought_kernels.sha256" not in path.read_bytes()
        assert digest_gone or all(torch.equal(found.vector(layer, "residual"), v) for layer, v in same.items())
    assert loaded < count


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, most of them where lengths and names are, or the end cut off."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) if draw.random() < 0.3 else min(len(data), 420))
        data[place] = draw.choice([0, 1, 127, 255, draw.randrange(256)])
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.2 else data)


@pytest.mark.skipif(not llama_runner.available(), reason="runs llama.cpp; pip install xllamacpp")
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_does_what_the_applied_patch_does(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = tiny(family, **changes)
    base = gguf_models.write_model(model, tmp_path / "model.gguf")
    patch = fitting_patch(model, layers=range(len(describe(model).blocks)))
    steer = fitting_patch(model, sites=("residual",), layers=(1, 2), seed=4)
    lora = patch.export_gguf_lora(tmp_path / "adapter.gguf", model).file
    vector = steer.export_control_vector(tmp_path / "vector.gguf", model).file
    ids = token_ids(batch=1, length=11)

    def ours() -> Tensor:
        with torch.no_grad():
            return model(ids).logits[0, -4:].double()

    bare = ours()
    with patch.applied(model):
        patched = ours()
    with steer.applied(model):
        steered = ours()
    with patch.applied(model), steer.applied(model):
        both = ours()
    for options, expected in (
        ({}, bare), ({"lora": lora}, patched), ({"control_vector": vector}, steered),
        ({"lora": lora, "control_vector": vector}, both),
    ):  # fmt: skip
        with llama_runner.LlamaCpp(base, context=64, **options) as served:
            found = served.logits(ids[0].tolist(), 4).double()
        # It keeps keys and values in float16, whose rounding of 5e-4 the blocks pass on.
        assert largest(found - expected) <= 1e-2 * largest(expected), (case, options)
        if options:
            assert largest(found - bare) > 5e-2 * largest(bare)
