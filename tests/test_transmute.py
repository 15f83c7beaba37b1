"""From instruction to patch: what the whole path promises, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_gemma3, tiny_multimodal_gemma3, tiny_tokenizer

import thought_kernels as tk
from thought_kernels.generation.completions import Ending, with_completions
from thought_kernels.models import describe
from thought_kernels.pairing.batches import MAX_BATCH_TOKENS, group_examples
from thought_kernels.prompts.prompt import EncodedExample, encode

TOKENIZER = tiny_tokenizer()
EXAMPLE = {"prompt": "8 76", "completion": "x=2 ok"}
DEMONSTRATIONS = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]


def model_of(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object):
    return tiny_gemma3(seed, dtype, vocab_size=len(TOKENIZER), **changes)


@torch.no_grad()
def logits(model, ids: list[int], last: int) -> torch.Tensor:
    """By the adapter's float64 path, which a test of the adapter holds against transformers."""
    return describe(model).forward(torch.tensor([ids]))[0, -last:]


@pytest.mark.parametrize("instruction", ["Sum now", DEMONSTRATIONS])
@pytest.mark.parametrize("window", [3, 6, 64])
@pytest.mark.parametrize("pairing", ["sequential", "layerwise"])
def test_one_example_is_interpolated(pairing: str, window: int, instruction: object) -> None:
    """exact, all blocks, attention site: the patched model on [H, e] gives the prompted logits at e."""
    for header_weight in (0.3, 0.0) if pairing == "sequential" else (0.3,):
        model = model_of(window, sliding_window=window, head_dim=16)
        patch = tk.transmute(
            model, TOKENIZER, instruction, [EXAMPLE], estimator="exact", pairing=pairing, header_weight=header_weight
        )
        header, chunk, e = tk.align(TOKENIZER, instruction, EXAMPLE)
        wanted = logits(model, header + chunk + e, len(e))
        bare = logits(model, header + e, len(e))
        with patch.applied(model):
            got = logits(model, header + e, len(e))
        size = wanted.abs().max()
        assert (got - wanted).abs().max() <= 1e-6 * size
        assert (bare - wanted).abs().max() >= 1e-2 * size


