"""`thought-kernels inspect`: its file of rows, its refusals, tokens and neurons, two models."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from thought_kernels.cli import app
from thought_kernels.spectral import comparison
from thought_kernels.spectral.stored import StoredMatrix, stored_matrices


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_a_spectrum_without_a_bulk_has_no_spikes(tmp_path: Path) -> None:
    smooth = torch.logspace(0, -4, 60)[:, None] * torch.linalg.qr(normal(80, 60))[0].T
    save_file({"smooth.weight": smooth}, tmp_path / "model.safetensors")
    rows = tmp_path / "rows.csv"
    for _ in range(2):  # measured, and read from the file
        result = run("inspect", tmp_path, "--csv", rows)
        assert result.exit_code == 0, result.output
        assert "None" not in result.stdout and re.search(r"60x80 c .* - -/\d+%", result.stdout)
    (row,) = rows_of(rows)
    assert (row["spikes"], row["spike_share"]) == ("", "") and row["spikes_null"] != ""


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
