"""A whole call of tk.transmute on a real model, against what people do without it: ../results/whole_call.csv.

    python benchmarks/real/whole_call.py --models gemma=DIR [--task antonym] [--rounds 5]

From a prompt of demonstrations and 32 inputs without completions to something that answers without the prompt. All ways
run in turn in one process, round after round; a ratio is the median over rounds of a way's seconds to its peer's in the
same round. The file is written after every round.

- *transmute*: the default: three completions of each input, inputs that the model writes, both sites, `sequential`.
- *transmute as with hooks*: one completion of each, the attention site in two passes: what the next two ways do too.
- *two forwards with hooks per input*: model.generate, and both whole forwards, for one input after the other.
- *cached prefixes with hooks*: model.generate in batches behind a cached prefix; for the rows of each length both
  prefixes read once, no language-model head.
- *LoRA, one epoch*: distilled on the very rows that the default call writes and fits.
- *one forward*: of the default's rows with context over a cached prefix, those of each length together.
- writing alone, one completion each: ours, and model.generate behind a cached prefix and on full prompts; of the task,
  and of 32 tokens, which nothing ends, behind a prompt that is five times as long.

The ways with hooks end in this project's own sums and solve. Their patches, and what generate writes, are compared with
ours before anything is timed. *recovered* is the effect on the task's held-out inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import BATCH_SIZE, MAX_NEW_TOKENS, Measurement
from rivals import RANK
from tasks import WORD_FORMAT, names, task
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, StoppingCriteria

import thought_kernels as tk
from thought_kernels.evaluation.records.files import write_csv
from thought_kernels.evaluation.rivals.lora import BATCH, injected, optimised
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.fitting import encoding
from thought_kernels.fitting.prepared import prepared
from thought_kernels.generation.completions import ending_of
from thought_kernels.generation.continuations import Ended, continue_prompts
from thought_kernels.generation.prefix import shared_length
from thought_kernels.models import describe
from thought_kernels.models.load import load
from thought_kernels.pairing.batches import Group, prefix_blocks
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.examples import load_examples
from thought_kernels.prompts.prompt import EncodedExample

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from harness import device_name
from hooked_forwards import naive, one_forward, strong

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "whole_call.csv"
INPUTS, TOKENS = 32, MAX_NEW_TOKENS["word"]
REPEATED, LONG = 5, 32  # times the demonstrations, and tokens of an answer, where the writing alone is long
RATE = 1e-3  # of the LoRA
ALLOWED = 1e-3  # of a patch's norm: float32 forwards of two implementations, and a solve
# H's rows are left out because the ways with hooks have none.
SAME = tk.Recipe(completions=1, written_inputs=0, sites=("attention",), pairing="two_pass", header_weight=0.0)
DEFAULT, ALIKE, OURS, OURS_LONG = "transmute", "transmute as with hooks", "writing, ours", "long writing, ours"


class Stop(StoppingCriteria):
    """Ends a row where transmute would: transformers' own search for a text reads the whole vocabulary at each call."""

    def __init__(self, ended: Ended, start: int) -> None:
        self._ended, self._start = ended, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        return torch.tensor([self._ended(row[self._start :]) for row in input_ids.tolist()])


