"""Whole models' weights, read one matrix at a time from the files transformers writes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_multimodal_gemma3
from safetensors.torch import save_file
from torch import Tensor

from thought_kernels.spectral import classify_features, comparison, empirical_spectral_density, saturation
from thought_kernels.spectral.inspect import inspect_matrix, inspect_model
from thought_kernels.spectral.inspect_summary import summarise
from thought_kernels.spectral.nulls import marchenko_pastur, null_saturation, shuffled
from thought_kernels.spectral.stored import StoredMatrix, stored_matrices, token_names

# Two float64 decompositions of the same small matrix.
SAME = 1e-9


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_matrix_of_a_model_has_a_row(sharded: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_gemma3(dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else True
    rows = {row.name: row for row in inspect_model(tmp_path)}
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    assert rows.keys() == weights.keys()
    for name, weight in weights.items():
        row, W = rows[name], weight if weight.shape[0] <= weight.shape[1] else weight.T
        assert (row.rows, row.columns) == tuple(weight.shape)
        assert row.features == ("columns" if W is weight else "rows")
        assert row.saturation == pytest.approx(saturation(W), rel=SAME)
        density = empirical_spectral_density(W)
        assert (row.rank, row.stable_rank, row.effective_rank) == pytest.approx(
            (density.rank, density.stable_rank, density.effective_rank), rel=SAME
        )
        shares = classify_features(W).shares
        assert (row.localized, row.band_localized, row.broadband) == (
            shares["localized"], shares["band-localized"], shares["broadband"],
        )  # fmt: skip
        assert row.alpha is None and "too few" in row.note


def test_one_matrix_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_multimodal_gemma3().save_pretrained(tmp_path)
    alive: list[weakref.ref[Tensor]] = []
    read = StoredMatrix.read

    def watched(matrix: StoredMatrix) -> Tensor:
        assert not any(reference() is not None for reference in alive), "an earlier matrix is still in memory"
        tensor = read(matrix)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredMatrix, "read", watched)
    names = [row.name for row in inspect_model(tmp_path)]
    assert len(names) == len(alive) > 10
    assert any("vision" in name for name in names) and any("language_model" in name for name in names)


def test_experts_convolutions_and_what_is_no_matrix(tmp_path: Path) -> None:
    experts, kernel = normal(3, 6, 9), normal(4, 3, 2, 2)
    tensors = {
        "layers.0.experts": experts, "conv.weight": kernel, "norm.weight": normal(5), "row.weight": normal(1, 7),
        "layers.1.zero.weight": torch.zeros(3, 4), "layers.1.int.weight": torch.ones(3, 4, dtype=torch.int8),
        "layers.1.nan.weight": torch.full((3, 4), float("nan")), "layers.1.wide.weight": normal(60, 70),
    }  # fmt: skip
    save_file(tensors, tmp_path / "part.safetensors")
    rows = {row.name: row for row in inspect_model(tmp_path)}
    assert rows.keys() == {f"layers.0.experts[{i}]" for i in range(3)} | {
        "conv.weight", "layers.1.zero.weight", "layers.1.int.weight", "layers.1.nan.weight", "layers.1.wide.weight",
    }  # fmt: skip
    assert rows["layers.0.experts[2]"].saturation == pytest.approx(saturation(experts[2]), rel=SAME)
    assert (rows["conv.weight"].rows, rows["conv.weight"].columns) == (4, 12)
    assert rows["conv.weight"].saturation == pytest.approx(saturation(kernel.flatten(1)), rel=SAME)
    for name, note in (("zero", "rank 0"), ("int", "quantised (I8)"), ("nan", "NaN or an infinity")):
        assert rows[f"layers.1.{name}.weight"].rank is None and note in rows[f"layers.1.{name}.weight"].note
    wide = rows["layers.1.wide.weight"]
    assert wide.alpha is not None and wide.alpha_low is not None and wide.alpha_low < wide.alpha
    assert wide.tail is not None and wide.tail >= 10
    stored = {matrix.name: matrix for matrix in stored_matrices(tmp_path / "part.safetensors")}
    assert [stored[name].block for name in ("layers.0.experts[2]", "conv.weight", "layers.1.int.weight")] == [
        0,
        None,
        1,
    ]
    assert stored["layers.0.experts[2]"].kind == "layers.experts"


def test_zero_features_are_counted_and_sides_may_be_chosen() -> None:
    W = normal(6, 20)
    W[:, 3] = 0
    figures = inspect_matrix(W)
    assert figures["zero_features"] == 1
    assert figures["localized"] + figures["band_localized"] + figures["broadband"] == pytest.approx(19 / 20)
    assert inspect_matrix(W, features="rows")["saturation"] == pytest.approx(saturation(W.T), rel=SAME)
    with pytest.raises(ValueError, match="inspect_matrix: features must be one of longer, rows, columns, got 'both'"):
        inspect_matrix(W, features="both")


def test_tiny_and_huge_weights_have_the_same_figures() -> None:
    W = normal(60, 80, dtype=torch.float64)
    expected = inspect_matrix(W)
    assert expected.pop("note") == ""
    alpha, logs = expected["alpha"], ("log_norm", "log_spectral_norm", "alpha_weighted", "log_alpha_norm")
    for power in (-200, 200):
        scaled = inspect_matrix(W * 10.0**power)
        assert scaled.pop("note") == ""
        for name in logs:
            scaled[name] -= 2 * power * (alpha if "alpha" in name else 1)
        assert scaled == pytest.approx(expected, rel=1e-6)  # the factors are no powers of two


@pytest.mark.parametrize("shape", [(60, 300), (300, 60), (80, 80)])
@pytest.mark.parametrize("features", ["rows", "columns"])
def test_noise_is_its_own_null(shape: tuple[int, int], features: str) -> None:
    """Whatever side is taken for features, independent entries are where their shuffled ones are."""
    found = inspect_matrix(normal(*shape), features=features)
    m, n = shape if features == "columns" else shape[::-1]
    # Means over n features or of short spectra, which scatter by a few per cent at these sizes.
    assert found["saturation"] == pytest.approx(null_saturation(m, n), rel=0.05)
    for name in ("saturation", "stable_rank", "effective_rank", "residual"):
        assert found[name] == pytest.approx(found[f"{name}_null"], rel=0.15), name
    assert found["half_width"] == pytest.approx(found["half_width_null"], abs=0.15)
    for name in ("spikes", "spikes_null", "spike_share", "spike_share_null"):
        assert found[name] == 0, name
    assert found["bulk_distance_null"] < 0.1 and found["bulk_distance"] < 0.1 and found["shuffle_distance"] < 0.1


def test_the_null_is_that_of_the_shuffled_matrix() -> None:
    W = normal(30, 4) @ normal(4, 200, seed=1) + 0.3 * normal(30, 200, seed=2)
    found, other = inspect_matrix(W), inspect_matrix(shuffled(W, 5))
    assert found["spikes"] == 4 and found["spike_share"] > 0.5 and found["shuffle_distance"] > 0.3
    for name in ("saturation", "stable_rank", "effective_rank", "residual"):
        assert found[f"{name}_null"] == pytest.approx(other[name], rel=0.1)
        assert abs(found[name] / other[name] - 1) > 0.2
    values = torch.linalg.svdvals(W.double()).square()
    bulk = marchenko_pastur(values, 30, 200)
    assert (found["spikes"], found["bulk_distance"]) == (bulk.spikes, pytest.approx(bulk.distance, rel=1e-6))
    assert found["spikes_null"] == 0 and found["spike_share_null"] == 0


def test_large_entries_have_spikes_in_any_order() -> None:
    """Few entries that are far larger than the rest stand above the bulk wherever they are: the null says so."""
    W = normal(60, 300)
    W[torch.arange(5), torch.arange(5)] += 80.0
    found = inspect_matrix(W)
    assert found["spikes"] == 5 and found["spikes_null"] > 0
    assert found["spike_share"] == pytest.approx(found["spike_share_null"], rel=0.3)


def test_log_norms_are_their_definitions() -> None:
    W = normal(60, 90, dtype=torch.float64) * torch.logspace(0, 1, 90, dtype=torch.float64)
    found, values = inspect_matrix(W), torch.linalg.svdvals(W).square()
    assert found["log_norm"] == pytest.approx(float(values.sum().log10()), rel=SAME)
    assert found["log_spectral_norm"] == pytest.approx(float(values[0].log10()), rel=SAME)
    assert found["alpha_weighted"] == pytest.approx(found["alpha"] * found["log_spectral_norm"], rel=SAME)
    assert found["log_alpha_norm"] == pytest.approx(float((values ** found["alpha"]).sum().log10()), rel=SAME)


def test_matrices_come_as_the_model_runs_through_them(tmp_path: Path) -> None:
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    names += [f"model.layers.{i}.mlp.{kind}.weight" for i in (0, 1, 2, 10, 11) for kind in ("down_proj", "up_proj")]
    save_file({name: normal(4, 5) for name in names}, tmp_path / "model.safetensors")
    found = [matrix.name for matrix in stored_matrices(tmp_path)]
    assert found == [names[1], *names[2:], names[0]]
    summaries = summarise(list(inspect_model(tmp_path)))
    assert [one.kind for one in summaries] == [
        "model.embed_tokens", "model.layers.mlp.down_proj", "model.layers.mlp.up_proj", "lm_head", "all",
    ]  # fmt: skip
    assert [one.matrices for one in summaries] == [1, 5, 5, 1, 12]
    assert summaries[-1].saturation == pytest.approx(inspect_matrix(normal(4, 5))["saturation"], rel=SAME)


def test_a_gguf_file_is_read_block_by_block(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    wide, plain, experts = normal(32, 64), normal(8, 32, seed=1), normal(2, 6, 32, seed=2)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_token_list(["<s>", "a", "ä"])
    packed = gguf.quants.quantize(wide.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", plain.numpy())
    writer.add_tensor("blk.1.ffn_exps.weight", experts.numpy())
    writer.add_tensor("output_norm.weight", normal(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for where in (tmp_path, tmp_path / "model.gguf"):
        found = {matrix.name: matrix for matrix in stored_matrices(where)}
        assert list(found) == [
            "token_embd.weight", "blk.0.ffn_up.weight", "blk.1.ffn_exps.weight[0]", "blk.1.ffn_exps.weight[1]",
        ]  # fmt: skip
        assert [found[name].dtype for name in list(found)[:2]] == ["F32", "Q8_0"]
        assert torch.equal(found["token_embd.weight"].read(), plain)
        assert torch.equal(found["blk.1.ffn_exps.weight[1]"].read(), experts[1])
        # Blocks of 32 share a scale and are rounded to 8 bits.
        read = found["blk.0.ffn_up.weight"].read()
        assert read.shape == wide.shape and float((read - wide).abs().max()) < float(wide.abs().max()) / 120
        assert token_names(where) == ["<s>", "a", "ä"]
        rows = list(inspect_model(where))
        assert all(row.rank is not None for row in rows)
    (tmp_path / "model.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(ValueError, match=r"model.gguf must be a readable, undamaged file"):
        stored_matrices(tmp_path)


def gguf_of(path: Path, tensors: dict[str, tuple[Any, Any]]) -> None:
    """A GGUF file of arrays, each with its raw dtype or None."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, (array, raw) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_no_reader_widens_is_a_note_and_the_rest_goes_on(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    double, blocks = normal(6, 8, dtype=torch.float64), torch.zeros(4, 40, dtype=torch.uint8).numpy()
    tensors: dict[str, tuple[Any, Any]] = {
        f"blk.0.ids{bits}.weight": (torch.ones(4, 5, dtype=dtype).numpy(), None)
        for bits, dtype in ((8, torch.int8), (16, torch.int16), (32, torch.int32), (64, torch.int64))
    }
    tensors |= {
        "blk.0.double.weight": (double.numpy(), None), "blk.1.float.weight": (normal(4, 5).numpy(), None),
        "blk.0.packed.weight": (blocks, gguf.GGMLQuantizationType.Q8_1),
    }  # fmt: skip
    gguf_of(tmp_path / "model.gguf", tensors)
    rows = {row.name: row for row in inspect_model(tmp_path)}
    assert rows["blk.0.double.weight"].saturation == pytest.approx(saturation(double), rel=SAME)
    assert rows["blk.1.float.weight"].rank == 4
    stored = {matrix.name: matrix for matrix in stored_matrices(tmp_path)}
    assert torch.equal(stored["blk.0.double.weight"].read(), double)
    assert rows["blk.0.packed.weight"].note == "quantised (Q8_1)"
    for bits in (8, 16, 32, 64):
        assert rows[f"blk.0.ids{bits}.weight"].note == f"quantised (I{bits})"
    changes = {change.name: change.note for change in comparison.compare_models(tmp_path, tmp_path)}
    assert {name for name, note in changes.items() if note == "quantised"} == rows.keys() - {
        "blk.0.double.weight", "blk.1.float.weight",
    }  # fmt: skip


