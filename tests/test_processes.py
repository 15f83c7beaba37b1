"""Several processes of torch.distributed that share a transmutation: the patch that one makes alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_gemma3, tiny_tokenizer
from tolerances import SOLVED, largest

import thought_kernels as tk
from thought_kernels.fitting import checkpoint
from thought_kernels.fitting.checkpoint import Checkpoint
from thought_kernels.generation.processes import ALONE, Processes

GIVEN = [
    {"prompt": "8 7", "completion": "8 + 7"}, {"prompt": "abc", "completion": "c"},
    {"prompt": "12 4 9", "completion": "12, 4, 9"}, {"prompt": "1", "completion": "one"},
    {"prompt": "a dog", "completion": "a dog."},
]  # fmt: skip
BLOCKWISE = {"pairing": "layerwise", "header_weight": 0.2, "sites": ("attention", "mlp", "residual")}
SECONDS = 60
EXAMPLE = Path(__file__).parents[1] / "examples" / "many_processes.py"


def made(dtype: torch.dtype, examples: list[Any], **options: Any) -> tk.ThoughtPatch:
    tokenizer = tiny_tokenizer()
    model = tiny_gemma3(3, dtype, vocab_size=len(tokenizer), max_position_embeddings=2048)
    options = {"max_new_tokens": 4, "written_inputs": 6, **options}
    return tk.transmute(model, tokenizer, "Sum", examples, **options)


def _process(rank: int, size: int, folder: Path, dies: int | None, arguments: dict[str, Any]) -> None:
    """One of them: its patch is saved, or what it raised; `dies` is after how many blocks it is killed."""
    torch.set_num_threads(1)
    checkpoint.EVERY, checkpoint._SHARE = 0.0, 0
    if dies is not None:
        keep, count = Checkpoint.keep, 0

        def kept(*args: Any) -> None:
            nonlocal count
            keep(*args)
            count += 1
            if count == dies:
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoint.keep = kept  # type: ignore[method-assign]
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    try:
        made(**arguments, distributed=True).save_pretrained(folder / f"patch {rank}")
    except (RuntimeError, ValueError) as error:
        (folder / f"error {rank}").write_text(f"{type(error).__name__}: {error}")
    finally:
        dist.destroy_process_group()


def together(size: int, folder: Path, *, died: int | None = None, **arguments: Any) -> list[int | None]:
    """Exit codes of so many processes; the last one is killed after `died` blocks."""
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = []
    for rank in range(size):
        dies = died if rank == size - 1 else None
        processes.append(context.Process(target=_process, args=(rank, size, folder, dies, arguments)))
        processes[-1].start()
    for process in processes:
        process.join(3 * SECONDS)
    return [process.exitcode for process in processes]


def near(found: tk.ThoughtPatch, wanted: tk.ThoughtPatch, tolerance: float) -> None:
    assert found.entries.keys() == wanted.entries.keys()
    for key in wanted.entries:
        for ours, theirs in ((found.matrix(*key), wanted.matrix(*key)), (found.vector(*key), wanted.vector(*key))):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert largest(ours - theirs) <= tolerance * largest(theirs)


@pytest.mark.parametrize(
    ("size", "examples", "options"),
    [
        (2, ["8 76", "5 1 3", "a dog"], {"completions": 2}),  # which write, too
        pytest.param(2, GIVEN, {"text_weight": 0.1}, marks=pytest.mark.slow),
        pytest.param(3, GIVEN, BLOCKWISE, marks=pytest.mark.slow),
        pytest.param(3, GIVEN[:2], {"estimator": "affine"}, marks=pytest.mark.slow),  # the third has nothing
    ],
)
def test_they_make_the_patch_of_one(size: int, examples: list[Any], options: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"dtype": torch.float64, "examples": examples, **options}
    assert together(size, tmp_path / "last", **arguments) == [0] * size
    wanted = made(**arguments)
    patches = [tk.ThoughtPatch.from_pretrained(tmp_path / "last" / f"patch {rank}") for rank in range(size)]
    for patch in patches:
        near(patch, wanted, SOLVED)
        near(patch, patches[0], 0)
        for name in ("examples", "written_inputs", "generated_completions"):
            assert patch.provenance[name] == wanted.provenance[name]


@pytest.mark.slow
def test_where_one_is_killed_the_others_say_so_and_all_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    arguments = {"dtype": torch.float64, "examples": GIVEN, "checkpoint": tmp_path / "kept"}
    begun = time.monotonic()
    codes = together(2, tmp_path / "first", died=2, **arguments)
    assert codes == [0, -signal.SIGKILL] and time.monotonic() - begun < SECONDS
    told = (tmp_path / "first" / "error 0").read_text()
    assert told.startswith("RuntimeError: transmute: all 2 processes must go on, got a lost one, as process 0 sees it")
    kept = [[path.name for path in (tmp_path / "kept" / f"process-{rank}").glob("blocks-*")] for rank in (0, 1)]
    assert "blocks-2" in kept[0] and "blocks-2" in kept[1]
    assert together(2, tmp_path / "last", **arguments) == [0, 0]
    patches = [tk.ThoughtPatch.from_pretrained(tmp_path / "last" / f"patch {rank}") for rank in (0, 1)]
    near(patches[0], made(torch.float64, GIVEN), SOLVED)
    near(patches[0], patches[1], 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--divide-model"]])
def test_the_example_runs_under_torchrun(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(EXAMPLE)]
    run = subprocess.run(
        [*command, *options, "--output", str(tmp_path / "patch")], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert tk.ThoughtPatch.from_pretrained(tmp_path / "patch").provenance["examples"] == 32
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]


def test_items_are_dealt_out_and_come_back_in_order() -> None:
    assert ALONE.share([3, 1, 2]) == ALONE.gathered([3, 1, 2]) == [3, 1, 2] and ALONE.everyone(5) == [5]
    dealt = []
    for rank in range(3):
        one = Processes()
        one.rank, one.size = rank, 3
        dealt.append(one.share(list(range(7))))
    assert dealt == [[0, 3, 6], [1, 4], [2, 5]]
    one.everyone = lambda _: dealt  # type: ignore[method-assign]
    assert one.gathered([]) == list(range(7))


@pytest.mark.parametrize("group", [True, None, "all"])  # None is what group.WORLD is before there is one
def test_a_group_that_is_none_is_refused(group: Any) -> None:
    with pytest.raises(
        ValueError, match="^transmute: distributed must be False, or True .* got .*; call torch.distributed.init_pro"
    ):
        made(torch.float32, GIVEN, distributed=group)
