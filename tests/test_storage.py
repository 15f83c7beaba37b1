"""A patch folder: what is read back is what was written, and whatever was damaged is refused by name."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patches import random_patch

from thought_kernels.patches import storage
from thought_kernels.patches.card import CARD_FILE
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch
from thought_kernels.patches.storage import RECORD_FILE, TENSOR_FILE

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]  # of a record and its tensors

PROVENANCE = {"instruction": "addiere « été »", "layers": [0, 2], "scale": {"mlp": 0.1}, "none": None}


def patches() -> list[ThoughtPatch]:
    shapes = {"attention": 4, "hidden": 3, "intermediate": 5, "provenance": PROVENANCE}
    return [
        random_patch(**shapes),
        random_patch(**shapes, rank=2, dtype=torch.float64),
        random_patch(**shapes, sites=("residual",)),
        random_patch(**shapes, dtype=torch.bfloat16, vectors=False, sites=("mlp",)) * 2,
    ]


def assert_same(a: ThoughtPatch, b: ThoughtPatch) -> None:
    assert a.entries.keys() == b.entries.keys()
    assert a.provenance == b.provenance
    for key, entry in a.entries.items():
        ours, theirs = entry.tensors(), b.entries[key].tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
        assert entry.fit == b.entries[key].fit


@pytest.mark.parametrize("index", range(4))
def test_a_folder_gives_back_the_patch(index: int, tmp_path: Path) -> None:
    patch = patches()[index]
    patch.save_pretrained(tmp_path / "deep" / "folder")
    assert_same(ThoughtPatch.from_pretrained(tmp_path / "deep" / "folder"), patch)
    assert {path.name for path in (tmp_path / "deep" / "folder").iterdir()} == {TENSOR_FILE, RECORD_FILE, CARD_FILE}
    assert math.inf in [entry.fit.condition for entry in patch.entries.values()] or index == 2


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    first, second = patches()[:2]
    first.save_pretrained(tmp_path)
    second.save_pretrained(str(tmp_path))
    assert_same(ThoughtPatch.from_pretrained(str(tmp_path)), second)


def test_views_and_shared_tensors_are_saved(tmp_path: Path) -> None:
    base = torch.randn(6, 6)
    entries = {(0, "mlp"): SitePatch(base.T), (1, "mlp"): SitePatch(base)}
    ThoughtPatch(entries).save_pretrained(tmp_path)
    assert_same(ThoughtPatch.from_pretrained(tmp_path), ThoughtPatch(entries))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[ThoughtPatch, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("saved")
    patch = patches()[0]
    patch.save_pretrained(folder)
    return patch, {name: (folder / name).read_bytes() for name in (TENSOR_FILE, RECORD_FILE)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([TENSOR_FILE, RECORD_FILE]), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans()
)
def test_any_damaged_byte_is_found(
    saved: Any, tmp_path_factory: pytest.TempPathFactory, name: str, place: float, flip: int, cut: bool
) -> None:
    patch, files = saved
    content = bytearray(files[name])
    position = int(place * len(content))
    if cut:
        del content[position:]
    else:
        content[position] ^= flip
    folder = write(tmp_path_factory.mktemp("damaged"), {**files, name: bytes(content)})
    try:
        loaded = ThoughtPatch.from_pretrained(folder)
    except ValueError as error:
        assert str(error).startswith("from_pretrained: ")
        assert str(folder / name) in str(error)
    else:
        # Only the layout of the JSON, one blank for another, may change unnoticed: it says the same.
        assert name == RECORD_FILE
        assert json.loads(bytes(content)) == json.loads(files[name])
        assert_same(loaded, patch)


@pytest.mark.slow
def test_ten_thousand_damaged_folders_are_refused(saved: Any, tmp_path: Path) -> None:
    patch, files = saved
    draw = random.Random(0)
    loaded = 0
    for _ in range(10_000):
        name = draw.choice([TENSOR_FILE, RECORD_FILE])
        content = bytearray(files[name])
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        del content[len(content) if draw.random() < 0.8 else draw.randrange(len(content)) :]
        folder = write(tmp_path, {**files, name: bytes(content)})
        try:
            found = ThoughtPatch.from_pretrained(folder)
        except ValueError as error:
            assert str(error).startswith("from_pretrained: ")
        else:
            loaded += 1
            assert_same(found, patch)
    assert loaded < 100  # an unlucky draw may leave a byte as it was, or one blank of the JSON for another


def forge(
    files: dict[str, bytes], change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
) -> dict[str, bytes]:
    """A folder whose checksums are right and whose content is not."""
    record = json.loads(files[RECORD_FILE])["record"]
    tensors = safetensors.torch.load(files[TENSOR_FILE])
    change(record, tensors)
    payload = safetensors.torch.save(tensors)
    if "sha256" in record:
        record["sha256"] = hashlib.sha256(payload).hexdigest()
    document = {"format": storage.FORMAT, "checksum": storage._checksum(record), "record": record}
    return {TENSOR_FILE: payload, RECORD_FILE: json.dumps(document).encode()}


def _set(name: str, value: Any) -> Change:
    def change(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value

    return change


def _tensor(name: str, value: torch.Tensor, index: int = 0) -> Change:
    def change(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        entry = record["entries"][index]
        entry["tensors"].append(name)
        tensors[f"{entry['layer']}.{entry['site']}.{name}"] = value

    return change


@pytest.mark.parametrize(
    ("change", "file", "message"),
    [
        (
            _set("0.mlp.matrix", torch.full((3, 3), torch.nan)),
            TENSOR_FILE,
            "finite floating numbers in 0.mlp.matrix, got",
        ),
        (_set("0.mlp.vector", torch.full((3,), torch.inf)), TENSOR_FILE, "got NaN or an infinity"),
        (_set("0.mlp.matrix", torch.ones(3, 3).int()), TENSOR_FILE, "got torch.int32"),
        (_set("0.mlp.matrix", torch.ones(3, 3).to(torch.float8_e4m3fn)), TENSOR_FILE, "got torch.float8_e4m3fn"),
        (
            _set("0.mlp.matrix", torch.ones(3, 4)),
            TENSOR_FILE,
            r"block 0, site 'mlp', got .* shape \[4\], got \[3\]",
        ),
        (_set("0.mlp.matrix", torch.ones(5, 5)), TENSOR_FILE, r"vector must have shape \[5\], got \[3\]"),
        (_set("0.mlp.extra", torch.ones(3)), TENSOR_FILE, r"others: \['0.mlp.extra'\]"),
        (lambda r, t: t.pop("2.residual.vector"), TENSOR_FILE, r"others: \['2.residual.vector'\]"),
        (lambda r, t: r["entries"][0].update(layer=1), TENSOR_FILE, "others"),
        (lambda r, t: r["entries"].append(dict(r["entries"][0])), RECORD_FILE, "list each block and site once"),
        (lambda r, t: r["entries"][0].update(site="head"), RECORD_FILE, "hold a well-formed 'entries'"),
        (lambda r, t: r["entries"][0].update(layer=-1), RECORD_FILE, "hold a well-formed 'entries'"),
        (lambda r, t: r["entries"][0].update(fit={"rows": 1}), RECORD_FILE, "hold a well-formed 'entries'"),
        (lambda r, t: r["entries"][0]["fit"].update(residual="low"), RECORD_FILE, "hold a well-formed 'entries'"),
        (lambda r, t: r.update(entries=[]), RECORD_FILE, "hold a well-formed 'entries'"),
        (lambda r, t: r.update(provenance=[]), RECORD_FILE, "hold a well-formed 'provenance'"),
        (lambda r, t: r.pop("sha256"), RECORD_FILE, "hold a well-formed 'sha256'"),
        (_tensor("extra", torch.ones(3)), RECORD_FILE, "hold a well-formed 'entries'"),
        (_tensor("left", torch.ones(3, 1)), RECORD_FILE, "hold a well-formed 'entries'"),
        (lambda r, t: r["entries"][0]["tensors"].append("vector"), RECORD_FILE, "hold a well-formed 'entries'"),
        (_tensor("matrix", torch.eye(3), -1), TENSOR_FILE, "'residual' must have a vector only, got a matrix"),
        (_set("2.residual.vector", torch.ones(7)), TENSOR_FILE, "must share one width per site"),
        (_set("2.down.matrix", torch.ones(3, 6)), TENSOR_FILE, r"activation_mean must have shape \[6\], got \[5\]"),
    ],
)
def test_wrong_content_under_right_checksums_is_refused(
    saved: Any, tmp_path: Path, change: Any, file: str, message: str
) -> None:
    folder = write(tmp_path, forge(saved[1], change))
    with pytest.raises(ValueError, match=message) as caught:
        ThoughtPatch.from_pretrained(folder)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "file", "message"),
    [
        (lambda f: f.pop(TENSOR_FILE), TENSOR_FILE, "be a readable file, got No such file"),
        (lambda f: f.pop(RECORD_FILE), RECORD_FILE, "be a readable file, got No such file"),
        (lambda f: f.update({RECORD_FILE: b"{"}), RECORD_FILE, "be valid JSON"),
        (
            lambda f: f.update({RECORD_FILE: b"[" * 100_000}),
            RECORD_FILE,
            "got JSON nested too deep",
        ),
        (lambda f: f.update({RECORD_FILE: b"\xff\xfe"}), RECORD_FILE, "be valid JSON"),
        (lambda f: f.update({RECORD_FILE: b'{"format": NaN}'}), RECORD_FILE, "the constant NaN"),
        (lambda f: f.update({RECORD_FILE: b"[]"}), RECORD_FILE, "have format '.*version 1', got list"),
        (
            lambda f: f.update({RECORD_FILE: f[RECORD_FILE].replace(b"version 1", b"version 9")}),
            RECORD_FILE,
            "version 9",
        ),
        (
            lambda f: f.update({RECORD_FILE: f[RECORD_FILE].replace(b"addiere", b"addiert")}),
            RECORD_FILE,
            "own checksum",
        ),
        (lambda f: f.update({TENSOR_FILE: f[TENSOR_FILE] + b"\0"}), TENSOR_FILE, "have the sha256 that"),
        (lambda f: f.update({TENSOR_FILE: b""}), TENSOR_FILE, "have the sha256 that"),
    ],
)
def test_damaged_folders_are_refused(saved: Any, tmp_path: Path, change: Any, file: str, message: str) -> None:
    files = dict(saved[1])
    change(files)
    folder = write(tmp_path, files)
    with pytest.raises(ValueError, match=message) as caught:
        ThoughtPatch.from_pretrained(folder)
    assert str(folder / file) in str(caught.value)


def test_a_tensor_file_that_is_none_is_refused_even_under_its_checksum(saved: Any, tmp_path: Path) -> None:
    record = json.loads(saved[1][RECORD_FILE])["record"]
    record["sha256"] = hashlib.sha256(b"junk").hexdigest()
    document = {"format": storage.FORMAT, "checksum": storage._checksum(record), "record": record}
    folder = write(tmp_path, {TENSOR_FILE: b"junk", RECORD_FILE: json.dumps(document).encode()})
    with pytest.raises(ValueError, match=f"{TENSOR_FILE} must be a safetensors file"):
        ThoughtPatch.from_pretrained(folder)


def test_patches_from_before_spherical_rows_were_told_still_load(saved: Any, tmp_path: Path) -> None:
    def older(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for entry in record["entries"]:
            del entry["fit"]["anisotropy"], entry["fit"]["spherical_scale"], entry["fit"]["best_scale"]

    patch, files = saved
    loaded = ThoughtPatch.from_pretrained(write(tmp_path, forge(files, older)))
    for key, entry in patch.entries.items():
        assert loaded.entries[key].fit == replace(entry.fit, anisotropy=None, spherical_scale=None, best_scale=None)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"nowhere.{RECORD_FILE} must be a readable file"):
        ThoughtPatch.from_pretrained(tmp_path / "nowhere")


def _nan() -> ThoughtPatch:
    return ThoughtPatch({(0, "mlp"): SitePatch(torch.full((3, 3), torch.nan))})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nan, "matrix must be finite, got NaN or an infinity; block 0, site 'mlp'"),
        (lambda: random_patch(provenance={"model": object()}), "provenance must hold JSON values only"),
        (lambda: random_patch(provenance={"scale": math.nan}), "provenance must hold JSON values only"),
        (lambda: random_patch(provenance={"instruction": "\ud800"}), "provenance must hold JSON values only"),
    ],
)
def test_a_refused_save_leaves_the_folder_alone(make: Any, message: str, saved: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, saved[1])
    with pytest.raises(ValueError, match=f"save_pretrained: {message}"):
        make().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == saved[1]


def test_an_interrupted_save_leaves_the_folder_alone(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, saved[1])

    def fail(_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        patches()[1].save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == saved[1]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="directory must be a folder, got the file"):
        random_patch().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adapter_config.json", "a LoRA adapter, which peft's PeftModel.from_pretrained loads, by its adapter_config"),
        ("config.json", "a model, which thought_kernels.load loads, by its config.json"),
        ("notes.txt", "a folder with notes.txt"),
        (None, "an empty one"),
    ],
)
def test_other_folders_are_named(name: str | None, told: str, tmp_path: Path) -> None:
    if name is not None:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"folder that save_pretrained wrote, with {RECORD_FILE}, got {told}"):
        ThoughtPatch.from_pretrained(tmp_path)
    file = tmp_path / "vector.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="got a file; ThoughtPatch.from_control_vector reads .*vector.gguf"):
        ThoughtPatch.from_pretrained(file)