def test_packed_weights_in_one_column_are_told(tmp_path: Path) -> None:
    tensors = {
        "layers.0.q_proj.weight": torch.ones(32, 1, dtype=torch.uint8), "layers.0.norm.weight": normal(4, 5),
        "layers.0.scale": normal(32, 1), "layers.0.row": torch.ones(1, 32, dtype=torch.uint8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    rows = {row.name: row for row in inspect_model(tmp_path)}
    assert rows.keys() == {"layers.0.q_proj.weight", "layers.0.norm.weight"}
    assert rows["layers.0.q_proj.weight"].note == "quantised (U8)"


def test_numbered_parts_come_by_number(tmp_path: Path) -> None:
    experts = [f"model.layers.0.mlp.experts.{i}.{kind}.weight" for i in range(12) for kind in ("w2", "up_proj")]
    stacked = [f"model.layers.1.mlp.experts[{i}]" for i in range(12)]
    save_file({name: normal(4, 5) for name in reversed(experts)}, tmp_path / "a.safetensors")
    save_file({stacked[0][:-3]: normal(12, 4, 5)}, tmp_path / "b.safetensors")
    found = [matrix.name for matrix in stored_matrices(tmp_path)]
    assert sorted(found[:24]) == sorted(experts) and found[24:] == stacked
    numbers = [name.split(".")[5] for name in found[:24]]
    assert numbers == [str(i) for i in range(12) for _ in range(2)]
    assert len({tuple(name.split(".")[6] for name in found[i : i + 2]) for i in range(0, 24, 2)}) == 1


def test_token_names_of_a_folder(tmp_path: Path) -> None:
    save_file({"a.weight": normal(3, 4)}, tmp_path / "model.safetensors")
    assert token_names(tmp_path) is None
    record: dict[str, Any] = {"model": {"vocab": {"b": 1, "a": 0}}, "added_tokens": [{"id": 3, "content": "<end>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    assert token_names(tmp_path) == ["a", "b", "", "<end>"]
    record["model"]["vocab"] = [["x", -1.0], ["y", -2.0]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    assert token_names(tmp_path) == ["x", "y", "", "<end>"]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json must be a readable, undamaged file"):
        token_names(tmp_path)


def test_refusals_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="stored_matrices: model must be a folder, a .safetensors or a .gguf file, got"
    ):
        stored_matrices(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="stored_matrices: model must hold .safetensors files, got none"):
        stored_matrices(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header")
    with pytest.raises(ValueError, match="model.safetensors must be a readable, undamaged file, got"):
        stored_matrices(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match="every shard that its index names, got 1 missing, such as 'model-2"):
        stored_matrices(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json must be a readable, undamaged file"):
        stored_matrices(tmp_path)
