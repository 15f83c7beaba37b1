"""A transmutation that is stopped, anywhere, and goes on to the same patch bit for bit."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from models import tiny_gemma3, tiny_tokenizer
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app
from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.fitting import checkpoint, encoding
from thought_kernels.fitting import transmute as module
from thought_kernels.fitting.checkpoint import Checkpoint
from thought_kernels.patches import storage

TOKENIZER = tiny_tokenizer()
EXAMPLES = ["8 76", "5 1 3", "a dog"]


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 0)


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_gemma3(1, dtype, vocab_size=len(TOKENIZER), max_position_embeddings=2048)


def made(model: Any, folder: Path | None, examples: Any = EXAMPLES, **options: Any) -> tk.ThoughtPatch:
    options = {"max_new_tokens": 4, "written_inputs": 5, "without": None, **options}
    return tk.transmute(model, TOKENIZER, "Sum", examples, checkpoint=folder, **options)


def same(found: tk.ThoughtPatch, wanted: tk.ThoughtPatch) -> bool:
    """Every tensor by its bits, every figure of a fit, and what is remembered but for the time."""
    for key, entry in wanted.entries.items():
        ours, theirs = found.entries[key].tensors(), entry.tensors()
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            return False
        if found.entries[key].fit != entry.fit:
            return False
    told = [{name: value for name, value in one.provenance.items() if name != "date"} for one in (found, wanted)]
    return found.entries.keys() == wanted.entries.keys() and told[0] == told[1]


class Stop(BaseException):
    """Stands for a process that ends."""


def stopping(function: Callable[..., Any], calls: int, *, before: bool = False) -> Callable[..., Any]:
    """The function, which stops the process in place of its call after so many, or after the last of these."""
    count = 0

    def stopped(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if before and count > calls:
            raise Stop
        result = function(*args, **options)
        if not before and count >= calls:
            raise Stop
        return result

    return stopped


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"text_weight": 0.1, "estimator": "affine", "header_weight": 0.2}),
        (torch.float32, {"without": "Multiply", "tokens": "answer"}),
        (torch.bfloat16, {"layers": [1, 2], "sites": ("attention", "mlp", "residual"), "memory_budget": 1}),
    ],
)
def test_a_run_goes_on_from_the_last_block(
    blocks: int, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = model_of(dtype), tmp_path / "run"
    wanted = made(model, None, **options)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Checkpoint, "keep", stopping(Checkpoint.keep, blocks))
        made(model, folder, **options)
    solved: list[Any] = []
    part = ThoughtAccumulator.solve_part
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "written_inputs", lambda *_, **__: pytest.fail("written again"))
        patched.setattr(encoding, "with_completions", lambda *_, **__: pytest.fail("written again"))
        patched.setattr(ThoughtAccumulator, "solve_part", lambda *a, **o: solved.append(o["layers"]) or part(*a, **o))
        found = made(model, folder, **options)
    assert same(found, wanted)
    assert {layer for layers in solved for layer in layers} == set(range(blocks, 3))  # where there was a patch to keep


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_families_with_other_positions_and_without_a_header(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny(family, vocab_size=len(TOKENIZER)), [{"prompt": "8 7", "completion": "15"}]
    format = "{prompt} -> {completion}\n"
    wanted = made(model, None, given, format=format)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Checkpoint, "keep", stopping(Checkpoint.keep, 1))
        made(model, tmp_path, given, format=format)
    assert same(made(model, tmp_path, given, format=format), wanted)


def test_what_was_written_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    wanted = made(model, None)
    for name in ("written_inputs", "with_completions"):
        with monkeypatch.context() as patched, pytest.raises(Stop):
            patched.setattr(encoding, name, stopping(getattr(encoding, name), 0, before=True))
            made(model, tmp_path)
    monkeypatch.setattr(encoding, "written_inputs", lambda *_, **__: pytest.fail("written again"))
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(module, "fit", stopping(module.fit, 0, before=True))
        made(model, tmp_path)
    monkeypatch.setattr(encoding, "with_completions", lambda *_, **__: pytest.fail("written again"))
    assert same(made(model, tmp_path), wanted)


@pytest.mark.parametrize("pairing", ["two_pass", "layerwise"])
def test_other_pairings_go_on_with_what_was_written(
    pairing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    wanted = made(model, None, pairing=pairing)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(module, "fit", stopping(module.fit, 0, before=True))
        made(model, tmp_path, pairing=pairing)
    monkeypatch.setattr(encoding, "with_completions", lambda *_, **__: pytest.fail("written again"))
    assert same(made(model, tmp_path, pairing=pairing), wanted)


@pytest.mark.parametrize(
    "change", [{"ridge": 0.5}, {"seed": 1}, {"examples": ["8 77"]}, {"model": 2}, {"without": "Add"}]
)
def test_another_run_begins_anew(change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Checkpoint, "keep", stopping(Checkpoint.keep, 2))
        made(model_of(), tmp_path)
    options = {**change}
    model = tiny_gemma3(options.pop("model", 1), vocab_size=len(TOKENIZER), max_position_embeddings=2048)
    with monkeypatch.context() as patched, pytest.raises(Stop):  # once more stopped, before it has kept a block
        patched.setattr(Checkpoint, "keep", stopping(Checkpoint.keep, 0, before=True))
        made(model, tmp_path, **options)
    assert (tmp_path / "blocks-2").exists()  # the other run's
    assert same(made(model, tmp_path, **options), made(model, None, **options))


@pytest.mark.parametrize("weight", ["layers.1.self_attn.q_proj", "layers.2.mlp.gate_proj", "layers.0.input_layernorm"])
def test_a_model_of_any_other_weight_begins_anew(weight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Checkpoint, "keep", stopping(Checkpoint.keep, 2))
        made(model, tmp_path)
    model.model.get_submodule(weight).weight.data.mul_(1.5)
    assert same(made(model, tmp_path), made(model, None))
    (tmp_path / "blocks-2").rename(tmp_path / "blocks-1")  # so that there is one to take
    with made(model, None, ridge=3.0).applied(model):
        assert same(made(model, tmp_path), made(model, None))


@pytest.mark.parametrize("name", ["streams.bin", "state.json", "thought_patch.json", "thought_patch.safetensors"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_state_is_computed_again_and_replaced(
    name: str, cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, keep = model_of(), Checkpoint.keep
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Checkpoint, "keep", stopping(Checkpoint.keep, 2))
        made(model, tmp_path)
    (path,) = tmp_path.glob(f"blocks-2/{name}")
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 255
    path.write_bytes(content[: len(content) // 2] if cut else content)
    monkeypatch.setattr(Checkpoint, "keep", lambda self, blocks, *rest: blocks == 2 and keep(self, blocks, *rest))
    assert same(made(model, tmp_path), made(model, None))
    assert path.stat().st_size == len(whole) and [one.name for one in tmp_path.glob("blocks-*")] == ["blocks-2"]


def test_what_a_killed_write_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".0123abcd").mkdir()
    (tmp_path / ".0123abcd" / "streams.bin").write_bytes(b"half")
    (tmp_path / ".rows.json.0123abcd").write_text("{")
    model = model_of()
    assert same(made(model, tmp_path), made(model, None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks-2", "inputs.json", "rows.json"]


@pytest.mark.parametrize("name", ["_write_tensors", "replace_files"])
def test_a_full_disk_costs_the_state_and_not_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    wanted = made(model, None)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="checkpoint could not be written, No space"):
        patched.setattr(checkpoint, name, fail)
        assert same(made(model, tmp_path), wanted)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("blocks-*"))
    assert same(made(model, tmp_path), wanted)


def test_a_folder_with_other_files_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="^transmute: checkpoint must be a folder of its own, got .*, which holds mine.txt"
    ):
        made(model_of(), tmp_path)
    with pytest.raises(ValueError, match="^transmute: checkpoint must be a folder, got the file"):
        made(model_of(), tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("4 7\n1 2 3\n")
    asked = ["transmute", "--instruction", "Sum the numbers", "--examples", tmp_path / "in.txt", "--max-new-tokens", 4]

    def run(output: str) -> Any:
        return CliRunner().invoke(app, [str(part) for part in (*asked, "--output", tmp_path / output)])

    assert run("straight").exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "keep", stopping(Checkpoint.keep, 1))
        with pytest.raises(Stop):
            run("stopped")
    assert (tmp_path / "stopped" / "checkpoint" / "rows.json").exists()
    assert run("stopped").exit_code == 0
    patches = [tk.ThoughtPatch.from_pretrained(tmp_path / name) for name in ("straight", "stopped")]
    assert same(*patches)
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    payloads = [(tmp_path / name / storage.TENSOR_FILE).read_bytes() for name in ("straight", "stopped")]
    assert payloads[0] == payloads[1]


PROCESS = """
import sys, torch, thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.fitting import checkpoint
torch.set_num_threads(1)
checkpoint.EVERY, checkpoint._SHARE = 0.0, 0
model, tokenizer = tk.load(CHECKPOINT)
print("begun", flush=True)
inputs = [f"{a} {a + 3} {9 - a}" for a in range(8)]
patch = tk.transmute(model, tokenizer, "Sum the numbers", inputs, completions=2, max_new_tokens=12, batch_size=4,
                     written_inputs=0, checkpoint=sys.argv[1])
patch.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_killed_twenty_times_at_random_it_ends_with_the_same_patch(tmp_path: Path) -> None:
    def started(*folders: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROCESS, *map(str, folders)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        return process

    begun = time.monotonic()
    straight = started(tmp_path / "none", tmp_path / "straight")
    begun = time.monotonic()
    assert straight.wait() == 0
    seconds, draw, kills = time.monotonic() - begun, random.Random(0), 0
    while kills < 20:
        process = started(tmp_path / "run", tmp_path / f"patch {kills}")
        try:
            process.wait(timeout=draw.uniform(0, seconds / 2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        patch = tk.ThoughtPatch.from_pretrained(tmp_path / f"patch {kills}")
        assert same(patch, tk.ThoughtPatch.from_pretrained(tmp_path / "straight"))
    assert started(tmp_path / "run", tmp_path / "last").wait() == 0
    patches = [tk.ThoughtPatch.from_pretrained(tmp_path / name) for name in ("last", "straight")]
    assert same(*patches)
