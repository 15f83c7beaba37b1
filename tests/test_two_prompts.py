"""Patches for what one prompt does and another does not, where the one is not the other with a text inserted."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tolerances import SOLVED
from two_forwards import activations, sums

import thought_kernels as tk
from thought_kernels.estimation import estimators
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.models import describe
from thought_kernels.pairing.batches import Group
from thought_kernels.pairing.replay import replay_group
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import Alignment, Prefixes, align, encode, explain

# Writes a system message of its own where none is given, as the templates of Qwen 2.5 and SmolLM 2 do.
CHATML = """{%- if messages[0]['role'] != 'system' -%}
{{ '<start_of_turn>system\n' + 'Be kind.' + '<end_of_turn>\n' }}{%- endif -%}
{%- for message in messages -%}
{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] + '<end_of_turn>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>assistant\n' }}{%- endif -%}"""
TOKENIZER = tiny_tokenizer()
DEFAULTING = tiny_tokenizer(template=CHATML)
SYSTEM = [{"role": "system", "content": "Sum up now."}]
TURNS = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
EXAMPLES = [
    {"prompt": "8 7", "completion": "8 + 7"},
    {"prompt": "abc", "completion": "c"},
    {"prompt": "12 4 9", "completion": "12, 4, 9"},
]


def text(ids: Any) -> str:
    return "".join(TOKENIZER.convert_ids_to_tokens(list(ids))).replace("▁", " ")


def test_a_system_message_takes_the_place_of_the_default_one() -> None:
    found = align(DEFAULTING, SYSTEM, "4")
    assert isinstance(found, Prefixes)
    assert text(found.with_prefix) == "<start_of_turn>system\nSum up now.<end_of_turn>\n"
    assert text(found.without_prefix) == "<start_of_turn>system\nBe kind.<end_of_turn>\n"
    assert text(found.e) == "<start_of_turn>user\n4<end_of_turn>\n<start_of_turn>assistant\n"
    row = encode(DEFAULTING, SYSTEM, "4")
    assert text(row.header) == "<start_of_turn>system\n"
    assert [*row.header, *row.replaced] == row.without_prefix == found.without_prefix
    chat = DEFAULTING.apply_chat_template([{"role": "user", "content": "4"}], add_generation_prompt=True)["input_ids"]
    assert [*row.without_prefix, *row.tokens] == chat


def test_an_inserted_instruction_tells_both_prefixes_too() -> None:
    found = align(TOKENIZER, "sum", "4")
    assert isinstance(found, Alignment)
    assert found.with_prefix == [*found.H, *found.I] and found.without_prefix == found.H
    assert encode(TOKENIZER, "sum", "4").replaced == ()


@pytest.mark.parametrize(
    ("instruction", "without", "prefixes", "e"),
    [
        ("Sum up", "Do not sum", ("user\nSum up\n", "user\nDo not sum\n"), "4<end_of_turn>"),
        (TURNS, [TURNS[0], {"role": "assistant", "content": "12"}], ("3<end_of_turn>\n", "12<end_of_turn>\n"), None),
        (SYSTEM, "Sum", ("system\nSum up now.<end_of_turn>\n<start_of_turn>user\n", "user\nSum\n"), "4<end_of_turn>"),
        (TURNS, SYSTEM, ("3<end_of_turn>\n", "Sum up now.<end_of_turn>\n"), None),
    ],
    ids=["texts", "turns", "message and text", "turns and message"],
)
def test_two_prompts_of_any_kind_are_cut_where_they_agree(
    instruction: Any, without: Any, prefixes: tuple[str, str], e: str | None
) -> None:
    found = align(DEFAULTING, instruction, "4", without=without)
    assert text(found.with_prefix).endswith(prefixes[0]) and text(found.without_prefix).endswith(prefixes[1])
    assert text(found.e).startswith(e or "<start_of_turn>user\n4<end_of_turn>")
    other = align(DEFAULTING, without, "4", without=instruction)
    assert (other.with_prefix, other.without_prefix) == (found.without_prefix, found.with_prefix)


def test_without_the_second_half_of_the_prompt_is_an_insertion() -> None:
    more = [*TURNS, {"role": "user", "content": "5"}, {"role": "assistant", "content": "6"}]
    found = align(DEFAULTING, more, "4", without=TURNS)
    assert isinstance(found, Alignment) and found.without_prefix == align(DEFAULTING, TURNS, "4").with_prefix


@pytest.mark.parametrize(
    ("instruction", "without", "kind", "expected"),
    [
        ("sum", "", ValueError, "without must not be empty, got ''; leave it out to compare with the same chat"),
        ("sum", [], ValueError, "without must not be empty, got no messages; leave it out"),
        ("sum", 3, TypeError, "without must be a str or a message list, got int"),
        ("sum", "sum", ValueError, "instruction must change the prompt, got the same with and without it"),
        (TURNS, TURNS[:1], ValueError, "without must be whole turns"),
    ],
)
def test_bad_second_prompts_are_refused(instruction: Any, without: Any, kind: type[Exception], expected: str) -> None:
    with pytest.raises(kind, match=f"align: {expected}"):
        align(DEFAULTING, instruction, "4", without=without)


def test_prompts_that_do_not_end_alike_are_both_shown() -> None:
    template = """{%- set last = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
    {%- for message in messages if message['role'] != 'system' -%}{{ message['content'] + '\n' }}{%- endfor -%}
    {{ last + '>' }}"""
    with pytest.raises(
        ValueError, match="without must give a prompt that ends as the one with .* got '4.nA>' .* '4.nB"
    ):
        align(
            tiny_tokenizer(template=template), [{"role": "system", "content": "A"}], "4",
            without=[{"role": "system", "content": "B"}],
        )  # fmt: skip


def test_a_token_across_the_other_prompt_s_edge_is_shown() -> None:
    with pytest.raises(ValueError, match=r"without must end at the edge of a token, got token 'x4' .*change the sep"):
        align(tiny_tokenizer((("x", "4"),)), "sum ", "4", without="box", separator="")


def test_explain_shows_both() -> None:
    rows = explain(DEFAULTING, SYSTEM, {"prompt": "4", "completion": "7"})
    row = encode(DEFAULTING, SYSTEM, {"prompt": "4", "completion": "7"})
    counts = {"H": len(row.header), "I": len(row.instruction), "I°": len(row.replaced), "e": len(row.tokens)}
    assert [r.part for r in rows] == [part for part, count in counts.items() for _ in range(count)]
    first = {part: next(r.position for r in rows if r.part == part) for part in counts}
    start = max(len(row.with_prefix), len(row.without_prefix))
    assert first == {"H": 0, "I": counts["H"], "I°": counts["H"], "e": start}
    assert [r.token for r in rows if r.answer] == ["7", "<end_of_turn>"]


def model_of(seed: int, **changes: Any) -> Any:
    return tiny_gemma3(seed, torch.float64, vocab_size=len(TOKENIZER), **changes)


@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize(("longer", "shorter"), [(12, 5), (5, 12), (7, 7)])
def test_replay_is_exact_for_any_two_prefixes(window: int, longer: int, shorter: int) -> None:
    ids = torch.randint(6, 60, (40,), generator=torch.Generator().manual_seed(longer)).tolist()
    group = Group(tuple(ids[:2]), tuple(ids[2:longer]), tuple(ids[20 : 18 + shorter]), ())
    report = replay_group(describe(model_of(longer, sliding_window=window)), group, ids[30:])
    assert report.block_error.max() <= 1e-9 and report.logit_error <= 1e-9
    assert report.control_error > 1e-3


def close(actual: Any, wanted: torch.Tensor) -> None:
    assert (actual - wanted).abs().max() <= SOLVED * wanted.abs().max()


@pytest.mark.parametrize("instruction", ["Sum now", "Sum all of it up now"])
@pytest.mark.parametrize(("pairing", "sites"), [("two_pass", ("attention",)), ("sequential", ("attention", "mlp"))])
def test_sums_are_those_of_two_forwards(pairing: str, sites: tuple[str, ...], instruction: str) -> None:
    """δ and a of whole forwards over [P, e] and [P°, e], each from position 0, with earlier patches in `sequential`."""
    model, without = model_of(3, sliding_window=4), "Do not add"
    patch = tk.transmute(
        model, TOKENIZER, instruction, EXAMPLES, without=without, sites=sites, pairing=pairing, ridge=0.2
    )
    applied: dict = {}
    for layer in range(3):
        for site in sites:
            found = []
            for example in EXAMPLES:
                told, bare, e = align(TOKENIZER, instruction, example, without=without)
                with ThoughtPatch(applied).applied(model) if applied else nullcontext():
                    plain = activations(model, bare + e, len(e))[layer, site]
                found.append((activations(model, told + e, len(e))[layer, site], plain))
            cross, gram, _ = sums(found)
            close(patch.matrix(layer, site), estimators.ridge_solve(cross, gram, 0.2))
            if pairing == "sequential":
                applied[layer, site] = patch.entries[layer, site]


def test_layerwise_is_the_other_pairings_at_the_first_block() -> None:
    options: dict[str, Any] = {"without": "Do not add", "estimator": "mean", "sites": ("attention",), "layers": [0]}
    found = [
        tk.transmute(model_of(4), TOKENIZER, "Sum now", EXAMPLES, pairing=pairing, **options).matrix(0, "attention")
        for pairing in ("layerwise", "two_pass", "sequential")
    ]
    close(found[0], found[1])
    close(found[2], found[1])


@pytest.mark.parametrize(
    ("tokenizer", "instruction", "without"),
    [(TOKENIZER, "Sum now", "Do not add it"), (DEFAULTING, SYSTEM, None), (TOKENIZER, "Sum", None)],
    ids=["wording", "default", "insertion"],
)
def test_a_merged_patch_interpolates_its_one_example(tokenizer: Any, instruction: Any, without: Any) -> None:
    """Fewer tokens than widths: the patched model on [P°, e] writes the logits of the model on [P, e]."""
    model = model_of(5, head_dim=64, hidden_size=128)
    example = {"prompt": "8 7", "completion": "15"}
    patch = tk.transmute(
        model, tokenizer, instruction, [example], without=without, sites=("attention", "mlp"), estimator="exact",
        pairing="sequential",
    )  # fmt: skip
    row = encode(tokenizer, instruction, example, without=without)
    told = model(torch.tensor([[*row.with_prefix, *row.tokens]])).logits[0, -len(row.tokens) :]
    ids = torch.tensor([[*row.without_prefix, *row.tokens]])
    bare = model(ids).logits[0, -len(row.tokens) :]
    patch.merge_(model)
    merged = model(ids).logits[0, -len(row.tokens) :]
    scale = told.abs().max()
    assert (bare - told).abs().max() > 0.05 * scale
    assert (merged - told).abs().max() <= 1e-5 * scale  # transformers' own float32 norms and angles (theory §2)


def test_header_rows_need_a_common_beginning() -> None:
    with pytest.raises(ValueError, match="transmute: header_weight must be 0 where the prompt without the instruction"):
        tk.transmute(model_of(0), TOKENIZER, "Sum", EXAMPLES, without="Add", header_weight=0.5)


def test_header_rows_need_a_header() -> None:
    options: dict[str, Any] = {"format": "{prompt} -> {completion}\n", "layers": [0]}
    with pytest.raises(ValueError, match=r"^transmute: header_weight must be 0 where nothing .* with examples\[0\]; "):
        tk.transmute(model_of(0), TOKENIZER, "Sum", EXAMPLES, header_weight=0.5, **options)
    assert tk.transmute(model_of(0), TOKENIZER, "Sum", EXAMPLES, **options).layers == (0,)


def test_the_patch_says_what_it_was_compared_with() -> None:
    patch = tk.transmute(model_of(0), TOKENIZER, "Sum", EXAMPLES, without=TURNS, layers=[0])
    assert patch.provenance["without"] == TURNS and patch.provenance["format"] is None


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_an_evaluation_asks_as_the_patch_was_made() -> None:
    model, format = model_of(1), "{prompt} -> {completion}\n"
    told: dict[str, Any] = {"without": "Reverse", "format": format}
    texts = ["3 1 4", "2 7 8", "1 9"]
    patch = tk.transmute(model, TOKENIZER, "Sum", texts, max_new_tokens=3, **told)
    options: dict[str, Any] = {"held_out": texts, "sections": ["effect", "side_effects", "replay"], "max_new_tokens": 3}
    remembered = tk.evaluate(model, TOKENIZER, patch, texts, **options)
    given = tk.evaluate(model, TOKENIZER, patch, texts, **told, **options)
    for name in options["sections"]:
        section = remembered.sections[name]
        assert section.status == "done" and str(section.figures) == str(given.sections[name].figures), section.error
    assert remembered.settings["format"] == format and remembered.settings["without"] == "Reverse"
    trial = Trial(model, TOKENIZER, "Sum", texts, None, max_new_tokens=3, **told)
    for text_, told_ids, bare_ids in zip(texts, trial.prompts, trial.bare_prompts, strict=True):
        assert text(told_ids) == f"Sum\n{text_} ->" and text(bare_ids) == f"Reverse\n{text_} ->"
    answer = remembered.sections["effect"].samples[0]
    assert (answer["bare"], answer["prompted"]) == (trial.base_texts[0], trial.prompted_texts[0])
