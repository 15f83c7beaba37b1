"""A patch in a checkpoint: AutoModel reads it, and the model then does what the applied patch does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_multimodal_gemma3, tiny_tokenizer
from patches import MATRICES, random_patch, same_bits, token_ids, weights
from test_load import byte_tokenizer, tiny_llama, write_gguf
from tolerances import largest
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import thought_kernels as tk
from thought_kernels.patches.export_merged import PROVENANCE_FILE
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch


def matrix_patch(**options: Any) -> ThoughtPatch:
    return random_patch(**{"sites": MATRICES, "vectors": False, **options})


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double()


def applied_logits(patch: ThoughtPatch, model: Any, ids: Tensor) -> Tensor:
    with patch.applied(model):
        return logits(model, ids)


# Relative to the largest logit. W (1 + Δ) is rounded once, to the weights' dtype, where the applied patch is not.
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_a_checkpoint_does_what_the_applied_patch_does(dtype: torch.dtype, allowed: float, tmp_path: Path) -> None:
    model, ids = tiny_gemma3(dtype=dtype), token_ids()
    before = weights(model)
    patch = matrix_patch(provenance={"instruction": "Füge sie zusammen"})
    written = patch.export_merged(tmp_path / "deep" / "m", model, tiny_tokenizer(), max_shard_size="20KB")
    assert same_bits(model, before) and written.shards > 1 and not written.lossy
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "m").eval()
    expected = applied_logits(patch, model, ids)
    assert found.dtype == dtype
    assert largest(logits(found, ids) - expected) <= allowed * largest(expected)
    assert largest(logits(model, ids) - expected) > allowed * largest(expected)  # the patch does more than that
    told = json.loads((written.folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    assert told["instruction"] == "Füge sie zusammen"
    assert AutoTokenizer.from_pretrained(written.folder)("3 4").input_ids == tiny_tokenizer()("3 4").input_ids
    with patch.merge_(model):
        assert same_bits(found, weights(model))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m"]


def test_a_gguf_file_becomes_a_checkpoint(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    model, tokenizer = tk.load(tmp_path / "tiny.gguf")
    patch = matrix_patch(layers=(0, 1), hidden=32, attention=32, sites=("attention", "mlp"))
    patch.export_merged(tmp_path / "m", model, tokenizer)
    found, again = tk.load(tmp_path / "m")
    ids = token_ids()
    expected = applied_logits(patch, model, ids)
    assert largest(logits(found, ids) - expected) <= 1e-4 * largest(expected)
    assert again("some text").input_ids == byte_tokenizer()("some text").input_ids
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_the_multimodal_model_is_saved_whole(tmp_path: Path) -> None:
    model, patch = tiny_multimodal_gemma3(), matrix_patch()
    patch.export_merged(tmp_path / "m", model)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "m").eval()
    with patch.merge_(model):
        assert same_bits(found, weights(model))


def test_vectors_are_refused_folded_or_left_out(tmp_path: Path) -> None:
    model, ids = tiny_gemma3(), token_ids()
    patch = random_patch(vectors=True)
    for options, refused in (({}, "patch must have no"), ({"fold": True}, "patch must have no residual vector")):
        with pytest.raises(ValueError, match=rf"^export_merged: {refused}.* give drop=True \(--drop\)"):
            patch.export_merged(tmp_path / "m", model, **options)
    assert not list(tmp_path.iterdir())
    dropped = patch.export_merged(tmp_path / "m", model, drop=True)
    assert set(dropped.dropped) == set(patch.entries) and dropped.lossy
    matrices = {key: SitePatch(entry.matrix) for key, entry in patch.entries.items() if key[1] != "residual"}
    expected = applied_logits(ThoughtPatch(matrices), model, ids)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert largest(logits(found, ids) - expected) <= 1e-4 * largest(expected)
    folded = patch.export_merged(tmp_path / "folded", model, fold=True, drop=True)
    assert len(folded.fold_residuals) == 6 and len(folded.dropped) == 2


def test_a_folder_with_files_is_refused_and_an_empty_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path / "m")
    matrix_patch(provenance={"model": str(tmp_path / "gemma")}).export_merged(".", tiny_gemma3())
    assert json.loads((tmp_path / "m" / PROVENANCE_FILE).read_text())["model"] == "gemma"
    with pytest.raises(ValueError, match="export_merged: directory must be empty or not there, got .*m, which holds"):
        matrix_patch().export_merged(tmp_path / "m", tiny_gemma3())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="export_merged: directory must be a folder, got the file"):
        matrix_patch().export_merged(tmp_path / "file", tiny_gemma3())


def test_a_failure_leaves_no_files_and_the_weights_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gemma3()
    before = weights(model)

    def full(folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "model-00001-of-00002.safetensors").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        matrix_patch().export_merged(tmp_path / "m", model)
    assert same_bits(model, before) and not list(tmp_path.iterdir())


def test_models_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    model = tiny_gemma3()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="export_merged: model must have plain floating weights, got a quantised one"):
        matrix_patch().export_merged(tmp_path / "m", model)
    adapted = tiny_gemma3()
    matrix_patch(rank=2).export_peft(tmp_path / "lora", adapted)
    adapted.load_adapter(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="export_merged: model must be without adapters"):
        matrix_patch().export_merged(tmp_path / "m", adapted)
    assert not (tmp_path / "m").exists()
