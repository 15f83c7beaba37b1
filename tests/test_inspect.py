"""Whole models' weights, read one matrix at a time from the files transformers writes."""

from __future__ import annotations

import csv
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_multimodal_gemma3
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from thought_kernels.cli import app
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
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    rows = {row.name: row for row in inspect_model(tmp_path)}
    assert rows["blk.0.double.weight"].saturation == pytest.approx(saturation(double), rel=SAME)
    assert rows["blk.1.float.weight"].rank == 4
    stored = {matrix.name: matrix for matrix in stored_matrices(tmp_path)}
    assert torch.equal(stored["blk.0.double.weight"].read(), double)
    assert rows["blk.0.packed.weight"].note == "quantised (Q8_1)"
    for bits in (8, 16, 32, 64):
        assert rows[f"blk.0.ids{bits}.weight"].note == f"quantised (I{bits})"
    assert run("inspect", tmp_path, "--compare", tmp_path).exit_code == 0


def test_packed_weights_in_one_column_are_told(tmp_path: Path) -> None:
    tensors = {
        "layers.0.q_proj.weight": torch.ones(32, 1, dtype=torch.uint8), "layers.0.norm.weight": normal(4, 5),
        "layers.0.scale": normal(32, 1), "layers.0.row": torch.ones(1, 32, dtype=torch.uint8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    rows = {row.name: row for row in inspect_model(tmp_path)}
    assert rows.keys() == {"layers.0.q_proj.weight", "layers.0.norm.weight"}
    assert rows["layers.0.q_proj.weight"].note == "quantised (U8)"
    result = run("inspect", tmp_path)
    assert result.exit_code == 0 and "layers.0.q_proj.weight: quantised (U8)" in result.stdout


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


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_gemma3().save_pretrained(path)
    return path


def test_the_command_writes_rows_and_a_picture(folder: Path, tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    result = run("inspect", folder, "--csv", rows, "--plot", picture, "--filter", "o_proj", "--filter", "*.1.mlp.*")
    assert result.exit_code == 0, result.output
    with rows.open() as file:
        lines = list(csv.DictReader(file))
    kinds = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj"]
    assert sorted(line["name"] for line in lines) == sorted(
        [
            *(f"model.layers.1.{kind}.weight" for kind in kinds),
            *(f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 2)),
        ]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.png"]
    assert "above" in result.stdout and "all" in result.stdout
    limited = run("inspect", folder, "--limit", 1)
    assert limited.exit_code == 0 and "embed_tok" in limited.stdout.replace("\n", "") and "o_proj" not in limited.stdout


def test_rows_of_another_filter_stay(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    for wanted in ("*.0.self_attn.o_proj*", "*.2.self_attn.o_proj*", "*.0.self_attn.o_proj*"):
        assert run("inspect", folder, "--csv", rows, "--filter", wanted).exit_code == 0
        with rows.open() as file:
            found = [line["name"] for line in csv.DictReader(file)]
    assert sorted(found) == [f"model.layers.{index}.self_attn.o_proj.weight" for index in (0, 2)]


def test_an_interrupted_run_goes_on_from_its_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole.csv", tmp_path / "resumed.csv"
    assert run("inspect", folder, "--csv", whole).exit_code == 0
    read, count = StoredMatrix.read, 0

    def failing(matrix: StoredMatrix) -> Tensor:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return read(matrix)

    monkeypatch.setattr(StoredMatrix, "read", failing)
    assert run("inspect", folder, "--csv", resumed).exit_code != 0
    assert not resumed.exists() and count == 6
    assert run("inspect", folder, "--csv", resumed).exit_code == 0
    with whole.open() as file:
        matrices = len(list(csv.DictReader(file)))
    assert count == 1 + matrices  # none was read twice, but for the one that failed
    assert run("inspect", folder, "--csv", resumed).exit_code == 0
    assert count == 1 + matrices  # and none again: the finished file is used
    assert run("inspect", folder, "--csv", resumed, "--features", "rows").exit_code == 0
    assert count == 1 + 2 * matrices  # rows of another side are not those
    assert run("inspect", folder, "--csv", resumed).exit_code == 0
    assert count == 1 + 2 * matrices  # but both are kept
    assert resumed.read_text().startswith(whole.read_text())
    assert len(resumed.read_text().splitlines()) == 1 + 2 * matrices
    assert not list(tmp_path.glob("*.partial"))


def test_rows_of_another_model_and_damaged_ones_are_not_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"  # of the same shapes and names
    other.mkdir()
    (file,) = folder.glob("*.safetensors")
    save_file({name: 0.5 + tensor for name, tensor in load_file(file).items()}, other / file.name)
    alone, mixed, partial = tmp_path / "alone.csv", tmp_path / "mixed.csv", tmp_path / "mixed.csv.partial"
    assert run("inspect", other, "--csv", alone).exit_code == 0

    def interrupted(path: Path, after: int) -> None:
        read, count = StoredMatrix.read, 0

        def failing(matrix: StoredMatrix) -> Tensor:
            nonlocal count
            count += 1
            if count > after:
                raise KeyboardInterrupt
            return read(matrix)

        with monkeypatch.context() as context:
            context.setattr(StoredMatrix, "read", failing)
            assert run("inspect", path, "--csv", mixed).exit_code != 0

    interrupted(folder, 4)
    first_rows = partial.read_text().splitlines()[1:]
    assert len(first_rows) == 4
    assert run("inspect", other, "--csv", mixed).exit_code == 0
    assert mixed.read_text().splitlines() == [*alone.read_text().splitlines(), *first_rows]
    mixed.unlink()  # or its rows would be used again
    interrupted(other, 4)
    head, first, second, *rest = partial.read_text().splitlines(keepends=True)
    damaged = first.replace(",", ",x", 2)
    partial.write_bytes("".join([head, damaged, second, *rest]).encode()[:-40] + b"\xff")
    assert run("inspect", other, "--csv", mixed).exit_code == 0
    assert mixed.read_text() == alone.read_text()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_other_files_stay_and_those_of_a_changed_one_go(tmp_path: Path) -> None:
    rows, files = tmp_path / "out.csv", [tmp_path / folder / "model.safetensors" for folder in "ab"]
    for seed, file in enumerate(files):
        file.parent.mkdir()
        save_file({f"{name}.weight": normal(4, 5, seed=seed) for name in "xy"}, file)
        assert run("inspect", file, "--csv", rows).exit_code == 0
    first = rows_of(rows)
    assert [row["name"] for row in first] == ["x.weight", "y.weight"] * 2
    assert len({row["saturation"] for row in first}) == 2 and str(tmp_path) not in rows.read_text()
    save_file({f"{name}.weight": normal(5, 5, seed=7) for name in "xy"}, files[0])
    assert run("inspect", files[0].parent, "--csv", rows, "--filter", "x").exit_code == 0
    found = rows_of(rows)
    assert [(row["name"], row["rows"]) for row in found] == [("x.weight", "5"), ("x.weight", "4"), ("y.weight", "4")]
    assert found[1:] == first[:2]  # the rows of b, which was measured last


def test_rows_that_earlier_versions_wrote_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, file = tmp_path / "out.csv", tmp_path / "model.safetensors"
    save_file({"x.weight": normal(4, 5)}, file)
    assert run("inspect", file, "--csv", rows).exit_code == 0
    now = rows.read_text()
    state = file.stat()
    source = f"longer {file.name} {state.st_size} {state.st_mtime_ns}"
    assert now.splitlines()[1].rpartition(",")[2].startswith(f"{source} at ")
    rows.write_text(now.replace(now.splitlines()[1].rpartition(",")[2], source))
    monkeypatch.setattr(StoredMatrix, "read", lambda matrix: pytest.fail("read again"))
    assert run("inspect", file, "--csv", rows).exit_code == 0
    assert rows.read_text() == now


@pytest.mark.parametrize("ending", ["", ".partial"])
def test_a_file_of_other_columns_is_refused_untouched(ending: str, folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "out.csv"
    foreign, text = tmp_path / f"out.csv{ending}", "city,people\nOslo,1\n"
    foreign.write_text(text)
    for arguments, command in (((), "inspect"), (("--compare", folder), "inspect --compare")):
        result = run("inspect", folder, "--csv", rows, *arguments)
        sentence = f"inspect: --csv must hold rows of {command}, got {foreign} with the columns city, people; name"
        assert result.exit_code == 1 and sentence in result.stderr
        assert foreign.read_text() == text and [file.name for file in tmp_path.iterdir()] == [foreign.name]


def test_the_two_commands_refuse_one_anothers_rows(folder: Path, tmp_path: Path) -> None:
    for first, second in (((), ("--compare", folder)), (("--compare", folder), ())):
        rows = tmp_path / f"{len(first)}.csv"
        assert run("inspect", folder, "--csv", rows, "--limit", 1, *first).exit_code == 0
        text = rows.read_text()
        result = run("inspect", folder, "--csv", rows, *second)
        assert result.exit_code == 1 and "inspect: --csv must hold rows of inspect" in result.stderr
        assert rows.read_text() == text


def test_the_command_says_what_it_took(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "out.csv"
    for arguments, measured in ((("--csv", rows), 2), (("--csv", rows), 0), (("--compare", folder), 2)):
        result = run("inspect", folder, "--limit", 2, *arguments)
        found = re.search(r"(\d+) matrices measured in (\d+\.\d) s, peak (\d+) MiB", result.stderr)
        assert found and int(found[1]) == measured and int(found[3]) > 50


def test_what_cannot_be_measured_takes_no_columns_place(tmp_path: Path) -> None:
    tensors = {"good.weight": normal(60, 80), "zero.weight": torch.zeros(60, 80)}
    save_file(tensors, tmp_path / "model.safetensors")
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    assert "60x80 c" in result.stdout and "…" not in result.stdout
    assert "zero.weight: rank 0; without a nonzero feature there is no spectrum" in result.stdout


def test_the_command_refuses_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    for arguments, sentence, code in (
        ((tmp_path,), "must hold .safetensors files", 1),
        ((folder, "--filter", "nothing"), "--filter must match a matrix of", 1),
        ((folder, "--csv", tmp_path), "--csv must be a file", 2),
        ((folder, "--compare", folder, "--plot", tmp_path / "p.png"), "--compare must be given without --plot", 2),
        (
            (folder, "--neighbours", tmp_path / "n.json", "--csv", tmp_path / "c.csv"),
            "--neighbours must be given without --csv",
            2,
        ),
        (
            (folder, "--neighbours", tmp_path / "n.json", "--features", "rows"),
            "--neighbours must be given without --features",
            2,
        ),
        ((folder, "--plot", tmp_path / "picture.docx"), "--plot must end in one of", 2),
        (
            ("nobody/nothing", "--offline"),
            "inspect: model must be a folder or a hub id, got 'nobody/nothing', where no folder is; ",
            1,
        ),
    ):
        result = run("inspect", *arguments)
        assert result.exit_code == code, result.output
        assert sentence in " ".join(result.stderr.replace("│", " ").split())


def test_tokens_and_neurons_are_told_with_their_neighbours(tmp_path: Path) -> None:
    model = tiny_gemma3()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[5] = 1.1 * embedding[3] + 0.01 * embedding[4]  # two that are nearly one
    model.save_pretrained(tmp_path)
    path = tmp_path / "who.json"
    result = run("inspect", tmp_path, "--neighbours", path)
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert sorted(name.split(".")[-2] for name in found) == ["down_proj"] * 3 + ["embed_tokens"]
    (name,) = (name for name in found if "embed" in name)
    assert found[name]["features"] == len(embedding)
    assert ["3", "5"] in [sorted(cluster["names"]) for cluster in found[name]["clusters"]]
    save_file({"a.weight": normal(3, 4)}, tmp_path / "model.safetensors")
    result = run("inspect", tmp_path / "model.safetensors", "--neighbours", path)
    assert result.exit_code == 1 and "--neighbours must find an embedding or a down_proj" in result.stderr


@pytest.mark.parametrize("tokens", [8, 12])
def test_a_padded_vocabulary_is_named_as_far_as_it_goes(tokens: int, tmp_path: Path) -> None:
    embedding = normal(12, 4) + 3
    embedding[9:] = 0
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "model.safetensors")
    vocabulary = {f"t{i}": i for i in range(tokens) if i != 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    path = tmp_path / "who.json"
    result = run("inspect", tmp_path, "--neighbours", path)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(path.read_text()).values()
    names = {one["index"]: one["name"] for one in found["most_shared"]}
    expected = {i: f"t{i}" if i in vocabulary.values() else f"[{i}]" for i in range(9)}
    assert names == expected and found["zero_features"] == 3
    shares = {other["name"] for one in found["most_shared"] for other in one["neighbours"]}
    assert shares <= set(expected.values())
    assert "shuffled" in result.stdout and "matrices measured in" in result.stderr


NEURONS = [
    ("h.0.mlp.c_proj", (32, 8), 32, 8),  # GPT-2: [in, out]
    ("transformer.h.0.mlp.c_proj", (8, 32), 32, 8),  # its namesakes: [out, in]
    ("h.0.attn.c_proj", (8, 8), None, None),
    ("model.layers.0.mlp.down_proj", (8, 32), 32, 8),
    ("model.layers.0.mlp.experts.3.down_proj", (8, 6), 6, 8),
    ("model.layers.0.mlp.experts.down_proj", (2, 8, 6), 6, 8),
    ("model.layers.0.block_sparse_moe.experts.3.w2", (8, 32), 32, 8),
    ("model.layers.0.block_sparse_moe.experts.3.w1", (32, 8), None, None),
    ("model.layers.0.attention.w2", (8, 8), None, None),
    ("gpt_neox.layers.0.mlp.dense_4h_to_h", (8, 32), 32, 8),
    ("gpt_neox.layers.0.attention.dense", (8, 8), None, None),
    ("model.layers.0.mlp.fc2", (8, 32), 32, 8),
    ("blk.0.ffn_down_exps", (2, 8, 6), 6, 8),
    ("wpe", (16, 8), None, None),
]


def test_neurons_are_those_of_the_mlp_from_the_side_that_they_write_to(tmp_path: Path) -> None:
    save_file({f"{name}.weight": normal(*shape) for name, shape, *_ in NEURONS}, tmp_path / "model.safetensors")
    path = tmp_path / "who.json"
    result = run("inspect", tmp_path, "--neighbours", path)
    assert result.exit_code == 0, result.output
    found = {name: (one["features"], one["dimensions"]) for name, one in json.loads(path.read_text()).items()}
    expected = {}
    for name, shape, features, dimensions in NEURONS:
        parts = [f"[{i}]" for i in range(shape[0])] if len(shape) == 3 else [""]
        expected |= {f"{name}.weight{part}": (features, dimensions) for part in parts if features}
    assert found == expected


def test_a_comparison_goes_on_from_its_rows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = folder.glob("*.safetensors")
    other, rows, whole = tmp_path / "other.safetensors", tmp_path / "rows.csv", tmp_path / "whole.csv"
    tensors = {name: 1.5 * tensor for name, tensor in load_file(file).items()}
    *_, last = stored_matrices(folder)
    del tensors[last.name]  # all that is left in the end has no counterpart
    save_file(tensors, other)
    arguments = ("inspect", folder, "--compare", other, "--csv")
    assert run(*arguments, whole).exit_code == 0
    compared, count = comparison._change, 0

    def failing(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return compared(*arguments)

    monkeypatch.setattr(comparison, "_change", failing)
    assert run(*arguments, rows).exit_code != 0
    assert not rows.exists() and len(rows_of(tmp_path / "rows.csv.partial")) == 3
    matrices = len(rows_of(whole))
    assert run(*arguments, rows, "--limit", matrices - 1).exit_code == 0
    assert count == matrices  # none twice, but for the one that failed
    assert run(*arguments, rows).exit_code == 0
    assert count == 1 + matrices and rows.read_text() == whole.read_text()
    assert run(*arguments, rows).exit_code == 0 and count == 1 + matrices
    assert run("inspect", folder, "--compare", folder, "--csv", rows).exit_code == 0
    assert len(rows_of(rows)) == 2 * matrices
    assert not list(tmp_path.glob("*.partial"))


def test_two_models_are_compared(folder: Path, tmp_path: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    names = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    tensors[names[0]] = tensors[names[0]] + 0.1 * torch.outer(normal(len(tensors[names[0]])), tensors[names[0]][0])
    del tensors[names[1]]
    save_file(tensors, tmp_path / "model.safetensors")
    rows = tmp_path / "changes.csv"
    result = run("inspect", folder, "--compare", tmp_path, "--csv", rows)
    assert result.exit_code == 0, result.output
    with rows.open() as lines:
        found = {line["name"]: line for line in csv.DictReader(lines)}
    assert list(found) == [matrix.name for matrix in stored_matrices(folder)]
    assert "nothing of this name in the other model" in found[names[1]]["note"]
    assert float(found[names[0]]["change"]) > 0 and float(found[names[0]]["stable_rank"]) == pytest.approx(1, abs=1e-4)
    assert all(float(found[name]["change"]) == 0 for name in names[2:])
    # One direction; the same entries in another order are in many, and none of W's in particular.
    assert float(found[names[0]]["stable_rank_null"]) > 2
    assert all(found[name]["stable_rank_null"] == "" for name in names[1:])
    other = tmp_path / "other"
    other.mkdir()
    save_file({"b.weight": normal(3, 4)}, other / "model.safetensors")
    result = run("inspect", folder, "--compare", other)
    assert result.exit_code == 1 and "compare_models: other must have a matrix of the same name" in result.stderr
