"""Patches beside quantised weights: fitted, applied, saved and exported as on the model of the unpacked weights.

The minimal quantised modules here run everywhere; torchao's and bitsandbytes' where they are installed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from families import tiny
from models import tiny_gemma3, tiny_tokenizer
from patches import MATRICES, fitting_patch, hooks, random_patch, token_ids
from safetensors.torch import load_file
from tolerances import FLOORS, FORWARD, SOLVED, largest
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.evaluation.rivals.function_vector import _written_by
from thought_kernels.fitting.checkpoint import run_key
from thought_kernels.models import describe
from thought_kernels.models.linear import bias_of
from thought_kernels.models.quantised import called_weight, dequantised, weight_of
from thought_kernels.patches.export_peft import WEIGHT_FILE
from thought_kernels.patches.identity import differences, identity
from thought_kernels.spectral import diagnose

CPU = torch.device("cpu")
WORDS = tiny_tokenizer()


class Eighths(nn.Module):
    """A linear module of 8-bit integers with a scale for each output, as libraries have: it has no float weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def unpacked(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked(), self.bias)


class Packed(Tensor):
    """As torchao keeps weights: floating point by its own word, but few operations know it."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.split, Tensor.double):
            raise NotImplementedError(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        keeps = func in (Tensor.detach, Tensor.data.__get__, Tensor.requires_grad_)
        return made.as_subclass(cls) if keeps else made


def linears(model: Any) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, module) of the linear modules in the blocks."""
    layers = nn.ModuleList(block.layer for block in describe(model).blocks)
    return [
        (parent, name, child)
        for parent in layers.modules()
        for name, child in parent.named_children()
        if hasattr(child, "in_features")
    ]


def in_eighths(model: Any) -> tuple[Any, Any]:
    """(the model with quantised linear modules, the model of the unpacked weights)."""
    quantised, unpacked = copy.deepcopy(model), copy.deepcopy(model)
    for (parent, name, linear), (_, _, twin) in zip(linears(quantised), linears(unpacked), strict=True):
        packed = Eighths(linear)
        setattr(parent, name, packed)
        twin.weight.data.copy_(packed.unpacked())
    return quantised, unpacked


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double()


@pytest.mark.parametrize("case", ["gemma3", "llama, heads of their own, biases", "qwen2", "pythia"])
def test_a_patch_acts_as_on_the_unpacked_weights(case: str) -> None:
    quantised, unpacked = in_eighths(tiny(case, dtype=torch.float64))
    patch, ids = fitting_patch(quantised, dtype=torch.float64), token_ids()
    bare = logits(quantised, ids)
    with patch.applied(quantised), patch.applied(unpacked):
        found, wanted = logits(quantised, ids), logits(unpacked, ids)
        written = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (quantised, unpacked)]
    # transformers computes norms in float32 in a float64 model too, which amplifies a last bit.
    assert largest(found - wanted) <= 1e-6 * largest(wanted)
    assert largest(wanted - bare) > 1e-2 * largest(wanted)
    assert torch.equal(*written)
    assert hooks(quantised) == 0 and torch.equal(logits(quantised, ids), bare)
    assert largest(describe(quantised).forward(ids) - bare) <= 1e-5 * largest(bare)


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
@pytest.mark.parametrize("pairing", ["sequential", "layerwise", "two_pass"])
def test_a_patch_is_fitted_as_on_the_unpacked_weights(pairing: str) -> None:
    quantised, unpacked = in_eighths(tiny_gemma3(dtype=torch.float64, vocab_size=len(WORDS)))
    before = [module.codes.clone() for _, _, module in linears(quantised)]
    options: dict[str, Any] = {
        "sites": ("attention", "mlp", "down", "residual"), "pairing": pairing, "estimator": "affine",
        "max_new_tokens": 3, "progress": False,
    }  # fmt: skip
    inputs = ["8 76", {"prompt": "3 1", "completion": "4"}]
    found, wanted = (tk.transmute(m, WORDS, "Sum now", inputs, **options) for m in (quantised, unpacked))
    assert found.entries.keys() == wanted.entries.keys()
    for key, entry in wanted.entries.items():
        for name, tensor in entry.tensors().items():
            assert largest(found.entries[key].tensors()[name] - tensor) <= SOLVED * largest(tensor), (key, name)
    assert all(torch.equal(m.codes, codes) for (_, _, m), codes in zip(linears(quantised), before, strict=True))


