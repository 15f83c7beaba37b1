"""Whole models' weights, read one matrix at a time from the files transformers writes."""

from __future__ import annotations

import csv
import json
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
from thought_kernels.spectral import classify_features, empirical_spectral_density, saturation
from thought_kernels.spectral.inspect import StoredMatrix, inspect_matrix, inspect_model, stored_matrices

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
    for factor in (1e-200, 1e200):
        scaled = inspect_matrix(W * factor)
        assert scaled.pop("note") == ""
        assert scaled == pytest.approx(expected, rel=1e-6)  # the factors are no powers of two


def test_refusals_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stored_matrices: model must be a folder or a .safetensors file, got"):
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
    limited = run("inspect", folder, "--limit", 1)
    assert limited.exit_code == 0 and "embed_tok" in limited.stdout.replace("\n", "") and "o_proj" not in limited.stdout


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
    assert resumed.read_text() == whole.read_text()
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
    assert run("inspect", other, "--csv", mixed).exit_code == 0
    assert mixed.read_text() == alone.read_text()
    interrupted(other, 4)
    head, first, second, *rest = partial.read_text().splitlines(keepends=True)
    damaged = first.replace(",", ",x", 2)
    partial.write_bytes("".join([head, damaged, second, *rest]).encode()[:-40] + b"\xff")
    assert run("inspect", other, "--csv", mixed).exit_code == 0
    assert mixed.read_text() == alone.read_text()


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
