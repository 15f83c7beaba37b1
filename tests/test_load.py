"""Models from folders and GGUF files: what is loaded is an ordinary model, and what cannot be is said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import randomised, tiny_multimodal_gemma3, tiny_tokenizer
from patches import random_patch, same_bits, token_ids, weights
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import thought_kernels as tk
from thought_kernels.models.load import context_length, load, load_tokenizer

gguf = pytest.importorskip("gguf", reason="writes GGUF files; pip install 'thought_kernels[hf]'")

TEXT = "add 3 and 4"


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return randomised(LlamaForCausalLM(config), 0, torch.float32)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's bytes as tokens, without merges but one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet[:255], "an"]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [("a", "n")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_gguf(path: Path, model: LlamaForCausalLM, architecture: str = "llama") -> None:
    """The model and byte_tokenizer as llama.cpp's converter writes them, in float32."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3, 3, *[1] * (len(vocabulary) - 2)])
    writer.add_token_merges(["a n"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Tensors by llama.cpp's names; queries and keys in its order, which turns neighbours and not halves."""

    def turned(weight: Tensor, heads: int) -> Tensor:
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    inner = model.model
    found = {"token_embd.weight": inner.embed_tokens.weight, "output_norm.weight": inner.norm.weight}
    if not model.config.tie_word_embeddings:
        found["output.weight"] = model.lm_head.weight
    for index, layer in enumerate(inner.layers):
        attention, mlp = layer.self_attn, layer.mlp
        named = {
            "attn_norm": layer.input_layernorm.weight, "ffn_norm": layer.post_attention_layernorm.weight,
            "attn_q": turned(attention.q_proj.weight, 4), "attn_k": turned(attention.k_proj.weight, 2),
            "attn_v": attention.v_proj.weight, "attn_output": attention.o_proj.weight,
            "ffn_gate": mlp.gate_proj.weight, "ffn_up": mlp.up_proj.weight, "ffn_down": mlp.down_proj.weight,
        }  # fmt: skip
        found |= {f"blk.{index}.{name}.weight": tensor for name, tensor in named.items()}
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_llama(tied=False))
    return path


def test_a_gguf_file_is_loaded_as_an_ordinary_model(file: Path, tmp_path: Path) -> None:
    model, tokenizer = tk.load(file)
    assert same_bits(model, weights(tiny_llama(tied=False)))
    assert model.dtype == torch.float32 and not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer(TEXT).input_ids == byte_tokenizer()(TEXT).input_ids
    assert model.generation_config.eos_token_id == 1
    ids = token_ids(2, 9)
    patch = random_patch(layers=(0, 1), sites=("attention", "mlp"), vectors=False, hidden=32, attention=32)
    with torch.no_grad(), patch.merge_(model):
        wanted = model(ids).logits
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    again, _ = tk.load(tmp_path)
    assert torch.equal(again(ids).logits, wanted)
    assert not hasattr(again.config, "quantization_config")


def test_a_folder_with_one_gguf_file_and_other_dtypes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tied.gguf", tiny_llama(tied=True))
    model, _ = tk.load(tmp_path, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same_bits(model, weights(tiny_llama(tied=True).bfloat16()))
    assert context_length(tmp_path) == 64
    assert load_tokenizer(tmp_path)(TEXT).input_ids == byte_tokenizer()(TEXT).input_ids


def test_a_config_without_weights_does_not_hide_a_gguf_file(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    write_gguf(tmp_path / "tied.gguf", model)
    model.config.save_pretrained(tmp_path)
    found, _ = tk.load(tmp_path, dtype=torch.float64)
    assert same_bits(found, weights(tiny_llama(tied=True).double()))
    other = tiny_llama(tied=True).bfloat16()
    other.save_pretrained(tmp_path)  # weights beside the config come first
    byte_tokenizer().save_pretrained(tmp_path)
    assert tk.load(tmp_path)[0].dtype == torch.bfloat16


def test_gguf_files_that_cannot_be_read_are_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 32):  # tensors end on a boundary of 32 bytes
        (tmp_path / "short.gguf").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"^load: model must have .*, got none from '.*short.gguf'; .+"):
            load(tmp_path / "short.gguf")
    (tmp_path / "shorter.gguf").write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r"^load: model must have readable metadata .* from '.*shorter.gguf'; ."):
        load(tmp_path / "shorter.gguf")
    with pytest.raises(ValueError, match=r"^load: model must be a folder with .* or with one GGUF .* has 2 GGUF"):
        load(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"PK\3\4rest")
    with pytest.raises(ValueError, match=r"^load: .* GGUF file, got '.*other.bin', which begins with b'PK\\x03\\x04'"):
        load(tmp_path / "other.bin")


def test_a_gguf_file_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "made_up.gguf", tiny_llama(tied=True), "abacus")
    with pytest.raises(ValueError, match=r"^load: model must have .* known architecture, .*abacus"):
        load(tmp_path / "made_up.gguf")


def test_a_family_without_description_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "starcoder.gguf", tiny_llama(tied=True), "starcoder2")
    monkeypatch.setattr("thought_kernels.models.load._weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"^load: model must be of one of the families .*, got type 'starcoder2'"):
        load(tmp_path)


def test_without_the_package_that_reads_gguf(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thought_kernels.models.load.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ValueError, match=r"^load: gguf must be installed to read a GGUF file, got none; pip install"):
        load(file)


def test_slow_tokenizers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: Slow())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^load: model must have a fast tokenizer, .* with Slow; save a token"):
        load_tokenizer(tmp_path)


def test_multimodal_models_and_dtypes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_multimodal_gemma3(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load(tmp_path, dtype="bfloat16")
    assert type(loaded).__name__ == "Gemma3ForConditionalGeneration" and loaded.dtype == torch.bfloat16
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded_tokenizer("a b").input_ids == tokenizer("a b").input_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "llama"
    tiny_llama(tied=False).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of auto, float64"):
        load(folder, dtype="int8")
    with pytest.raises(ValueError, match="dtype must be one of auto, float64, .*, got torch.int8"):
        load(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="device must be one that torch can use here, got 'abacus'"):
        load(folder, device="abacus")
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(ValueError, match="which has none"):
        load(place)
    (place / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(ValueError, match="must be of one of the families Gemma, .*, got type 'bloom'; a further"):
        load(place)
    (place / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must have a readable config.json"):
        load(place)
    (place / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="must have weights of this architecture"):
        load(place)
    with pytest.raises(
        ValueError, match="got none from 'nobody/nothing-of-the-kind', where no folder is; as a hub id: "
    ):
        load("nobody/nothing-of-the-kind", offline=True)


def test_missing_weights_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "o_proj" in name)
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="must have all its weights, got .* without 1: .*o_proj"):
        load(folder)