def test_layerwise_without_header_rows_does_not_interpolate() -> None:
    """The patch then moves the keys of H, which e sees: the control of the test above."""
    model = model_of(3, head_dim=16)
    patch = tk.transmute(
        model, TOKENIZER, "Sum now", [EXAMPLE], estimator="exact", pairing="layerwise", header_weight=0.0
    )
    header, chunk, e = tk.align(TOKENIZER, "Sum now", EXAMPLE)
    wanted = logits(model, header + chunk + e, len(e))
    with patch.applied(model):
        got = logits(model, header + e, len(e))
    assert (got - wanted).abs().max() >= 1e-4 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_missing_completions_are_written_by_the_prompted_model() -> None:
    model = model_of(4, torch.float32)
    prompts = ["8 76", "abc", "9"]
    stops = [1, TOKENIZER.convert_tokens_to_ids("<end_of_turn>")]
    examples = []
    for prompt in prompts:
        header, chunk, e = tk.align(TOKENIZER, "Sum now", prompt)
        ids = torch.tensor([header + chunk + e])
        written = []
        while len(written) < 5 and not (written and written[-1] in stops):  # greedy, by whole forwards
            written.append(int(model(torch.tensor([ids[0].tolist() + written])).logits[0, -1].argmax()))
        examples.append(EncodedExample(header, chunk, [*e, *written], len(e)))
    encoded = [encode(TOKENIZER, "Sum now", prompt) for prompt in prompts]
    assert (
        with_completions(
            model,
            encoded,
            ending=Ending(tuple(stops), "", TOKENIZER),
            max_new_tokens=5,
            batch_size=2,
            numbers=[[0]] * 3,
        )
        == examples
    )


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_completions_are_greedy_whatever_the_generation_config_says() -> None:
    model = model_of(4, torch.float32)
    encoded = [encode(TOKENIZER, "Sum now", prompt) for prompt in ("8 76", "abc")]
    arguments = {"ending": Ending((5,), "", TOKENIZER), "max_new_tokens": 8, "batch_size": 2, "numbers": [[0]] * 2}
    greedy = with_completions(model, encoded, **arguments)
    own = model.generation_config
    own.repetition_penalty, own.num_beams = 5.0, 3
    assert with_completions(model, encoded, **arguments) == greedy
    assert model.generation_config is own and own.num_beams == 3


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_inputs_alone_are_enough() -> None:
    patch = tk.transmute(model_of(5), TOKENIZER, "Sum now", ["8 76", "abc"], max_new_tokens=4, completions=2)
    assert patch.provenance["examples"] == 2 and patch.provenance["generated_completions"] == 4 + len(
        patch.provenance["written_inputs"]
    )
    assert patch.layers == (0, 1, 2) and patch.sites == ("attention", "down")


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_further_completions_are_drawn_by_the_seed_and_given_ones_are_left_alone() -> None:
    model = model_of(4, torch.float32)
    encoded = [encode(TOKENIZER, "Sum now", example) for example in ("8 76", EXAMPLE, "9")]
    arguments = {"ending": Ending((5,), "", TOKENIZER), "max_new_tokens": 8}
    rows = with_completions(model, encoded, **arguments, batch_size=2, numbers=[range(3)] * 3, seed=1)
    assert [row.tokens[: len(encoded[0].tokens)] == encoded[0].tokens for row in rows[:3]] == [True] * 3
    assert rows[3] == encoded[1] and len(rows) == 7
    (greedy, _, _) = with_completions(model, encoded, **arguments, batch_size=2, numbers=[[0]] * 3)
    assert rows[0] == greedy._replace(share=1 / 3) and len({tuple(row.tokens) for row in rows[:3]}) == 3
    assert with_completions(model, encoded, **arguments, batch_size=8, numbers=[range(3)] * 3, seed=1) == rows
    assert with_completions(model, encoded, **arguments, batch_size=8, numbers=[range(3)] * 3, seed=2) != rows


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_the_completions_of_an_example_share_its_weight() -> None:
    model = model_of(4, torch.float32)
    encoded = [encode(TOKENIZER, "Sum now", example) for example in ("8 76", EXAMPLE)]
    arguments = {"ending": Ending((5,), "", TOKENIZER), "max_new_tokens": 4, "batch_size": 2}
    rows = with_completions(model, encoded, **arguments, numbers=[range(3)] * 2)
    for tokens in ("all", "answer"):
        (group,) = group_examples(rows, 2, tokens, torch.float64)
        assert group.weight == len(encoded)
        sums = [float(weights.sum()) for batch in group.batches for weights in batch.weights]
        assert sorted(sums) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_the_mean_of_several_equal_completions_is_that_of_one() -> None:
    model = model_of(4)
    with torch.no_grad():  # one token has all of the distribution, so that draws are greedy
        model.lm_head.weight.mul_(1e4)
    options = {"estimator": "mean", "sites": ("attention",), "max_new_tokens": 3}
    one, three = (
        tk.transmute(model, TOKENIZER, "Sum now", ["8 76", "abc", EXAMPLE], completions=count, **options)
        for count in (1, 3)
    )
    for layer in range(3):
        found, wanted = (patch.matrix(layer, "attention") for patch in (three, one))
        assert (found - wanted).norm() <= 1e-9 * wanted.norm()


def test_completions_end_where_the_context_does_behind_either_prefix() -> None:
    rows = [encode(TOKENIZER, "Su", text, without="Multiply") for text in ("8", "8 7")]
    model = model_of(5, max_position_embeddings=rows[1].length + 1)
    with pytest.warns(UserWarning, match="6 of 6 completions did not end within max_new_tokens=64 tokens or the model"):
        patch = tk.transmute(
            model, TOKENIZER, "Su", ["8", "8 7"], without="Multiply", tokens="answer", written_inputs=0
        )
    assert patch.provenance["generated_completions"] == 6
    with pytest.warns(UserWarning, match="did not end"):
        made = with_completions(
            model,
            rows,
            ending=Ending((), "", TOKENIZER),
            max_new_tokens=64,
            batch_size=2,
            numbers=[range(2)] * 2,
        )
    assert [row.length for row in made] == [rows[1].length + 1] * 4


def test_a_fit_on_top_of_another_patch_is_told() -> None:
    model, rows = model_of(5), [{"prompt": "8 76", "completion": "3"}]
    first = tk.transmute(model, TOKENIZER, "Sum now", rows)
    with first.applied(model), pytest.warns(UserWarning, match="transmute: model should be bare, got one that a patch"):
        tk.transmute(model, TOKENIZER, "Sum now", rows)


def test_a_description_is_taken_for_its_model() -> None:
    model, rows = model_of(5), [{"prompt": "8 76", "completion": "3"}]
    found, wanted = (tk.transmute(of, TOKENIZER, "Sum now", rows) for of in (describe(model), model))
    assert all(torch.equal(found.matrix(*key), wanted.matrix(*key)) for key in wanted.entries)


