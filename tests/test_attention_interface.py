"""The kernels inside Hugging Face models: against plain forwards over whole prompts, and what is refused."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tolerances import FORWARD
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.models import attention_interface

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip


def build(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "gemma3":
        return tiny_gemma3(3)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)).eval().requires_grad_(False)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)


KINDS = ("gemma3", "llama", "mistral")


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(6, 60, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_forward_with_padding(kind: str) -> None:
    model, ids = build(kind), token_ids(3, 11)
    mask = (torch.arange(11) < torch.tensor([11, 4, 7])[:, None]).long()
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(attention_interface.register())
    actual = model(ids, attention_mask=mask).logits
    for row, length in enumerate((11, 4, 7)):
        assert relative_error(actual[row, :length], expected[row, :length]) <= FORWARD


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_prefixes_of_their_own(kind: str) -> None:
    """Rows behind a long prefix, a short one and none, ragged, equal one forward over each whole prompt."""
    model, ids = build(kind), token_ids(3, 7)
    prefixes = [token_ids(9, seed=1), token_ids(3, seed=2)]
    lengths = (7, 5, 6)
    expected = [
        model(torch.cat([prefix, row[:length]])[None]).logits[0, len(prefix) :]
        for prefix, row, length in zip([*prefixes, token_ids(0)], ids, lengths, strict=True)
    ]
    model.set_attn_implementation(attention_interface.register())
    shared = [attention_interface.collect_prefix(model, prefix) for prefix in prefixes]
    actual = model(
        ids,
        attention_mask=(torch.arange(7) < torch.tensor(lengths)[:, None]).long(),
        position_ids=torch.tensor([9, 3, 0])[:, None] + torch.arange(7),
        shared_prefixes=shared,
        prefix_index=torch.tensor([0, 1, -1]),
        use_cache=False,
    ).logits
    for got, wanted in zip(actual, expected, strict=True):
        assert relative_error(got[: len(wanted)], wanted) <= FORWARD


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_prefixes(kind: str) -> None:
    """The stream is that of the with-context prompt; layer 0's outputs are those of two whole forwards."""
    model, ids, prefix, header = build(kind), token_ids(1, 8), token_ids(5, seed=1), token_ids(2, seed=2)
    context = torch.cat([header, prefix])
    outputs: dict[str, Tensor] = {}

    def record(name: str, *parts: Tensor) -> Tensor:
        projection = model.model.layers[0].self_attn.o_proj
        handle = projection.register_forward_pre_hook(lambda _, args: outputs.update({name: args[0][0, -8:]}))
        logits = model(torch.cat([*parts, ids[0]])[None]).logits[0, -8:]
        handle.remove()
        return logits

    expected = record("with", context)
    record("without", header)
    model.set_attn_implementation(attention_interface.register())
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    logits = model(
        ids,
        position_ids=7 + torch.arange(8)[None],
        with_prefix=attention_interface.collect_prefix(model, context),
        without_prefix=attention_interface.collect_prefix(model, header, position_ids=torch.tensor([[5, 6]])),
        observe=lambda layer, without, delta: seen.update({layer: (without, delta)}),
        use_cache=False,
    ).logits
    assert relative_error(logits[0], expected) <= FORWARD
    assert sorted(seen) == [0, 1, 2]
    without, delta = (side[0].transpose(0, 1).flatten(1) for side in seen[0])
    assert relative_error(without, outputs["without"]) <= FORWARD
    assert relative_error(delta, outputs["with"] - outputs["without"]) <= FORWARD
    assert (outputs["with"] - outputs["without"]).abs().max() > 0.01


def example() -> Any:
    path = ROOT / "examples" / "context_aware_decoding.py"
    spec = importlib.util.spec_from_file_location("context_aware_decoding", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_context_aware_decoding_equals_two_forwards() -> None:
    module = example()
    plain = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval().requires_grad_(False)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval().requires_grad_(False)
    header, document, ids = token_ids(4, seed=1), token_ids(70, seed=2), token_ids(12)  # longer than the window of 64
    contrast = module.Contrast(model, header, document)
    forwards = []
    hook = model.base_model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    both = contrast.logits(ids)
    hook.remove()
    assert len(forwards) == 1
    expected = [plain(torch.cat(parts)[None]).logits[0, -12:] for parts in ((header, document, ids), (header, ids))]
    for actual, wanted in zip(both, expected, strict=True):
        assert relative_error(actual, wanted) <= FORWARD
    assert relative_error(expected[0], expected[1]) > 0.01

    def scores(new: list[int]) -> Tensor:
        together, alone = (
            plain(torch.cat([*parts, ids, torch.tensor(new, dtype=torch.long)])[None]).logits[0, -1].log_softmax(-1)
            for parts in ((header, document), (header,))
        )
        return 1.5 * together - 0.5 * alone

    new: list[int] = []
    for _ in range(5):
        new.append(int(scores(new).argmax()))
    assert contrast.decode(ids, 0.5, set(), max_new_tokens=5) == new
    shares = contrast.shares(ids)
    assert len(shares) == 6 and all(0 < share < 2.5 for share in shares)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["context_aware_decoding.py"])
    example().main()
    out = capsys.readouterr().out
    assert "alpha = 0: '9 1 4'" in out and "alpha = 0.5: '9 + 1 + 4 = 14'" in out


