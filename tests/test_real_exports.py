"""Exports of a patch of a real pretrained model, tried with what reads them: peft, transformers, llama.cpp.

SmolLM2 135M Instruct is fetched once into a cache (benchmarks/real/pretrained.py); where it cannot be had, these tests
are skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import thought_kernels as tk
from thought_kernels.evaluation.measures.export_loss import export_loss
from thought_kernels.generation.completions import complete, ending_of
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.examples import load_examples

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))

import llama_runner
import pretrained
import tasks

pytestmark = pytest.mark.real
Model = tuple[Any, Any]
NAME = "smollm2-135m-instruct"
INSTRUCTION = "Answer in French."


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return pretrained.gguf(NAME)
    except pretrained.NotAvailable as error:
        pytest.skip(f"{NAME} cannot be had here: {error}")


@pytest.fixture(scope="module")
def smol(file: Path) -> Model:
    return tk.load(pretrained.folder(NAME))  # the file's own weights, unpacked


@pytest.fixture(scope="module")
def french(smol: Model) -> ThoughtPatch:
    questions = [question for question, _ in tasks.task("french", seed=0).inputs[:8]]
    return tk.transmute(*smol, INSTRUCTION, questions, max_new_tokens=16, written_inputs=0, completions=1)


@pytest.fixture(scope="module")
def prompts(smol: Model) -> list[list[int]]:
    held_out = [question for question, _ in tasks.task("french", seed=0).held_out[:4]]
    chats = [[{"role": "user", "content": question}] for question in held_out]
    return [smol[1].apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


@torch.no_grad()
def logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    """What each prompt's last token predicts."""
    return [model(torch.tensor([ids])).logits[0, -1].double() for ids in prompts]


def furthest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def patched(smol: Model, french: ThoughtPatch, prompts: list[list[int]]) -> list[torch.Tensor]:
    with french.applied(smol[0]):
        return logits(smol[0], prompts)


def test_the_model_is_known_again(smol: Model, french: ThoughtPatch) -> None:
    assert french.check(*smol, mismatch="refuse") == []


def test_peft_and_a_checkpoint_reach_the_applied_patch_s_logits(
    smol: Model, french: ThoughtPatch, prompts: list[list[int]], patched: list[torch.Tensor], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = smol[0]
    assert furthest(logits(model, prompts), patched) > 0.5
    written = french.export_peft(tmp_path / "lora", model)
    assert not written.lossy
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    assert furthest(logits(wrapped, prompts), patched) < 1e-3
    wrapped.unload()
    french.export_merged(tmp_path / "merged", model, smol[1], max_shard_size="200MB")
    merged, _ = tk.load(tmp_path / "merged")
    assert furthest(logits(merged, prompts), patched) < 1e-3


def test_a_low_rank_keeps_most_of_the_effect(smol: Model, french: ThoughtPatch, tmp_path: Path) -> None:
    questions = [question for question, _ in tasks.task("french", seed=0).held_out[:4]]
    kept = {}
    for rank in (16, 64):
        written = french.export_peft(tmp_path, smol[0], rank=rank)
        exported = ThoughtPatch(written.entries, french.provenance)
        kept[rank] = export_loss(*smol, french, exported, questions, max_new_tokens=16).recovered
    assert 0.8 < kept[16] < kept[64] + 0.02 and kept[64] > 0.9, kept


def alike(answer: list[int], other: list[int]) -> float:
    """Share of the leading tokens that two answers have in common."""
    pairs = list(zip(answer, other, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs)) / max(len(answer), len(other))


@pytest.mark.skipif(not llama_runner.available(), reason="runs llama.cpp; pip install xllamacpp")
def test_llama_cpp_follows_the_adapter_on_the_same_file(
    file: Path, smol: Model, french: ThoughtPatch, prompts: list[list[int]], patched: list[torch.Tensor], tmp_path: Path
) -> None:
    written = french.export_gguf_lora(tmp_path / "adapter.gguf", smol[0])
    with llama_runner.LlamaCpp(file) as served:
        bare = [served.logits(ids, 1)[0].double() for ids in prompts]
    with llama_runner.LlamaCpp(file, lora=written.file) as served:
        found = [served.logits(ids, 1)[0].double() for ids in prompts]
        answers = [served.answer(ids, 8, {smol[1].eos_token_id}) for ids in prompts]
    ending = ending_of(*smol, load_examples(["Hi"])[0])
    with french.applied(smol[0]):
        ours = complete(smol[0], prompts, ending=ending, max_new_tokens=8, batch_size=4)
    without = complete(smol[0], prompts, ending=ending, max_new_tokens=8, batch_size=4)
    # Roundings may turn a token, after which the answers go apart: of four, so much as one whole answer must agree.
    agreed = sum(alike(a, b) for a, b in zip(answers, ours, strict=True))
    assert agreed > 1 + sum(alike(a, b) for a, b in zip(without, ours, strict=True)), (answers, ours)

    def divergence(wanted: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
        pairs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(wanted, actual, strict=True)]
        return sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / len(pairs)

    effect, noise = divergence(patched, logits(smol[0], prompts)), divergence(logits(smol[0], prompts), bare)
    # What the two engines make of the bare model differs by llama.cpp's rounding of activations to 8 bits.
    assert divergence(patched, found) < max(3 * noise, 0.02 * effect) < 0.1 * effect, (effect, noise)