def test_merging_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    quantised, unpacked = in_eighths(tiny_gemma3())
    patch, before = random_patch(sites=MATRICES, vectors=False), copy.deepcopy(unpacked.state_dict())
    parent, name, _ = linears(unpacked)[-1]
    setattr(parent, name, Eighths(parent.get_submodule(name)))  # the last of them alone
    for model in (quantised, unpacked):
        for write in (patch.merge_, lambda m: patch.export_merged(tmp_path / "merged", m)):
            with pytest.raises(ValueError, match="must be a torch.nn.Linear, .*: use applied, or export a LoRA$"):
                write(model)
    after = unpacked.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key in after)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="^diagnose: model must have plain floating weights, got .*Eighths with no"):
        diagnose(patch, quantised)


def test_a_saved_patch_knows_its_quantised_model(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    plain, words = tiny_gemma3(vocab_size=len(WORDS)), WORDS
    quantised, unpacked = in_eighths(plain)
    patch = tk.transmute(quantised, words, "Sum now", ["8 76"], max_new_tokens=2, progress=False)
    patch.save_pretrained(tmp_path)
    recwarn.clear()
    loaded = tk.ThoughtPatch.from_pretrained(tmp_path, model=quantised, tokenizer=words, mismatch="refuse")
    with random_patch(1).applied(quantised):  # which is no part of the weights
        assert loaded.check(quantised, words, mismatch="refuse") == []
    assert loaded.check(unpacked, words, mismatch="refuse") == [] and not recwarn.list
    (told,) = loaded.check(plain, words, mismatch="ignore")
    assert (
        told.startswith("its weights differ by up to ")
        and "in 6 of 7 compared, as those of a model do that was q" in told
    )
    describe(quantised).blocks[0].down_proj.codes.neg_()
    with pytest.raises(ValueError, match="its weights are others .1 of 7 compared, block 0, down among them"):
        loaded.check(quantised, words, mismatch="refuse")


def test_exports_hold_the_unpacked_weights(tmp_path: Path) -> None:
    quantised, unpacked = in_eighths(tiny_gemma3(dtype=torch.float64, attention_bias=True))
    patch = random_patch(sites=MATRICES, vectors=False, dtype=torch.float64)
    for name, model in (("found", quantised), ("wanted", unpacked)):
        patch.export_peft(tmp_path / name, model)
    found, wanted = (load_file(tmp_path / name / WEIGHT_FILE) for name in ("found", "wanted"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert largest(found[name] - tensor) <= 64 * FLOORS[torch.float64] * largest(tensor), name


def test_weights_that_unpack_themselves_are_unpacked(tmp_path: Path) -> None:
    plain = tiny_gemma3(dtype=torch.bfloat16)
    packed, ids = copy.deepcopy(plain), token_ids()
    for _, _, module in linears(packed):
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)
    patch = random_patch(sites=MATRICES, vectors=False)
    for name, model in (("plain", plain), ("packed", packed)):
        patch.export_peft(tmp_path / name, model)
    tensors = [load_file(tmp_path / name / WEIGHT_FILE) for name in ("plain", "packed")]
    assert all(torch.equal(tensors[1][name], tensor) for name, tensor in tensors[0].items())
    assert identity(packed) == identity(plain)
    block, twin = describe(packed).blocks[1], describe(plain).blocks[1]
    u = torch.randn(2, 5, 36, generator=torch.Generator().manual_seed(0))  # float32, which widens the weights
    assert all(torch.equal(a, b) for a, b in zip(block.mlp_activation(u), twin.mlp_activation(u), strict=True))
    with patch.applied(packed), patch.applied(plain):
        assert torch.equal(logits(packed, ids), logits(plain, ids))
    with pytest.raises(ValueError, match="got Packed of torch.bfloat16 on cpu; .* use applied, or export a LoRA"):
        patch.merge_(packed)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_torchs_own_dynamic_quantisation_serves(tmp_path: Path) -> None:
    plain = tiny_gemma3(tie_word_embeddings=False)
    model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    patch, ids = random_patch(sites=["attention"], vectors=False), token_ids(1)
    bare = logits(model, ids)
    assert largest(describe(model).forward(ids) - bare) <= 0.05 * largest(bare)  # it rounds activations to 8 bits
    assert largest(bare - logits(plain, ids)) > 1e-4 * largest(bare)  # the head is quantised as well
    o_proj = describe(model).blocks[0].o_proj
    weight = o_proj.weight().dequantize()
    assert torch.equal(dequantised(o_proj), weight) and bias_of(o_proj) is None
    read = called_weight(o_proj, o_proj.in_features, torch.float32, CPU)
    assert largest(read - weight) <= 4 * FLOORS[torch.float32] * largest(weight)  # unit vectors are not rounded
    with patch.applied(model):
        o = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
        found = o_proj(o)
    matrix = patch.matrix(0, "attention")
    assert torch.equal(found, o_proj(o + o @ matrix.T))
    patch.export_peft(tmp_path, model)
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    tensors = load_file(tmp_path / WEIGHT_FILE)
    product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    assert largest(product - weight @ matrix) <= 1e-6 * largest(weight @ matrix)
    with pytest.raises(
        ValueError, match="^merge_: o_proj must be a torch.nn.Linear, got torch.*Linear; .*export a LoRA"
    ):
        patch.merge_(model)
    vector = random_patch(sites=["attention"], vectors=True)
    with pytest.raises(ValueError, match="export_peft: patch must have no vector where the modules have no bias"):
        vector.export_peft(tmp_path, model)


def test_what_a_head_writes_is_read_from_quantised_weights() -> None:
    decoders = [describe(model) for model in in_eighths(tiny_gemma3(dtype=torch.float64))]
    means = {1: torch.randn(40, generator=torch.Generator().manual_seed(0))}
    found, wanted = (_written_by(decoder, means, 1, 2) for decoder in decoders)
    assert largest(found - wanted) <= FLOORS[torch.float32] * largest(wanted)


def torchao(name: str, **options: Any) -> Callable[[], Any]:
    def made() -> Any:
        quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(quantization, name)(**options))

    return made


def bitsandbytes(**options: Any) -> Callable[[], Any]:
    def made() -> Any:
        pytest.importorskip("bitsandbytes", minversion="0.46", reason="pip install bitsandbytes, which needs no GPU")
        from transformers import BitsAndBytesConfig

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each product that it casts to float16
        return BitsAndBytesConfig(**options)

    return made


# How far logits may be from those of the unpacked weights, relative to the largest: FORWARD where the library
# multiplies activations as they are, some roundings of activations to 8 bits or bfloat16 elsewhere.
LIBRARIES: dict[str, tuple[Callable[[], Any], torch.dtype, float]] = {
    "torchao, 8 bits": (torchao("Int8WeightOnlyConfig"), torch.float32, FORWARD),
    "torchao, 4 bits": (torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), torch.float32, FORWARD),
    "torchao, float8": (torchao("Float8WeightOnlyConfig"), torch.bfloat16, 0.05),
    "torchao, 8 bits twice": (torchao("Int8DynamicActivationInt8WeightConfig"), torch.float32, 0.05),
    "bitsandbytes, 8 bits": (bitsandbytes(load_in_8bit=True), torch.bfloat16, 0.05),
    "bitsandbytes, 4 bits": (bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), torch.bfloat16, 0.05),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_quantised_by_a_library(name: str, tmp_path: Path) -> None:
    quantisation, dtype, error = LIBRARIES[name]
    options = {"quantization_config": quantisation(), "dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, **options).eval()
    plain, words = tk.load(CHECKPOINT, dtype=dtype)
    unpacked, ids = copy.deepcopy(plain), torch.tensor([words.encode("4 7 2 1")])
    for (_, _, module), (_, _, twin) in zip(linears(model), linears(unpacked), strict=True):
        twin.weight.data.copy_(weight_of(module, dtype, CPU))
    inputs = [f"{a} {b} {a * b % 10}" for a in range(4, 6) for b in range(4)]
    sites = ("attention", "mlp", "down")
    patch = tk.transmute(model, words, "Sum the numbers", inputs, sites=sites, progress=False)
    with patch.applied(model), patch.applied(unpacked):
        found, wanted = logits(model, ids), logits(unpacked, ids)
        assert len(model.generate(ids, max_new_tokens=2, do_sample=False)[0]) > ids.shape[1]
    assert largest(found - wanted) <= error * largest(wanted)
    with pytest.raises(ValueError, match="quantised weights are never written, use applied, or export a LoRA$"):
        patch.merge_(model)
    with pytest.raises(ValueError, match="export_merged: model must have plain floating weights, got a quantised one"):
        patch.export_merged(tmp_path / "merged", model)
    patch.save_pretrained(tmp_path / "patch")
    loaded = tk.ThoughtPatch.from_pretrained(tmp_path / "patch", model=model, tokenizer=words, mismatch="refuse")
    (told,) = loaded.check(plain, words, mismatch="ignore")
    assert "in 6 of 7 compared, as those of a model do that was quantised" in told
    assert differences(identity(unpacked), model) == []
    peft = pytest.importorskip("peft", reason="reads what export_peft writes; pip install 'thought_kernels[peft]'")
    patch.export_peft(tmp_path / "lora", model)
    fresh = AutoModelForCausalLM.from_pretrained(CHECKPOINT, **options)
    adapted = logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "lora").eval(), ids)
    assert largest(adapted - wanted) <= max(error, 1e-4) * largest(wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_another_quantised_model_has_another_checkpoint() -> None:
    """Modules that torch has quantised have no parameters, and packed weights no bits to sum."""
    model = tiny_gemma3(dtype=torch.float32, vocab_size=len(WORDS))
    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.o_proj.weight.data.mul_(-1)
    for quantise in (dynamically, packed):
        keys = [run_key(quantise(copy.deepcopy(one)), {}) for one in (model, other, model)]
        assert keys[0] == keys[2] != keys[1]


def dynamically(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def packed(model: Any) -> Any:
    for _, _, module in linears(model):
        module.weight = nn.Parameter(module.weight.data.as_subclass(Packed), requires_grad=False)
    return model


def test_weights_that_are_elsewhere_are_not_read() -> None:
    """Offloaded, sharded, or in an adapter's wrapper: left out of an identity, and no reason to fail."""

    class Own(nn.Linear):
        pass

    own = Own(3, 2, device="meta")
    assert weight_of(own, torch.float32, CPU) is None and weight_of(None, torch.float32, CPU) is None
    wrapper = nn.Module()
    wrapper.in_features, wrapper.base_layer = 3, nn.Linear(3, 2, device="meta")
    assert weight_of(wrapper, torch.float32, CPU) is None
    wrapper.base_layer = inner = nn.Linear(3, 2)
    assert weight_of(wrapper, torch.float32, CPU) is inner.weight


def test_a_patch_loads_onto_an_offloaded_model(tmp_path: Path) -> None:
    model = tiny_gemma3(dtype=torch.float32, vocab_size=len(WORDS))
    patch = tk.transmute(model, WORDS, "Sum now", [{"prompt": "8 7", "completion": "ok"}])
    patch.save_pretrained(tmp_path)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model))
    loaded = tk.ThoughtPatch.from_pretrained(tmp_path, model=offloaded)
    ids = token_ids()
    with patch.applied(model), loaded.applied(offloaded):
        assert largest(logits(model, ids) - logits(offloaded, ids)) <= 1e-5 * largest(logits(model, ids))