def test_a_prefix_needs_the_attention_function() -> None:
    with pytest.raises(ValueError, match=r"collect_prefix: model must call .* got 0 such layers in LlamaForCausalLM"):
        attention_interface.collect_prefix(build("llama"), token_ids(3))
    with pytest.raises(ValueError, match=r"collect_prefix: input_ids must have shape \[P\] with P ≥ 1, got \[1, 3\]"):
        attention_interface.collect_prefix(build("llama"), token_ids(1, 3))


def prepared(kind: str = "llama") -> Any:
    model = build(kind)
    model.set_attn_implementation(attention_interface.register())
    return model


def test_what_would_be_silently_wrong_is_refused() -> None:
    model, ids = prepared(), token_ids(1, 6)
    prefix = attention_interface.collect_prefix(model, token_ids(3))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("attention_mask must be zero on the right only", {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}),
        ("attention_mask must have shape", {"attention_mask": torch.ones(1, 1, 6, 6)}),
        ("prefix_index must say which prefix", {"shared_prefixes": [prefix]}),
        ("with_prefix must be None where", {"with_prefix": prefix, "prefix_index": torch.tensor([0])}),
        ("must attend causally", {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}),  # packed
        ("model must not pass .* got s_aux", {"s_aux": torch.zeros(4)}),
    ]
    for sentence, options in cases:
        with pytest.raises(ValueError, match=sentence):
            model(ids, **options)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="cache must be empty where prefixes are given, got 6 keys"):
        model(ids[:, :1], past_key_values=cache, with_prefix=prefix)
    with pytest.raises(ValueError, match="attention_mask must be all ones where keys are cached, got padding"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 1]]))
    with pytest.raises(ValueError, match="cache must end with the last of 6 tokens, got room for 20"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=20))
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="query must not require a gradient"):
        model(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_reads_its_cache(kind: str) -> None:
    """Windows of 5 and 6 fill on the way, and steps of several tokens read the cache too."""
    model, ids = build(kind), token_ids(2, 7)
    options = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, whole = model.generate(ids, **options), model(ids).logits
    model.set_attn_implementation(attention_interface.register())
    actual = model.generate(ids, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for got, wanted in zip(actual.logits, expected.logits, strict=True):
        assert relative_error(got, wanted) <= FORWARD
    cache = model(ids[:, :3]).past_key_values
    assert relative_error(model(ids[:, 3:], past_key_values=cache).logits, whole[:, 3:]) <= FORWARD


def test_a_model_that_has_it_is_fitted_as_any_other() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_gemma3(5, vocab_size=len(tokenizer))
    options: dict[str, Any] = {"examples": ["8 76", "abc d", {"prompt": "9", "completion": "1"}], "max_new_tokens": 4}
    expected = tk.transmute(model, tokenizer, "Sum now", **options)
    name = attention_interface.register()
    model.set_attn_implementation(name)
    patch = tk.transmute(model, tokenizer, "Sum now", **options)
    assert model.config._attn_implementation == name
    for key, entry in patch.entries.items():
        assert torch.equal(entry.dense(), expected.entries[key].dense())


def test_dropout_and_other_masks_are_refused() -> None:
    module, rows = torch.nn.Module(), torch.zeros(1, 1, 2, 4)
    module.layer_idx = 0
    with pytest.raises(ValueError, match="dropout must be 0, got 0.1"):
        attention_interface.attend(module, rows, rows, rows, None, dropout=0.1)
    module.is_causal = False
    with pytest.raises(ValueError, match="module must be causal"):
        attention_interface.attend(module, rows, rows, rows, None)
    chunked = lambda b, h, i, j: (j <= i) & (i // 2 == j // 2)  # noqa: E731
    with pytest.raises(ValueError, match="must attend causally"):
        attention_interface.padding_mask(batch_size=1, q_length=4, kv_length=4, mask_function=chunked, local_size=2)


def test_importing_the_module_does_not_import_transformers() -> None:
    source = inspect.getsource(attention_interface)
    assert "\nfrom transformers" not in source and "\nimport transformers" not in source
