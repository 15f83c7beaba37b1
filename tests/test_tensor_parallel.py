"""Models whose weights are divided among processes, by transformers on CPUs with gloo: all is as with one process."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import randomised, tiny_gemma3, tiny_tokenizer
from tolerances import SOLVED, largest
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.distributed import DistributedConfig

import thought_kernels as tk
from thought_kernels.generation.continuations import continue_prompts
from thought_kernels.patches.mixed import MixedPatches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="transformers would divide the model among devices"),
]

GIVEN = [
    {"prompt": "8 7", "completion": "8 + 7"}, {"prompt": "abc", "completion": "c"},
    {"prompt": "12 4 9", "completion": "12, 4, 9"}, {"prompt": "a dog", "completion": "a dog."},
]  # fmt: skip
FITS: dict[str, dict[str, Any]] = {
    "default": {"examples": GIVEN},
    "layerwise": {"examples": GIVEN, "pairing": "layerwise", "header_weight": 0.2, "text_weight": 0.1},
    "written": {"examples": ["8 76", "5 1 3"], "completions": 2, "written_inputs": 4, "max_new_tokens": 4},
    "vectors": {"examples": GIVEN, "sites": ("attention", "mlp", "down"), "estimator": "affine"},
}
IDS = torch.arange(5, 21)[None]
SECONDS = 40
EXACT = 1e-9


def tiny(family: str, dtype: torch.dtype = torch.float64) -> Any:
    vocabulary = len(tiny_tokenizer())
    if family == "gemma":
        return tiny_gemma3(3, dtype, vocab_size=vocabulary, max_position_embeddings=2048)
    # Of four processes the last has less than the others of the MLP's width.
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 40, "intermediate_size": 54, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    }  # fmt: skip
    if family == "qwen":
        return randomised(Qwen2ForCausalLM(Qwen2Config(**sizes)), 4, dtype)
    if family == "olmo":  # whose o_proj is given all heads, and cuts them itself
        return randomised(Olmo2ForCausalLM(Olmo2Config(**sizes, eos_token_id=1)), 4, dtype)
    # Biases everywhere: those of o_proj and down_proj count once, and vectors have a place.
    return randomised(LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)), 4, dtype)


def fit(model: Any, **options: Any) -> tk.ThoughtPatch:
    return tk.transmute(model, tiny_tokenizer(), "Sum", **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def gradient(model: Any) -> torch.Tensor:
    """Of the logits' squares by the embeddings."""
    with torch.no_grad():
        x = model.get_input_embeddings()(IDS)
    x.requires_grad_()
    model(inputs_embeds=x).logits.square().sum().backward()
    return x.grad


Work = Callable[[Any, Path], Any]


def _process(rank: int, size: int, folder: Path, work: Work, arguments: dict[str, Any]) -> None:
    """One of them: saves what the work makes of its divided model, or what it raised."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", distributed_config=DistributedConfig(tp_plan="auto"), dtype="auto"
        )
        assert sum(hasattr(weight, "device_mesh") for weight in model.parameters()) > 0
        torch.save(work(model.eval().requires_grad_(False), folder, **arguments), folder / f"result {rank}")
    except (RuntimeError, ValueError) as error:
        (folder / f"error {rank}").write_text(f"{type(error).__name__}: {error}")
    finally:
        dist.destroy_process_group()


def divided(size: int, folder: Path, model: Any, work: Work, **arguments: Any) -> list[Any]:
    """What so many processes made, by rank; an error's sentence where there was one."""
    model.save_pretrained(folder / "model")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_process, args=(rank, size, folder, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(6 * SECONDS)
    results = []
    for rank in range(size):
        told = folder / f"error {rank}"
        results.append(told.read_text() if told.exists() else torch.load(folder / f"result {rank}", weights_only=False))
    return results


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert largest(found - wanted) <= tolerance * largest(wanted)


def near_patches(found: tk.ThoughtPatch, wanted: tk.ThoughtPatch, tolerance: float) -> None:
    assert found.entries.keys() == wanted.entries.keys()
    for key in wanted.entries:
        for ours, theirs in ((found.matrix(*key), wanted.matrix(*key)), (found.vector(*key), wanted.vector(*key))):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                near(ours, theirs, tolerance)


def _fitted(model: Any, folder: Path, names: list[str]) -> dict[str, tk.ThoughtPatch]:
    return {name: fit(model, **FITS[name]) for name in names}


@pytest.mark.parametrize(("family", "size"), [("gemma", 2), ("llama", 4), ("qwen", 2), ("olmo", 2)])
def test_they_make_the_patch_of_one(family: str, size: int, tmp_path: Path) -> None:
    model = tiny(family)
    found = divided(size, tmp_path, model, _fitted, names=list(FITS))
    for name, options in FITS.items():
        wanted = fit(model, **options)
        for patches in found:
            assert isinstance(patches, dict), patches
            near_patches(patches[name], wanted, SOLVED)
            for told in ("written_inputs", "generated_completions", "base"):
                assert patches[name].provenance[told] == wanted.provenance[told]


def _used(model: Any, folder: Path) -> dict[str, Any]:
    patch = tk.ThoughtPatch.from_pretrained(folder / "patch", model=model, tokenizer=tiny_tokenizer())
    result: dict[str, Any] = {"bare": logits(model)}
    with patch.applied(model):
        result["applied"] = logits(model)
        result["written"] = continue_prompts(
            model, [[2, 9, 30], [2, 40]], lambda _: False, max_new_tokens=5, batch_size=2, seeds=[None, 3]
        )
        result["gradient"] = gradient(model)
        result["on top"] = fit(model, examples=GIVEN[:2])
    with patch.truncate(3).applied(model):
        result["truncated"] = logits(model)
    with MixedPatches(model, {"a": patch.truncate(3), "b": 2 * patch}) as mixed:
        mixed.choose(["b"])
        result["mixed"] = logits(model)
    result["replay"] = tk.replay(model, IDS[0], (3, 7)).logit_error
    diagnosis = tk.spectral.diagnose(patch, model)
    result["diagnosed"] = {key: site.strength for key, site in diagnosis.sites.items()}
    merged = patch.merge_(model, fold=True)
    result["merged"] = logits(model)
    result["weights"] = {
        name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).clone()
        for name, weight in model.named_parameters()
    }
    model.save_pretrained(folder / "merged")
    merged.undo()
    result["undone"] = logits(model)
    return result


