"""Copies of examples with other words in place of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tolerances import FLOORS, SOLVED, largest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app
from thought_kernels.demo import CHECKPOINT
from thought_kernels.models import describe
from thought_kernels.transmute.batches import embed, group_examples
from thought_kernels.transmute.fitting import Recipe, sums_of
from thought_kernels.transmute.prompt import EncodedExample, RandomVectors
from thought_kernels.transmute.substitution import (
    COPIES_SHARE,
    resolved_substitutes,
    usual_copies,
    with_substitutions,
    without_words_of,
    word_tokens,
)

EXAMPLES = [EncodedExample([1], [2], tokens, 3) for tokens in ([10, 11, 10, 12, 9], [10, 13, 14, 9], [10, 15, 9, 15])]
POOL = list(range(100, 120))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_copies_replace_what_varies_and_nothing_else() -> None:
    found = with_substitutions(EXAMPLES, 4, POOL, seed=0)
    assert found[:3] == EXAMPLES and len(found) == 3 + 3 * 4
    for index, copy in enumerate(found[3:]):
        original = EXAMPLES[index // 4]
        assert copy._replace(tokens=[], share=1.0) == original._replace(tokens=[])
        seen: dict[int, int] = {}
        for old, new in zip(original.tokens, copy.tokens, strict=True):
            if old in (9, 10):  # in every example
                assert new == old
            else:
                assert new in POOL and seen.setdefault(old, new) == new
        assert len(set(seen.values())) == len(seen)
    assert sum(copy.share for copy in found[3:7]) == pytest.approx(COPIES_SHARE)
    assert len({tuple(copy.tokens) for copy in found[3:7]}) == 4


def test_random_vectors_stand_for_what_varies_and_nothing_else() -> None:
    found = with_substitutions(EXAMPLES, 4, None, seed=0)
    assert found[:3] == EXAMPLES and len(found) == 3 + 3 * 4
    for index, copy in enumerate(found[3:]):
        original = EXAMPLES[index // 4]
        assert copy._replace(random=None, share=1.0) == original
        assert copy.random is not None and list(copy.random.ids) == sorted(set(original.tokens) - {9, 10})
    assert sum(copy.share for copy in found[3:7]) == pytest.approx(COPIES_SHARE)
    assert len({copy.random for copy in found}) == 13  # and None
    others = with_substitutions(EXAMPLES[::-1], 4, None, seed=0)
    assert {copy.random for copy in found} == {copy.random for copy in others}
    assert not {copy.random for copy in found[3:]} & {copy.random for copy in with_substitutions(EXAMPLES, 4, None, 1)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_random_vector_is_as_long_as_the_embedding_it_replaces_and_the_same_wherever_the_token_occurs(
    dtype: torch.dtype,
) -> None:
    decoder = describe(tiny_gemma3(vocab_size=120, dtype=dtype))
    padding = EncodedExample([1], [2], [10, 0, 9], 3)  # its varying token has the id that fills short rows
    copies = with_substitutions([*EXAMPLES, padding], 2, None, seed=0)
    ((batch,),) = (group.batches for group in group_examples(copies, 16, "all", torch.float32))
    plain, streams = decoder.embed(batch.tokens), embed(decoder, batch)
    torch.testing.assert_close(streams.double().norm(dim=-1), plain.double().norm(dim=-1), rtol=FLOORS[dtype], atol=0)
    seen = []
    for row, random in enumerate(batch.random):
        of_token: dict[int, torch.Tensor] = {}
        for place, token in enumerate(batch.tokens[row].tolist()):
            replaced = random is not None and token in random.ids and place < batch.lengths[row]
            assert torch.equal(streams[row, place], plain[row, place]) != replaced
            if replaced:
                assert torch.equal(of_token.setdefault(token, streams[row, place]), streams[row, place])
        seen += list(of_token.values())
    directions = torch.nn.functional.normalize(torch.stack(seen).double(), dim=1)
    overlaps = (directions @ directions.T)[torch.ones(len(seen), len(seen)).triu(1) == 1]
    assert overlaps.abs().max() < 0.9 and overlaps.mean().abs() < 4 / (overlaps.numel() * directions.shape[1]) ** 0.5
    for copy in copies:  # whatever else the batch holds
        ((alone,),) = (group.batches for group in group_examples([copy], 16, "all", torch.float32))
        count = len(copy.tokens)
        rows = [tokens[:count].tolist() == copy.tokens for tokens in batch.tokens]
        row = next(row for row, same in enumerate(rows) if same and batch.random[row] == copy.random)
        assert torch.equal(embed(decoder, alone)[0], streams[row, :count])


def test_a_vector_keeps_as_much_of_the_word_as_its_likeness_says() -> None:
    decoder = describe(tiny_gemma3(vocab_size=400, dtype=torch.float64, hidden_size=160))
    tokens = list(range(100, 400))
    for likeness in (0.0, 0.2, 0.7, 1.0):
        example = EncodedExample([1], [2], tokens, 300, random=RandomVectors(tuple(tokens[10:]), 5, likeness))
        ((batch,),) = (group.batches for group in group_examples([example], 1, "all", torch.float64))
        plain, read = decoder.embed(batch.tokens)[0], embed(decoder, batch)[0]
        assert torch.equal(plain[:10], read[:10])
        squares = torch.cosine_similarity(plain, read, dim=-1)[10:].square()
        # λ, and of a random direction's 1/d what the sum's length leaves; 290 draws scatter by less than 0.02.
        assert abs(float(squares.mean()) - (likeness + (1 - likeness) / 160)) < 0.03 + 0.06 * likeness * (1 - likeness)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torchs_defaults_do_not_reach_the_draw_and_a_word_without_an_embedding_keeps_none(dtype: torch.dtype) -> None:
    model = tiny_gemma3(vocab_size=120, dtype=dtype)
    model.get_input_embeddings().weight.data[13] = 0
    decoder, copies = describe(model), with_substitutions(EXAMPLES, 2, None, seed=0)

    def read() -> torch.Tensor:
        ((batch,),) = (group.batches for group in group_examples(copies, 16, "all", torch.float32))
        return embed(decoder, batch)

    wanted = read()
    torch.set_default_dtype(torch.float64)
    try:
        found = read()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted) and wanted.isfinite().all()


@torch.no_grad()
def test_the_sums_are_those_of_whole_forwards_that_read_the_random_vectors() -> None:
    """Transformers' own forwards over embeddings, with a hook; two_pass has δ and a from two such forwards."""
    model = tiny_gemma3(vocab_size=120, dtype=torch.float64)
    decoder = describe(model)
    recipe = Recipe(
        layers=frozenset({1}), sites=frozenset({"attention"}), pairing="two_pass", estimator="exact",
        normalization="none", tokens="all", header_weight=0.0, batch_size=4, substitutions=2, seed=3,
    )  # fmt: skip
    sums = sums_of(decoder, recipe, EXAMPLES).sums(1, "attention")
    assert sums is not None and sums.cross is not None and sums.gram is not None
    seen: list[torch.Tensor] = []
    projection = model.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    cross, gram = torch.zeros_like(sums.cross), torch.zeros_like(sums.gram)
    for example in with_substitutions(EXAMPLES, 2, None, seed=3):
        ((batch,),) = (group.batches for group in group_examples([example], 1, "all", torch.float64))
        count = len(example.tokens)
        for prefix in (example.header + example.instruction, example.header):
            whole = torch.cat([decoder.embed(torch.tensor([prefix])), embed(decoder, batch)], dim=1)
            model(inputs_embeds=whole)
        with_context, a = (x[0, -count:] for x in seen[-2:])
        cross += example.share / count * (with_context - a).T @ a
        gram += example.share / count * a.T @ a
    hook.remove()
    for ours, theirs in ((sums.cross, cross), (sums.gram, gram)):  # transformers' cosines and sines are float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_what_opens_a_turn_stays_where_only_some_examples_have_several() -> None:
    several = EncodedExample([1, 7, 8], [2], [10, 11, 7, 8, 12, 9], 5)
    for copy in with_substitutions([several, *EXAMPLES], 2, POOL, seed=0)[4:6]:
        assert copy.tokens[2:4] == [7, 8] and copy.tokens[4] in POOL


