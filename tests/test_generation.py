"""Batched generation behind a shared prefix against transformers' own generate, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_multimodal_gemma3, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from thought_kernels.generation.completions import Ending, complete, ending_of
from thought_kernels.generation.continuations import continue_prompts
from thought_kernels.prompts.prompt import load_examples

TOKENIZER = tiny_tokenizer()
VOCABULARY = len(TOKENIZER)
NEW = 9


def randomised(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
MODELS: dict[str, Any] = {
    "gemma3": lambda: tiny_gemma3(1, vocab_size=VOCABULARY),
    "gemma3 sdpa": lambda: tiny_gemma3(1, vocab_size=VOCABULARY, attention="sdpa", sliding_window=16),
    "gemma3 float64": lambda: tiny_gemma3(1, torch.float64, vocab_size=VOCABULARY),
    "multimodal": lambda: tiny_multimodal_gemma3(1),
    "llama": lambda: randomised(
        LlamaForCausalLM(LlamaConfig(**SIZES, **IDS, num_hidden_layers=2, num_key_value_heads=2))
    ),
    "mistral": lambda: randomised(
        MistralForCausalLM(MistralConfig(**SIZES, **IDS, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6))
    ),
    "gpt2": lambda: randomised(
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS))
    ),
}


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(6, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Any, prompt: list[int], count: int = NEW) -> list[int]:
    """What transformers writes after one prompt, so many tokens whatever they are."""
    row = torch.tensor([prompt])
    out = model.generate(
        input_ids=row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=count, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shared", [0, 1, 11])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_generate_one_by_one(name: str, shared: int) -> None:
    model = MODELS[name]()
    prefix = ids(0, shared)
    prompts = [[*prefix, *ids(seed, length)] for seed, length in ((1, 3), (2, 7), (3, 1), (4, 3))]
    wanted = [alone(model, prompt) for prompt in prompts]
    for batch_size in (1, 3, 8):
        assert complete(
            model, prompts, ending=Ending((), "", TOKENIZER), max_new_tokens=NEW, batch_size=batch_size
        ) == wanted  # fmt: skip
    assert len({tuple(row) for row in wanted}) == len(wanted)  # rows that differ, so that a mixed-up one would show


def test_a_prompt_that_others_begin_with_still_says_what_comes_first() -> None:
    model = MODELS["llama"]()
    prompts = [ids(0, 5), ids(0, 9), ids(0, 5)]
    found = complete(model, prompts, ending=Ending((), "", TOKENIZER), max_new_tokens=NEW, batch_size=8)
    assert found == [alone(model, prompt) for prompt in prompts]


def test_the_shared_prefix_is_run_once() -> None:
    model = MODELS["llama"]()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, __, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    prompts = [[*ids(0, 11), *ids(seed, 3)] for seed in range(1, 6)]
    complete(model, prompts, ending=Ending((), "", TOKENIZER), max_new_tokens=2, batch_size=3)
    assert shapes == [(1, 11), (3, 3), (3, 1), (2, 3), (2, 1)]


@pytest.mark.parametrize("shared", [0, 11])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_done_are_dropped(name: str, shared: int) -> None:
    model = MODELS[name]()
    candidates = ([*ids(0, shared), *ids(seed, 3)] for seed in range(1, 30))
    by_first = {alone(model, prompt, 1)[0]: prompt for prompt in candidates}  # no row is the beginning of another
    prompts = list(by_first.values())[:6]
    wanted = [alone(model, prompt, 2 + 2 * place) for place, prompt in enumerate(prompts)]
    heights: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, options: heights.append(options["input_ids"].shape[0]), with_kwargs=True
    )
    found = continue_prompts(model, prompts, lambda answer: list(answer) in wanted, max_new_tokens=20, batch_size=8)
    assert found == wanted
    assert max(heights) == len(prompts) > 3
    assert heights[-1] == 1


@pytest.mark.parametrize("shared", [0, 11])
def test_an_answer_ends_with_the_token_that_completes_the_stop_text(shared: int) -> None:
    model = MODELS["llama"]()
    prompts = [[*ids(0, shared), *ids(seed, 4)] for seed in range(1, 5)]
    free = [alone(model, prompt) for prompt in prompts]
    text = TOKENIZER.decode(free[0])[2:4]  # two characters, which are two tokens here
    found = complete(model, prompts, ending=Ending((), text, TOKENIZER), max_new_tokens=NEW, batch_size=8)
    for answer, whole in zip(found, free, strict=True):
        first = next((n for n in range(1, NEW + 1) if text in TOKENIZER.decode(whole[:n])), NEW)
        assert answer == whole[:first]
    assert len(found[0]) == 4 and max(map(len, found)) == NEW
    assert Ending((), text, TOKENIZER).texts(found)[0] == TOKENIZER.decode(free[0])[:2].strip()


def test_a_token_may_hold_more_than_the_stop_text() -> None:
    tokenizer = tiny_tokenizer(((".", "\n"),))
    ending = ending_of(MODELS["llama"](), tokenizer, load_examples(["1"])[0], format="{prompt} -> {completion}\n")
    both = tokenizer.convert_tokens_to_ids(".\n")
    assert (ending.ids, ending.text) == ((1,), "\n")
    assert ending.reached([7, both]) and not ending.reached([7]) and ending.reached([7, 1])
    assert ending.texts([[tokenizer.convert_tokens_to_ids("7"), both]]) == ["7."]


def test_chats_end_with_a_special_token_and_formats_without_a_text_with_eos() -> None:
    model, chat = MODELS["gpt2"](), load_examples(["1"])[0]
    end = TOKENIZER.convert_tokens_to_ids("<end_of_turn>")
    found = ending_of(model, TOKENIZER, chat)
    assert (found.ids, found.text) == ((1, end), "")
    model.generation_config.eos_token_id = [3]
    found = ending_of(model, TOKENIZER, chat, format="{prompt}={completion}")
    assert (found.ids, found.text) == ((1, 3), "")
    bare = tiny_tokenizer(template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}")
    assert ending_of(model, bare, chat).text == "\n\n"
    spaced = tiny_tokenizer(template="{% for m in messages %}{{ m['content'] + '  ' }}{% endfor %}")
    assert (ending_of(model, spaced, chat).ids, ending_of(model, spaced, chat).text) == ((3,), "")


def test_drawn_tokens_follow_the_models_distribution_whatever_batch_they_are_in() -> None:
    model, prompt = MODELS["llama"](), ids(1, 4)
    shares = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
    count = 1500
    draw = [
        continue_prompts(model, [prompt] * count, lambda _: True, max_new_tokens=1, batch_size=size, seeds=range(count))
        for size in (count, 400)
    ]
    assert draw[0] == draw[1]
    found = torch.bincount(torch.tensor(draw[0])[:, 0], minlength=VOCABULARY).double() / count
    # Each frequency has variance p (1 − p) / count; five deviations leave all of them but once in 30,000 draws.
    assert bool(((found - shares).abs() <= 5 * (shares * (1 - shares) / count).sqrt() + 1 / count).all())
    assert shares.max() < 0.9  # or the likeliest token alone would pass


@pytest.mark.parametrize("shared", [0, 11])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_end_where_the_models_context_does(name: str, shared: int) -> None:
    """A longer row beside it cuts none short, and asks for no position that is not there."""
    model = MODELS[name]()
    limit = 40
    model.config.max_position_embeddings = limit
    if name == "gpt2":
        model.transformer.wpe = torch.nn.Embedding.from_pretrained(model.transformer.wpe.weight[:limit])
    prefix = ids(0, shared)
    prompts = [[*prefix, *ids(seed, length - shared)] for seed, length in ((1, 12), (2, 38), (3, 33), (4, 39))]
    ending = Ending((), "", TOKENIZER)
    for batch_size in (1, 8):
        found = complete(model, prompts, ending=ending, max_new_tokens=NEW, batch_size=batch_size)
        assert list(map(len, found)) == [NEW, 2, 7, 1]
        assert found == [alone(model, prompt, len(row)) for prompt, row in zip(prompts, found, strict=True)]
    with pytest.raises(ValueError, match=r"prompts\[1\] must be shorter than the model's context of 40 tokens, got 40"):
        complete(model, [ids(1, 3), ids(2, 40)], ending=ending, max_new_tokens=NEW, batch_size=8)


def test_greedy_and_drawn_rows_share_a_batch() -> None:
    model, prompts = MODELS["gpt2"](), [ids(1, 3), ids(1, 3), ids(2, 6)]
    seeds = [None, 5, None]
    found = continue_prompts(model, prompts, lambda _: False, max_new_tokens=NEW, batch_size=8, seeds=seeds)
    assert [found[0], found[2]] == [alone(model, prompts[0]), alone(model, prompts[2])]
    assert found[1] != found[0]


def test_a_token_without_an_embedding_is_refused() -> None:
    model = MODELS["llama"]()
    with pytest.raises(ValueError, match=rf"^complete: prompts\[1\] must be of tokens .* ids below {VOCABULARY}, got"):
        complete(model, [[5], [5, VOCABULARY]], ending=Ending((1,), "", TOKENIZER), max_new_tokens=2, batch_size=2)
