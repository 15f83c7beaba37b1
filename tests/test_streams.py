"""What a pairing holds and touches on the way: memory, spilled hidden states, passes over rows, bad activations."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tolerances import SOLVED
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import thought_kernels as tk
from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.models import describe
from thought_kernels.ops import library
from thought_kernels.pairing import spill, streams
from thought_kernels.pairing.batches import group_examples
from thought_kernels.pairing.pairings import PAIRINGS, Run
from thought_kernels.patches.site import SITES
from thought_kernels.prompts.prompt import EncodedExample, encode, load_examples

TOKENIZER = tiny_tokenizer()
INSTRUCTION = "Sum now"
EXAMPLES = [
    {"prompt": "8 7", "completion": "8 + 7"},
    {"prompt": "abc", "completion": "c"},
    {"prompt": "12 4 9", "completion": "12, 4, 9"},  # the longest, so in the last batch; 9 is nowhere else
]
ALL = sorted(PAIRINGS)


def model_of(seed: int = 0, **changes: object) -> Any:
    return tiny_gemma3(seed, torch.float64, vocab_size=len(TOKENIZER), **changes)


def run_of(model: Any, examples: list[EncodedExample], sites: tuple[str, ...], **options: Any) -> Run:
    """A run over batches of one example, each with sums of its own."""
    accumulator = ThoughtAccumulator(dtype=torch.float64)
    return Run(
        decoder=describe(model), groups=group_examples(examples, 1, "all", torch.float64), layers=frozenset(range(3)),
        sites=frozenset(sites), accumulator=accumulator, header_weight=0.0, tick=lambda: None,
        solve=lambda layers, sites: accumulator.solve("ridge", layers=layers, sites=sites), **options,
    )  # fmt: skip


def encoded(examples: list[Any] = EXAMPLES) -> list[EncodedExample]:
    return [encode(TOKENIZER, INSTRUCTION, example) for example in load_examples(examples)]


def run(pairing: str, task: Run) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        PAIRINGS[pairing](task)
    return task.accumulator.state_dict()["sums"]


@pytest.mark.parametrize("sites", [("attention",), SITES], ids="+".join)
def test_spilled_hidden_states_give_the_same_bits_and_leave_no_file(
    sites: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, sizes = model_of(1), []
    map_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: sizes.append(k["size"]) or map_file(*a, **k))
    options = {"sites": sites, "pairing": "sequential", "batch_size": 1}
    held = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, **options)
    assert not sizes
    tokens = sorted(len(example.tokens) for example in encoded())
    one = 2 * tokens[0] * 36 * 8  # bytes of the first batch: two streams of the hidden size in float64
    for budget, spilled in ((1, tokens), (one, tokens[1:])):
        patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, memory_budget=budget, **options)
        assert sizes.pop() >= 2 * sum(spilled) * 36 * 8 and not sizes
        for key, entry in held.entries.items():
            for name, tensor in entry.tensors().items():
                assert torch.equal(patch.entries[key].tensors()[name], tensor)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pairing", ALL)
def test_an_error_leaves_no_file(pairing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = model_of(1)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, pairing=pairing, memory_budget=1)
    monkeypatch.setattr(torch, "from_file", lambda *_, **__: 1 / 0)
    if pairing == "sequential":
        with pytest.raises(ZeroDivisionError):
            tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, pairing=pairing, memory_budget=1)
    assert not list(tmp_path.iterdir())


def test_buffers_fill_memory_first_and_overlap_nowhere() -> None:
    shapes = [(2, 3), (5, 1), (4,), (1, 7)]
    found = spill.buffers(shapes, torch.float16, torch.device("cpu"), 22)
    for number, (shape, tensor) in enumerate(zip(shapes, found, strict=True)):
        assert tensor.shape == shape and tensor.dtype == torch.float16
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in found] == [[0], [1], [2], [3]]
    storages = [tensor.untyped_storage().data_ptr() for tensor in found]
    assert storages[2] == storages[3] and len(set(storages)) == 3


def test_memory_budget_must_be_a_number_of_bytes() -> None:
    with pytest.raises(ValueError, match="transmute: memory_budget must be at least 1, got 0"):
        tk.transmute(model_of(), TOKENIZER, INSTRUCTION, EXAMPLES, memory_budget=0)
    with pytest.raises(TypeError, match="transmute: memory_budget must be an integer"):
        tk.transmute(model_of(), TOKENIZER, INSTRUCTION, EXAMPLES, memory_budget="2G")


def peak(work: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once during the work, beyond those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    alive = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    assert most > 0
    return most


@pytest.mark.parametrize("pairing", ALL)
def test_memory_does_not_grow_with_the_examples(pairing: str) -> None:
    """But for the streams that sequential keeps at one boundary, two of the hidden size, and the attention's output
    without context at one block. Rows are kept too, but no more than the activation is wide, which is fewer than the
    fewest here."""
    model, (example, *_) = model_of(2), encoded()
    run(pairing, run_of(model, [example], ("attention",)))  # loads what is loaded once
    few, many = (peak(lambda n=n: run(pairing, run_of(model, [example] * n, ("attention",)))) for n in (4, 14))
    batches = 10 * len(example.tokens) * (8 + 8 + 8)  # ids, weights and a few numbers of each batch itself
    width = 2 * 36 + describe(model).blocks[0].attention_width
    streams_kept = 10 * len(example.tokens) * width * 8 if pairing == "sequential" else 0
    assert streams_kept <= many - few + batches <= streams_kept + 3 * batches


class Passes(TorchDispatchMode):
    """Operators that read what paired_attention wrote, up to and with accumulate; views are no passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._watched: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, watched = func.name(), {tensor.untyped_storage().data_ptr() for tensor in self._watched}

        def among(values: Any) -> bool:
            found = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
            return any(tensor.untyped_storage().data_ptr() in watched for tensor in found)

        if name.startswith("thought_kernels::paired_attention"):
            self._watched = list(out)
        elif among((args, kwargs)) and (func._schema.is_mutable or not among(out)):
            self.seen.append(name)
            if name.startswith("thought_kernels::accumulate"):
                self._watched = []
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_from_attention_into_the_sums_untouched(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read of δ and one of a to look for NaN, and nothing else: no copy, no cast, no transposition. (Where a batch
    has as many rows as the activation is wide; fewer are copied once, without the padding, and kept.)"""
    monkeypatch.setattr(library, "dispatched", lambda *_: False)  # the mode would hide what an operator does inside
    assert tk.available_backends("paired_attention", "cpu")["cpp"] is None, "the kernels' calls are told by their names"
    task = run_of(model_of(3).to(dtype), encoded(), ("attention",))
    looked = ["aten::aminmax", "aten::aminmax"]
    for batch_size, reads, times in (
        (3, [*looked, "thought_kernels::accumulate_cpp"], 3),
        (1, [*looked, "aten::index.Tensor", "aten::index.Tensor"], 1),
    ):
        task.groups = group_examples(encoded(), batch_size, "all", torch.float64)
        task.accumulator = ThoughtAccumulator()
        with Passes() as passes:
            run("layerwise", task)
        assert passes.seen[: times * len(reads)] == reads * times
        assert len(passes.seen) == len(reads) * times or batch_size == 1  # where δ stays to form the block's output


def test_a_few_rows_at_a_time_through_the_mlp_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    for pairing in ALL:
        whole, parts = (run_of(model_of(4), encoded(), SITES) for _ in range(2))
        for task in (whole, parts):
            task.groups = group_examples(encoded(), 3, "all", torch.float64)
        expected = run(pairing, whole)
        with monkeypatch.context() as patched:
            patched.setattr(streams, "MLP_ROWS", {"cpu": 1})
            found = run(pairing, parts)
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max() <= SOLVED * tensor.abs().max()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("pairing", ALL)
def test_nan_names_block_and_example_and_spares_the_sums(pairing: str, site: str) -> None:
    model = model_of(5)
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENIZER.convert_tokens_to_ids("9")] = torch.nan
    good = run_of(model, encoded(EXAMPLES[:2]), (site,))
    wanted = run(pairing, good)
    bad = run_of(model, encoded(), (site,))
    named = rf"of examples\[2\]; block 0, site '{site}'"
    with pytest.raises(ValueError, match="transmute: activations must be finite, got NaN or an infinity in .*" + named):
        run(pairing, bad)
    held = bad.accumulator.state_dict()["sums"]
    assert held and all(torch.equal(wanted[name], tensor) for name, tensor in held.items())
    assert set(held) == {name for name in wanted if pairing != "sequential" or name.startswith("0.")}


@pytest.mark.parametrize("pairing", ALL)
def test_an_overflow_on_the_way_names_the_block_it_arose_in(pairing: str) -> None:
    """In a block that is not targeted, at one example of a padded batch, found before its neighbours read it."""
    model = model_of(5)
    nine = TOKENIZER.convert_tokens_to_ids("9")
    model.model.embed_tokens.weight[nine, 0] = 1e3
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)

    def overflow(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[marked(args[0])] = torch.inf
        return out

    largest_u = describe(model).blocks[0].mlp_input(*2 * (describe(model).embed(torch.tensor([[nine]])),)).abs().max()

    def marked(u: torch.Tensor) -> torch.Tensor:
        return u.abs().amax(-1) >= 0.9 * largest_u

    model.model.layers[0].mlp.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=r"the block's output for examples\[2\]; block 0\."):
        tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, pairing=pairing, layers=[2], sites=("attention",))


def test_nan_in_padding_is_no_error() -> None:
    model = model_of(6)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.nan  # id 0 pads
    assert tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, batch_size=3).layers == (0, 1, 2)


def test_examples_keep_their_place_in_the_users_list() -> None:
    listed = [
        example._replace(place=f"examples[{number}]") for number, example in zip((7, 4, 1), encoded(), strict=True)
    ]
    for given, order in ((listed, (4, 7, 1)), (encoded(), (1, 0, 2))):  # by length
        (batch,) = group_examples(given, 8, "all", torch.float64)[0].batches
        assert batch.examples == tuple(f"examples[{number}]" for number in order)
    model = model_of(5)
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENIZER.convert_tokens_to_ids("9")] = torch.nan
    examples = [EXAMPLES[0], EXAMPLES[1], EXAMPLES[0], EXAMPLES[2], EXAMPLES[1], EXAMPLES[0]]
    with pytest.raises(ValueError, match=r"examples\[3\]; block 0"):
        tk.transmute(model, TOKENIZER, INSTRUCTION, examples, layers=[0])


@pytest.mark.parametrize("sites", [("attention",), ("attention", "down"), SITES], ids="+".join)
def test_sequential_runs_each_stream_through_each_block_once(sites: tuple[str, ...]) -> None:
    """Whatever the sites, and without the padding: the rows that projections and MLPs were given tell."""
    model, rows = model_of(5), encoded()
    task = run_of(model, rows, sites)
    task.groups = group_examples(rows, 3, "all", torch.float64)
    counted = {"q_proj": [0, 0, 0], "mlp": [0, 0, 0]}

    def count(module: Any, args: tuple[torch.Tensor, ...], *, name: str, index: int) -> None:
        counted[name][index] += args[0].shape[:-1].numel()

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(partial(count, name="q_proj", index=index))
        layer.mlp.register_forward_pre_hook(partial(count, name="mlp", index=index))
    run("sequential", task)
    streams, before = 2 * sum(len(row.tokens) for row in rows), len(task.groups[0].without_prefix)
    last = streams if "down" in sites else 0  # the last block's output is nothing that anyone reads
    assert counted == {"q_proj": [streams + before] * 3, "mlp": [streams + before] * 2 + [last]}