def test_neither_the_order_of_the_examples_nor_other_seeds_matter_to_a_copy() -> None:
    def copies(examples: list[EncodedExample], seed: int) -> set[tuple[int, ...]]:
        return {tuple(copy.tokens) for copy in with_substitutions(examples, 3, POOL, seed)}

    assert copies(EXAMPLES, 0) == copies(EXAMPLES[::-1], 0) != copies(EXAMPLES, 1)


@pytest.mark.parametrize("examples", [EXAMPLES[:1], [EXAMPLES[0]] * 3])
def test_examples_that_do_not_differ_have_no_copies(examples: list[EncodedExample]) -> None:
    assert with_substitutions(examples, 4, POOL, 0) == examples


def test_a_small_pool_is_drawn_from_more_than_once_and_an_empty_one_not_at_all() -> None:
    (copy,) = [c for c in with_substitutions(EXAMPLES, 1, [100, 9], 0)[3:] if len(c.tokens) == 5]
    assert copy.tokens == [10, 100, 10, 100, 9]
    assert with_substitutions(EXAMPLES, 1, [9, 10], 0) == EXAMPLES


def test_what_opens_a_turn_is_not_drawn() -> None:
    """H's words, such as "user", are words of the vocabulary; a copy that holds them would look like a turn."""
    examples = [example._replace(header=[1, 100, 101]) for example in EXAMPLES]
    free, protected = (with_substitutions(some, 8, POOL[:8], 0)[3:] for some in (EXAMPLES, examples))
    assert any({100, 101} & set(copy.tokens) for copy in free)
    assert not any({100, 101} & set(copy.tokens) for copy in protected)
    for with_them, without in zip(free, protected, strict=True):
        varying = {old: new for old, new in zip(with_them.tokens, without.tokens, strict=True) if old in POOL}
        assert len(set(varying.values())) == len(varying)
        if not {100, 101} & set(with_them.tokens):
            assert with_them.tokens == without.tokens
    assert with_substitutions(examples, 2, [100, 101], 0) == examples