@pytest.mark.parametrize(("family", "size", "dtype"), [
    ("gemma", 2, torch.float64), ("llama", 4, torch.float64), ("llama", 2, torch.bfloat16),
])  # fmt: skip
def test_a_patch_acts_and_is_merged_as_in_one(family: str, size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(family, dtype)
    sites = ("attention", "mlp", "down")
    patch = fit(model, examples=GIVEN, sites=sites, estimator="affine" if family == "llama" else "ridge")
    patch.save_pretrained(tmp_path / "patch")
    found = divided(size, tmp_path, model, _used)
    (tmp_path / "one").mkdir()
    patch.save_pretrained(tmp_path / "one" / "patch")
    wanted = _used(model, tmp_path / "one")
    # transformers computes Gemma's norms in float32 even here: sums in another order move their roundings.
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5 if family == "gemma" else EXACT
    for result in found:
        assert isinstance(result, dict), result
        for name in ("bare", "applied", "gradient", "truncated", "mixed", "merged", "undone"):
            near(result[name], wanted[name], tolerance)
        assert largest(wanted["applied"] - wanted["bare"]) > 5 * tolerance * largest(wanted["bare"])
        assert torch.equal(result["undone"], result["bare"])
        if dtype == torch.float64:
            near_patches(result["on top"], wanted["on top"], SOLVED)
            assert result["written"] == wanted["written"]
            assert result["replay"] < EXACT
            assert result["diagnosed"] == pytest.approx(wanted["diagnosed"], rel=EXACT)
        for name, weight in wanted["weights"].items():
            assert torch.equal(result["weights"][name], weight), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    near(logits(saved), wanted["merged"], tolerance)


def _refused(model: Any, folder: Path) -> list[str]:
    patch, tokenizer, told = tk.ThoughtPatch.from_pretrained(folder / "patch"), tiny_tokenizer(), []
    calls: list[Callable[[], Any]] = [
        lambda: fit(model, examples=GIVEN, distributed=True),
        lambda: fit(model, examples=GIVEN[: 2 + dist.get_rank()]),
        lambda: tk.evaluate(model, tokenizer, patch, held_out=["1 2", "3 4"]),
        lambda: patch.export_peft(folder / "adapter", model),
        lambda: patch.export_merged(folder / "checkpoint", model, tokenizer),
    ]
    for call in calls:
        try:
            told.append(str(call()))
        except ValueError as error:
            told.append(str(error))
    return told


def test_what_cannot_be_done_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = tiny("llama")
    fit(model, examples=GIVEN).save_pretrained(tmp_path / "patch")
    for told in divided(2, tmp_path, model, _refused):
        assert told[0].startswith("transmute: distributed must be False where tensor parallelism has divided the model")
        assert told[1].startswith("transmute: inputs and options must be the same in all processes")
        for sentence, function in zip(told[2:], ("evaluate", "export_peft", "export_merged"), strict=True):
            assert sentence.startswith(f"{function}: model must have whole weights in each process, got model.embed_t")
            assert "load it without tp_plan" in sentence


def _fits_with_a_checkpoint(model: Any, folder: Path, dies: int | None) -> tk.ThoughtPatch:
    from thought_kernels.fitting import checkpoint

    checkpoint.EVERY, checkpoint._SHARE = 0.0, 0
    keep, count = checkpoint.Checkpoint.keep, 0

    def kept(*args: Any) -> None:
        nonlocal count
        keep(*args)
        count += 1
        if count == dies and dist.get_rank() == 1:
            os._exit(1)

    checkpoint.Checkpoint.keep = kept  # type: ignore[method-assign]
    return fit(model, examples=GIVEN, checkpoint=folder.parent / "kept")


def test_where_one_is_lost_the_other_says_so_and_both_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    model, begun = tiny("gemma"), time.monotonic()
    for name in ("first", "last"):
        (tmp_path / name).mkdir()
    model.save_pretrained(tmp_path / "first" / "model")
    with pytest.raises(FileNotFoundError):  # of the process that is gone
        divided(2, tmp_path / "first", model, _fits_with_a_checkpoint, dies=1)
    told = (tmp_path / "first" / "error 0").read_text()
    assert told.startswith("RuntimeError: transmute: all 2 processes must go on, got a lost one, as process 0 sees it")
    assert told.count("got a lost one") == 1 and time.monotonic() - begun < 3 * SECONDS
    assert (tmp_path / "kept" / "process-0" / "blocks-1").is_dir()
    wanted = fit(model, examples=GIVEN)
    for patch in divided(2, tmp_path / "last", model, _fits_with_a_checkpoint, dies=None):
        near_patches(patch, wanted, SOLVED)
