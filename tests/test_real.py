"""The package on real pretrained models: Gemma 3 270M (base) and SmolLM2 135M Instruct, a few minutes on two cores.

They are fetched once into a cache (benchmarks/real/pretrained.py); where they cannot be had, these tests are skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import thought_kernels as tk
from thought_kernels.models.load import load
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import encode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))

import pretrained
import tasks
from measure import Measurement

pytestmark = pytest.mark.real
Model = tuple[Any, Any]
INSTRUCTION = "Answer in French."
RECIPE = {"written_inputs": 0, "completions": 1}  # what the model writes beside takes long and tells no more here


def had(fetch: Any, name: str) -> Path:
    try:
        return fetch(name)
    except pretrained.NotAvailable as error:
        pytest.skip(f"{name} cannot be had here: {error}")


@pytest.fixture(scope="module")
def gemma() -> Model:
    return load(had(pretrained.folder, "gemma-3-270m"))


@pytest.fixture(scope="module")
def smol() -> Model:
    return load(had(pretrained.folder, "smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def french(smol: Model) -> ThoughtPatch:
    """A patch of few examples, with answers that end early: what it is worth is measured elsewhere."""
    questions = [question for question, _ in tasks.task("french", seed=0).inputs[:8]]
    return tk.transmute(*smol, INSTRUCTION, questions, max_new_tokens=16, **RECIPE)


def asked(model: Model, question: str = "Where do penguins live?") -> torch.Tensor:
    chat = [{"role": "user", "content": question}]
    return model[1].apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    return model[0](asked(model)).logits


@pytest.mark.parametrize("name", ["antonym", "lower-upper"])
def test_demonstrations_become_a_patch(gemma: Model, name: str) -> None:
    # Measured 0.95 and more recovered over seeds (docs/real_models.md); an accuracy of 32 words scatters by 0.08.
    row = Measurement(*gemma, tasks.task(name, seed=0)).patched(32, RECIPE)
    assert row["prompted"] > row["bare"] + 0.3, row
    assert row["patched"] >= row["prompted"] - 0.17, row
    assert row["recovered"] > 0.85, row


def test_an_instruction_in_words_becomes_a_patch(smol: Model) -> None:
    row = Measurement(*smol, tasks.task("french", seed=0)).patched(32, RECIPE)
    assert row["recovered"] > 0.85, row


def test_a_base_model_takes_a_format_and_writes_its_own_completions(gemma: Model) -> None:
    model, tokenizer = gemma
    form = "{prompt} -> {completion}\n"
    of = tasks.task("singular-plural", seed=0)
    shown, words, others = of.instruction, of.inputs[:16], of.held_out[:16]
    patch = tk.transmute(model, tokenizer, shown, [word for word, _ in words], format=form, max_new_tokens=8, **RECIPE)
    written = [encode(tokenizer, shown, word, format=form) for word, _ in others]

    def right() -> int:
        found = 0
        for row, (_, answer) in zip(written, others, strict=True):
            ids = torch.tensor([[*row.header, *row.replaced, *row.tokens]])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
            found += tokenizer.decode(out[0, ids.shape[1] :]).strip().partition("\n")[0].strip() == answer
        return found

    bare = right()
    with patch.applied(model):
        assert right() >= max(10, bare + 5)
    assert right() == bare


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_per_token_patches_replace_the_instruction(name: str, dtype: torch.dtype) -> None:
    model, tokenizer = load(had(pretrained.folder, name), dtype=str(dtype).removeprefix("torch."))
    if name.startswith("gemma"):
        of = tasks.task("country-capital", seed=0)
        row = encode(tokenizer, of.instruction, of.held_out[0][0], format=tasks.WORD_FORMAT)
    else:
        row = encode(tokenizer, INSTRUCTION, "Where do penguins live?")
    ids = torch.tensor([*row.header, *row.instruction, *row.tokens])
    report = tk.replay(model, ids, (len(row.header), len(row.header) + len(row.instruction)))
    # Activations of 1e3 and more beside others of 1: some thousand roundings' worth in 18 and 30 blocks.
    rounding = 1e4 * torch.finfo(dtype).eps
    assert report.logit_error < rounding, report
    assert report.block_error.max() < rounding, report
    assert report.control_error > 0.05, report


def test_a_merged_patch_is_the_applied_one_and_undone_bit_for_bit(smol: Model, french: ThoughtPatch) -> None:
    model, _ = smol
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    bare = logits(smol)
    with french.applied(model):
        applied = logits(smol)
    with french.merge_(model):
        merged = logits(smol)
    change = (applied - bare).abs().max()
    assert change > 1
    assert (merged - applied).abs().max() < 1e-3 * change
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(logits(smol), bare)


def test_a_saved_patch_speaks_french_when_loaded(smol: Model, french: ThoughtPatch, tmp_path: Path) -> None:
    model, tokenizer = smol
    french.save_pretrained(tmp_path)
    loaded = ThoughtPatch.from_pretrained(tmp_path)
    with french.applied(model):
        expected = logits(smol)
    ids = asked(smol)
    with loaded.applied(model):
        assert torch.equal(logits(smol), expected)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    words = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).lower().split()
    assert {"les", "la", "le", "des", "sont", "dans", "de"} & set(words), words


def test_a_gguf_file_is_a_model_like_any_other(smol: Model, french: ThoughtPatch, tmp_path: Path) -> None:
    model, tokenizer = load(had(pretrained.gguf, "smollm2-135m-instruct"))
    assert torch.equal(logits((model, tokenizer)), logits(smol))
    french.merge_(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with french.applied(smol[0]):
        applied = logits(smol)
    reopened = load(tmp_path)
    assert (logits(reopened) - applied).abs().max() < 1e-3 * (applied - logits(smol)).abs().max()