def test_many_examples_have_fewer_copies() -> None:
    assert [usual_copies(count) for count in (1, 8, 64, 65, 300, 512, 10_000)] == [8, 8, 8, 7, 1, 1, 1]


def test_words_of_a_vocabulary(tokenizer: Any) -> None:
    texts = [text.strip() for text in tokenizer.batch_decode([[index] for index in word_tokens(tokenizer)])]
    assert {"maison", "garden", "odd"} <= set(texts)
    assert not {"a", "5", "+", "<end_of_turn>", "<bos>"} & set(texts)
    fewer = without_words_of(tokenizer, word_tokens(tokenizer), ["garden sees maison"])
    lost = [text.strip() for text in tokenizer.batch_decode([[i] for i in set(word_tokens(tokenizer)) - set(fewer)])]
    assert set(lost) == {"garden", "sees", "maison"} and len(lost) > 3  # with and without the space before them


def test_all_tokens_are_words_where_characters_are_tokens() -> None:
    characters = tiny_tokenizer()  # with "user", "model" and their beginnings
    assert set(word_tokens(characters)) == set(range(len(characters))) - set(characters.all_special_ids)


def test_the_recommended_recipe_has_copies_and_a_named_estimator_none(tokenizer: Any) -> None:
    model = tiny_gemma3(vocab_size=len(tokenizer), dtype=torch.float64)
    texts = ["1 2 3", "4 5 6", "0 9 8"]
    examples = [{"prompt": text, "completion": text} for text in texts]

    def rows(**options: Any) -> int:
        patch = tk.transmute(model, tokenizer, "Sum the numbers", examples, **options)
        assert patch.provenance["substitutions"] == options.get("substitutions", 8 if not options else 0)
        return patch.entries[0, "attention"].fit.rows

    plain = rows(estimator="ridge")
    assert rows() == 9 * plain
    assert rows(ridge=0.3) == plain
    assert rows(ridge=0.3, substitutions=2) == 3 * plain
    assert rows(substitutions=0) == plain

    for same in (examples[:1], [examples[0]] * 3):  # nothing varies in them: as without copies
        patch = tk.transmute(model, tokenizer, "Sum the numbers", same)
        assert (patch.provenance["substitutions"], patch.provenance["ridge"]) == (0, 0.1)
        wanted = tk.transmute(model, tokenizer, "Sum the numbers", same, substitutions=0)
        assert torch.equal(patch.matrix(0, "attention"), wanted.matrix(0, "attention"))
        for asked in ({"substitutions": 2}, {"substitutes": "words"}):
            with pytest.warns(UserWarning, match="transmute: examples must differ in a token .* got . without"):
                patch = tk.transmute(model, tokenizer, "Sum the numbers", same, **asked)
            assert (patch.provenance["substitutions"], patch.provenance["substitutes"]) == (0, None)
    assert tk.transmute(model, tokenizer, "Sum the numbers", examples).provenance["ridge"] == 0.003
    named = tk.transmute(model, tokenizer, "Sum the numbers", examples, ridge=0.3, substitutes="words")
    assert named.provenance["substitutions"] == 8 and named.provenance["substitutes"] == "words"
    assert "substitutions: 8" in str(named)