def test_a_cut_completion_is_reported() -> None:
    with pytest.warns(UserWarning, match="did not end within max_new_tokens=2"):
        tk.transmute(model_of(5), TOKENIZER, "Sum now", ["8 76", "abc"], max_new_tokens=2)


def test_examples_come_in_many_forms(tmp_path: Path) -> None:
    model = model_of(6)
    chat = [{"role": "user", "content": "8 76"}, {"role": "assistant", "content": "x=2 ok"}]
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(EXAMPLE) + "\n" + json.dumps(chat) + "\n")
    wanted = tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE, EXAMPLE])
    for examples in ([EXAMPLE, chat], [EXAMPLE, {"messages": chat}], path, str(path)):
        patch = tk.transmute(model, TOKENIZER, "Sum now", examples)
        assert torch.equal(patch.matrix(1, "attention"), wanted.matrix(1, "attention"))


def test_the_answer_tokens_alone_may_be_summed() -> None:
    examples = [EncodedExample([2], [7], [5, 6, 7, 8, 9], 2), EncodedExample([2], [7], [5, 6, 7], 1)]
    (group,) = group_examples(examples, 8, "answer", torch.float64)
    (batch,) = group.batches
    torch.testing.assert_close(
        batch.weights, torch.tensor([[0, 1 / 2, 1 / 2, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    )
    (group,) = group_examples(examples, 8, "all", torch.float64)
    torch.testing.assert_close(group.batches[0].weights.sum(1), torch.ones(2, dtype=torch.float64))


def test_batches_are_bounded_and_grouped_by_what_they_share() -> None:
    long = EncodedExample([2], [7], [5] * (MAX_BATCH_TOKENS // 2), 1)
    short = EncodedExample([2], [7], [5, 6], 1)
    other = EncodedExample([2, 3], [7], [5, 6], 1)
    groups = group_examples([long, short, other, long, long], 3, "all", torch.float32)
    assert [(group.header, [batch.tokens.shape[0] for batch in group.batches]) for group in groups] == [
        ((2,), [2, 2]), ((2, 3), [1])
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_keep_float32_sums(dtype: torch.dtype) -> None:
    """bf16 activations move the solved matrix by their rounding, not by that of a bf16 sum."""
    exact = tk.transmute(model_of(8), TOKENIZER, "Sum now", [EXAMPLE], ridge=0.5)
    rough = tk.transmute(model_of(8, dtype), TOKENIZER, "Sum now", [EXAMPLE], ridge=0.5)
    assert rough.matrix(0, "attention").dtype == torch.float32
    error = (rough.matrix(0, "attention") - exact.matrix(0, "attention")).norm() / exact.matrix(0, "attention").norm()
    assert error <= 20 * torch.finfo(dtype).eps


def test_the_model_is_only_read() -> None:
    model = model_of(9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
@pytest.mark.parametrize("pairing", ["sequential", "layerwise"])
def test_the_mode_a_model_is_in_does_not_matter(pairing: str) -> None:
    """Dropout in attention, which writes the completions, and in an adapter; autocast; training with checkpoints."""
    peft = pytest.importorskip("peft", reason="puts dropout into a model; pip install 'thought_kernels[peft]'")
    lora = peft.LoraConfig(r=2, target_modules=["k_proj", "gate_proj"], lora_dropout=0.5, init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model_of(3, torch.float32, attention_dropout=0.5), lora).eval()
    inner = wrapped.base_model.model

    def patch_of(model: object) -> tk.ThoughtPatch:
        return tk.transmute(
            model, TOKENIZER, "Sum now", ["8 76", "abc"], estimator="affine", pairing=pairing, max_new_tokens=9
        )

    def tensors(patch: tk.ThoughtPatch) -> list[torch.Tensor]:
        return [tensor for entry in patch.entries.values() for tensor in entry.tensors().values()]

    ids = torch.arange(6, 15)
    expected, report = tensors(patch_of(inner)), tk.replay(inner, ids, (2, 5))
    wrapped.train()
    inner.model.layers[1].eval()
    modes = [module.training for module in wrapped.modules()]
    for model in (wrapped, inner):
        with torch.autocast("cpu", torch.bfloat16):
            found = tensors(patch_of(model))
            again = tk.replay(model, ids, (2, 5))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert again.logit_error == report.logit_error and again.control_error == report.control_error
    assert [module.training for module in wrapped.modules()] == modes


def test_a_multimodal_model_is_transmuted_by_its_text_blocks() -> None:
    model = tiny_multimodal_gemma3(0, vocab_size=len(TOKENIZER))
    patch = tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE])
    assert patch.layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": [0, 3]}, "layers must be distinct 0-based block indices below 3, got [0, 3]"),
        ({"layers": []}, "layers must be distinct"),
        ({"layers": [1, 1]}, "layers must be distinct"),
        ({"layers": [-1]}, "layers must be distinct"),
        ({"sites": ("atention",)}, "sites must be among attention, mlp, down, residual"),
        ({"sites": ()}, "sites must be among"),
        ({"pairing": "both"}, "pairing must be one of two_pass, layerwise, sequential, got 'both'"),
        ({"estimator": "ols"}, "estimator must be one of"),
        ({"normalization": "l2"}, "normalization must be one of"),
        ({"estimator": "affine", "normalization": "norm"}, "normalization must be 'none' for estimator 'affine'"),
        ({"tokens": "last"}, "tokens must be one of all, answer, got 'last'"),
        ({"ridge": 0.0}, "ridge must be finite and positive"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"scale": 0}, "scale must not be 0 at every site, got 0; the patch would change nothing"),
        ({"scale": {"attention": 0, "down": 0.0, "mlp": 1}}, "scale must not be 0 at every site"),
        ({"scale": {"mlp": 1.0}}, "scale must have one entry for each of ['attention', 'down']"),
        ({"scale": {"mpl": 1.0}, "sites": None}, "scale must have sites among attention, mlp, down, residual, got"),
        ({"header_weight": -1.0}, "header_weight must not be negative"),
        ({"header_weight": float("inf")}, "header_weight must be finite"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        tk.transmute(model_of(0), TOKENIZER, "Sum now", [EXAMPLE], **options)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": "8"}, {"batch_size": 2.5}, {"header_weight": None}, {"header_weight": "1"}, {"layers": 1},
        {"layers": ["0"]}, {"ridge": "0.1"}, {"scale": True}, {"max_new_tokens": None},
    ],
)  # fmt: skip
def test_options_of_another_type_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(TypeError, match=f"transmute: {name} must be"):
        tk.transmute(model_of(0), TOKENIZER, "Sum now", [EXAMPLE], **options)


def test_numpy_numbers_are_numbers() -> None:
    arrays = {"layers": np.arange(2), "scale": np.float32(0.5), "batch_size": np.int64(2)}
    patch = tk.transmute(model_of(0), TOKENIZER, "Sum now", [EXAMPLE], **arrays).truncate(np.int64(2))
    assert patch.layers == (0, 1)
    json.dumps(patch.provenance)
    by_numpy = tk.replay(model_of(0), torch.arange(6, 14), (np.int64(2), np.int64(4)))
    assert by_numpy.logit_error == tk.replay(model_of(0), torch.arange(6, 14), (2, 4)).logit_error


def test_unknown_options_are_errors() -> None:
    with pytest.raises(TypeError, match="ridg"):
        tk.transmute(model_of(0), TOKENIZER, "Sum now", [EXAMPLE], ridg=0.1)


def test_bad_examples_are_refused() -> None:
    model = model_of(0, max_position_embeddings=24)
    with pytest.raises(ValueError, match="at least one example"):
        tk.transmute(model, TOKENIZER, "Sum now", [])
    with pytest.raises(ValueError, match=r"examples\[1\] must fit the model's context of 24 tokens, got"):
        tk.transmute(model, TOKENIZER, "Su", [{"prompt": "8", "completion": "9"}, EXAMPLE | {"prompt": "8 7 6 5 4 3"}])
    with pytest.raises(ValueError, match=r"examples\[1\] must fit the model's context of"):  # a token's room at least
        length = encode(TOKENIZER, "Su", "8 7").length - 1
        tk.transmute(model_of(0, max_position_embeddings=length), TOKENIZER, "Su", ["8", "8 7"])
    with pytest.raises(TypeError, match="describe"):
        tk.transmute(torch.nn.Linear(2, 2), TOKENIZER, "Sum now", [EXAMPLE])


def test_nan_in_the_model_names_the_block() -> None:
    model = model_of(0)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="block 1, site 'attention'"):
        tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE])


def test_paper_recipe_options() -> None:
    recipe = tk.paper_recipe(c1=0.03, c2=0.2)
    assert recipe["layers"] == tuple(range(10, 20))
    assert recipe["scale"] == {"mlp": 0.03 / 300, "residual": 0.2 / 300}
    assert recipe["completions"] == 1
    for options in ({"steps": 0}, {"c1": float("inf")}, {"c2": float("nan")}):
        with pytest.raises(ValueError, match="paper_recipe: "):
            tk.paper_recipe(**options)