class Ways:
    """All that is timed, on one word task.

    Args:
        model, tokenizer: as loaded.
        name: of the task.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        of = task(name, seed=0)
        self.model, self._tokenizer, self.measurement = model, tokenizer, Measurement(model, tokenizer, of)
        self._instruction, self._inputs = of.instruction, [question for question, _ in of.inputs[:INPUTS]]
        self.rows, self.alike = self._rows(tk.Recipe()), self._rows(SAME)
        self._ending = ending_of(model, tokenizer, load_examples(self._inputs)[0], format=WORD_FORMAT)
        header, instruction = self.alike[0].header, self.alike[0].instruction
        self._prefix = torch.tensor(header), torch.tensor(instruction)
        self._decoder = describe(model)
        group = Group(tuple(header), tuple(instruction), (), ())
        self._blocks = [one.with_context for one in prefix_blocks(self._decoder, group, len(self._decoder.blocks) - 1)]
        asked = [row.tokens[: row.answer_start] for row in self.alike]
        self.prompts = [[*header, *instruction, *question] for question in asked]
        self.long = [[*header, *(REPEATED * instruction), *question] for question in asked]

    def _rows(self, recipe: tk.Recipe) -> list[EncodedExample]:
        """What a call fits, written anew."""
        told = encoding.Prompt(self._instruction, None, "\n", WORD_FORMAT)
        writing = encoding.Writing(recipe.completions, TOKENS, BATCH_SIZE, seed=0)
        return prepared(self.model, self._tokenizer, told, load_examples(self._inputs), recipe, writing).rows

    def transmute(self, recipe: tk.Recipe) -> ThoughtPatch:
        return tk.transmute(
            self.model, self._tokenizer, self._instruction, self._inputs, format=WORD_FORMAT, max_new_tokens=TOKENS,
            **recipe,
        )  # fmt: skip

    def hooks_per_input(self) -> ThoughtPatch:
        for prompt in self.prompts:
            self.generate([prompt])
        return self._solved(partial(naive, batch=1))

    def hooks_in_batches(self) -> ThoughtPatch:
        self.generate(self.prompts, cached=True)
        return self._solved(partial(strong, batch=BATCH_SIZE))

    def _solved(self, summed: Callable[..., Any]) -> ThoughtPatch:
        """The patch of rows whose sums another way has made, those of each length by themselves."""
        first, *others = [summed(self.model, *self._prefix, tokens) for tokens in by_length(self.alike)]
        for other in others:
            first.merge(other)
        return first.solve(SAME.estimator, ridge=SAME.ridge)

    def lora(self, measured: bool = False) -> float | None:
        """One epoch; its recovered effect where that is asked for."""
        rows = Rows.of(self._rows(tk.Recipe()), ()).read(self.model)
        with injected(self.model, rank=RANK):
            generator = torch.Generator().manual_seed(0)
            for _ in optimised(self.model, rows, steps=math.ceil(len(rows) / BATCH), rate=RATE, generator=generator):
                pass
            return self.measurement.scored()["recovered"] if measured else None

    def _until(self, prompts: Sequence[list[int]]) -> tuple[Ended, int]:
        """What ends a completion, and how many tokens it may have."""
        return ((lambda answer: False), LONG) if prompts is self.long else (self._ending.reached, TOKENS)

    def write(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Completions as transmute writes them."""
        ended, tokens = self._until(prompts)
        return continue_prompts(self.model, prompts, ended, max_new_tokens=tokens, batch_size=BATCH_SIZE)

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], cached: bool = False) -> list[list[int]]:
        """Completions by model.generate, padded on the left, or between a cached prefix, which is read first, and e."""
        ended, tokens = self._until(prompts)
        before, width = shared_length(prompts) if cached else 0, max(map(len, prompts))
        ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
        mask[:, :before] = 1
        for row, prompt in enumerate(prompts):
            ids[row, :before] = torch.tensor(prompt[:before], dtype=torch.long)
            ids[row, width - len(prompt) + before :] = torch.tensor(prompt[before:])
            mask[row, width - len(prompt) + before :] = 1
        cache = {"past_key_values": self._cache(prompts[0][:before], len(prompts))} if cached else {}
        with with_gradients(self.model.get_output_embeddings().weight):
            found = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0,
                eos_token_id=None, stopping_criteria=[Stop(ended, width)], **cache,
            )[:, width:]  # fmt: skip
        return [
            next((answer[:n] for n in range(1, len(answer)) if ended(answer[:n])), answer) for answer in found.tolist()
        ]

    def _cache(self, prefix: list[int], count: int) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model(torch.tensor([prefix]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(count)
        return cache

    def one_forward(self) -> None:
        for tokens in by_length(self.rows):
            one_forward(self._decoder, self._blocks, tokens, BATCH_SIZE)

    @torch.no_grad()
    def check(self) -> None:
        """Stops unless all ways that should agree do."""
        wanted = self.transmute(SAME)
        for name, way in (("hooks per input", self.hooks_per_input), ("hooks in batches", self.hooks_in_batches)):
            found = way()
            for key, entry in wanted.entries.items():
                truth, other = entry.dense(), found.entries[key].dense()
                assert truth is not None and other is not None
                error = float(torch.linalg.vector_norm(other - truth) / torch.linalg.vector_norm(truth))
                if not error <= ALLOWED:
                    raise SystemExit(f"whole_call: {name} is off by {error:.2g} at {key}, allowed {ALLOWED}")
        for prompts in (self.prompts, self.long):
            for cached in (False, True):
                if self.generate(prompts, cached) != self.write(prompts):
                    raise SystemExit(f"whole_call: generate, cached {cached}, must write what transmute's loop does")


@contextlib.contextmanager
def with_gradients(weight: Tensor) -> Iterator[None]:
    """A head's weight as from_pretrained leaves it: without gradients it would multiply a batch's rows one by one."""
    before = weight.requires_grad
    weight.requires_grad_(True)
    try:
        yield
    finally:
        weight.requires_grad_(before)


def by_length(rows: Sequence[EncodedExample]) -> Iterator[Tensor]:
    """The tokens of all rows, [n, T] for each length T: peers without padding need no masks."""
    lengths = sorted({len(row.tokens) for row in rows})
    return (torch.tensor([row.tokens for row in rows if len(row.tokens) == length]) for length in lengths)


def measured(ways: Ways, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """The lines of the file after each round."""
    recovered = {"LoRA, one epoch": ways.lora(measured=True)}
    for name, recipe in ((DEFAULT, tk.Recipe()), (ALIKE, SAME)):
        with ways.transmute(recipe).applied(ways.model):
            recovered[name] = ways.measurement.scored()["recovered"]
    timed: dict[str, tuple[str, Callable[[], object]]] = {
        DEFAULT: (DEFAULT, lambda: ways.transmute(tk.Recipe())),
        "one forward": (DEFAULT, ways.one_forward),
        "LoRA, one epoch": (DEFAULT, ways.lora),
        ALIKE: (ALIKE, lambda: ways.transmute(SAME)),
        "two forwards with hooks per input": (ALIKE, ways.hooks_per_input),
        "cached prefixes with hooks": (ALIKE, ways.hooks_in_batches),
    }
    for ours, prompts in ((OURS, ways.prompts), (OURS_LONG, ways.long)):
        timed[ours] = ours, partial(ways.write, prompts)
        timed[ours.replace("ours", "generate behind a cached prefix")] = ours, partial(ways.generate, prompts, True)
        timed[ours.replace("ours", "generate on full prompts")] = ours, partial(ways.generate, prompts)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, (_, way) in timed.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
        yield [told(name, peer, seconds, recovered) for name, (peer, _) in timed.items()]


def told(name: str, peer: str, seconds: dict[str, list[float]], recovered: dict[str, Any]) -> dict[str, Any]:
    """A way's line."""
    spent = seconds[name]
    return {
        "way": name, "rounds": len(spent), "seconds": statistics.median(spent), "low": min(spent), "high": max(spent),
        "peer": peer, "ratio": statistics.median(a / b for a, b in zip(spent, seconds[peer], strict=True)),
        "recovered": recovered.get(name, ""),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs=1, required=True, metavar="gemma=DIR")
    parser.add_argument("--task", default="antonym", choices=names("word"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    name, _, path = options.models[0].partition("=")
    model, tokenizer = load(path)
    ways = Ways(model, tokenizer, options.task)
    ways.check()
    for lines in measured(ways, options.rounds):
        which = {
            "model": name, "task": options.task, "prompt_tokens": len(ways.prompts[0]),
            "long_prompt_tokens": len(ways.long[0]), "rows": len(ways.rows),
            "tokens": sum(len(row.tokens) for row in ways.rows),
        }  # fmt: skip
        ran = {
            "device": device_name("cpu"), "threads": torch.get_num_threads(),
            "torch": version("torch"), "transformers": version("transformers"),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        shown = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines]
        write_csv([{**which, **line, **ran} for line in shown], options.output)
    for line in shown:
        print(f"{line['way']:44} {line['seconds']:>8} s  {line['ratio']:>7} x {line['peer']}  {line['recovered']}")


if __name__ == "__main__":
    main()