def test_substitutes_are_drawn_from_the_ids_given(tokenizer: Any) -> None:
    model = tiny_gemma3(vocab_size=len(tokenizer), dtype=torch.float64)
    examples = [{"prompt": text, "completion": text} for text in ("1 2 3", "4 5 6")]

    def patch(**options: Any) -> torch.Tensor:
        found = tk.transmute(model, tokenizer, "Sum the numbers", examples, layers=[0], **options)
        return found.matrix(0, "attention")

    words = word_tokens(tokenizer)
    assert torch.equal(patch(substitutes="words"), patch(substitutes=words))
    assert not torch.equal(patch(), patch(substitutes=words))
    assert not torch.equal(patch(substitutes=words), patch(substitutes=words[:20]))
    for substitutes in (None, words):
        assert not torch.equal(patch(substitutes=substitutes), patch(substitutes=substitutes, seed=1))
        one_by_one = patch(substitutes=substitutes, batch_size=1)
        wanted = patch(substitutes=substitutes)
        torch.testing.assert_close(one_by_one, wanted, rtol=0, atol=SOLVED * largest(wanted))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"substitutions": -1}, "transmute: substitutions must be at least 0, got -1"),
        ({"substitutes": [5, 100000]}, "transmute: substitutes must be ids below .*, got 100000"),
    ],
)
def test_bad_options_are_refused(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    model = tiny_gemma3(vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=message):
        tk.transmute(model, tokenizer, "Sum the numbers", ["1 2 3", "4 5 6"], **options)


def test_substitutes_come_from_a_text_file_on_the_command_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("garden sees moon", encoding="utf-8")
    arguments = ["-o", str(tmp_path / "patch"), "-i", "Sum the numbers", "-e", "1 2 3", "-e", "4 5 6"]
    found = CliRunner().invoke(app, ["transmute", *arguments, "--substitutes", str(tmp_path / "words.txt")])
    assert found.exit_code == 0, found.output
    drawn = tk.ThoughtPatch.from_pretrained(tmp_path / "patch").provenance["substitutes"]
    assert tokenizer.decode(drawn).replace("\n", "").split() and len(drawn) <= 5
    (tmp_path / "none.txt").write_text(" \n\n")
    for wrong, message in (
        (["--substitutes", str(tmp_path / "none.txt")], "got none in"),
        (["-e", " "], "an empty one"),
    ):
        found = CliRunner().invoke(app, ["transmute", *arguments, *wrong])
        assert found.exit_code == 2 and message in " ".join(found.output.replace("│", " ").split())
    found = CliRunner().invoke(app, ["transmute", *arguments, "--substitutes", "words"])
    assert found.exit_code == 0, found.output
    assert tk.ThoughtPatch.from_pretrained(tmp_path / "patch").provenance["substitutes"] == "words"


class Processor:
    """What a multimodal model comes with: not a tokenizer, but it holds one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def test_the_words_are_those_of_a_processors_tokenizer(tokenizer: Any) -> None:
    assert word_tokens(Processor(tokenizer)) == word_tokens(tokenizer)
    with pytest.raises(ValueError, match="tokenizer must be a fast one"):
        word_tokens(None)


def test_substitutes_are_any_integers_and_the_seed_is_one() -> None:
    assert resolved_substitutes(torch.arange(3, 6), None, 10) == (3, 4, 5)
    assert resolved_substitutes(None, None, 10) is None
    for wrong in (3, ["word"], b"ab", bytearray(b"ab"), [1.5], [True], torch.tensor([True, False])):
        with pytest.raises(TypeError, match="transmute: substitutes must be token ids, "):
            resolved_substitutes(wrong, None, 200)  # type: ignore[arg-type]
    for unfit in ("Words", "", []):
        with pytest.raises(ValueError, match="transmute: substitutes must "):
            resolved_substitutes(unfit, None, 200)
    model = tiny_gemma3(0, layer_types=["full_attention"])
    for seed in (None, "0", True):
        with pytest.raises(TypeError, match="transmute: seed must be an integer, got"):
            tk.transmute(model, tiny_tokenizer(), "sum", ["1"], seed=seed, substitutions=0)
