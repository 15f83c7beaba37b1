"""A patch in llama.cpp, as a GGUF LoRA adapter on the GGUF file that it was fitted for; writes results/serving.csv.

    pip install xllamacpp
    python benchmarks/real/serving.py smol=smollm2-135m-instruct:french gemma=gemma-3-270m:singular-plural

Each argument is a name for the row, the model (benchmarks/real/pretrained.py fetches it, or a .gguf file) and a task.
llama.cpp is asked the same prompts as transformers and reads the same answers, bare, prompted and patched. What the two
make of the bare model differs too, since llama.cpp rounds activations to 8 bits before it multiplies quantised weights:
no adapter can agree better than that. `recovered` is 1 − Σ KL(prompted ‖ patched) / Σ KL(prompted ‖ bare), each within
one engine. A subject that stands in the results is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pretrained
import torch
from llama_runner import LlamaCpp
from measure import MAX_NEW_TOKENS
from tasks import WORD_FORMAT, Task, task
from torch import Tensor

import thought_kernels as tk
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.generation.logprobs import completion_logprobs
from thought_kernels.patches.patch import ThoughtPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
from harness import device_name

OUTPUT = Path(__file__).parents[1] / "results" / "serving.csv"
RANKS = (None, 64, 16)
BATCH_SIZE = 8

Read = Callable[[list[list[int]]], list[Tensor]]  # log-probabilities at each token of the trial's answers


class Comparison:
    """One patch and one trial in both engines.

    Args:
        model: of the GGUF file, in transformers.
        file: the GGUF file.
        trial: the instruction on inputs that no fit has seen.
    """

    def __init__(self, model: Any, file: Path, trial: Trial) -> None:
        self._model, self._file, self._trial = model, file, trial
        self._ours = {"prompted": self._read(trial.prompts), "bare": self._read(trial.bare_prompts)}
        self._context = max(map(len, trial.prompts)) + max(map(len, trial.written)) + 1
        with LlamaCpp(file, context=self._context) as served:
            self._theirs = {
                "prompted": self._served(served, trial.prompts), "bare": self._served(served, trial.bare_prompts),
            }  # fmt: skip

    def rows(self, patch: ThoughtPatch) -> Iterator[dict[str, Any]]:
        """A row for each rank that the patch is exported with."""
        with tempfile.TemporaryDirectory() as folder:
            for rank in RANKS:
                written = patch.export_gguf_lora(Path(folder) / "adapter.gguf", self._model, rank=rank)
                with ThoughtPatch(written.entries, patch.provenance).applied(self._model):
                    ours = self._read(self._trial.bare_prompts)
                with LlamaCpp(self._file, lora=written.file, context=self._context) as served:
                    theirs = self._served(served, self._trial.bare_prompts)
                yield {
                    "rank": "full" if rank is None else rank, "largest_rank": written.rank,
                    "mib": round(written.file.stat().st_size / 2**20, 2), "tokens": sum(map(len, ours)),
                    "recovered": _recovered(self._ours, ours), "recovered_llama_cpp": _recovered(self._theirs, theirs),
                    "kl_bare": _divergence(self._ours["bare"], self._theirs["bare"]),
                    "kl_prompted": _divergence(self._ours["prompted"], self._theirs["prompted"]),
                    "kl_patched": _divergence(ours, theirs),
                    "kl_effect": _divergence(ours, self._ours["bare"]),
                    "same_token_bare": _agreement(self._ours["bare"], self._theirs["bare"]),
                    "same_token_patched": _agreement(ours, theirs),
                }  # fmt: skip

    def _read(self, prompts: list[list[int]]) -> list[Tensor]:
        rows = completion_logprobs(self._model, prompts, self._trial.written, batch_size=BATCH_SIZE)
        return [row.clone() for row in rows]

    def _served(self, served: LlamaCpp, prompts: list[list[int]]) -> list[Tensor]:
        pairs = zip(prompts, self._trial.written, strict=True)
        return [served.logprobs(prompt, answer).float() for prompt, answer in pairs]


def _divergence(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Mean of KL(wanted ‖ found) over tokens, nats."""
    return round(_sum(wanted, found) / sum(map(len, wanted)), 5)


def _sum(wanted: list[Tensor], found: list[Tensor]) -> float:
    pairs = zip(wanted, found, strict=True)
    return float(sum((a.double().exp() * (a.double() - b.double())).sum() for a, b in pairs))


def _recovered(engine: dict[str, list[Tensor]], patched: list[Tensor]) -> float:
    return round(1 - _sum(engine["prompted"], patched) / _sum(engine["prompted"], engine["bare"]), 4)


def _agreement(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Share of tokens at which both would write the same."""
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs, strict=True)])
    return round(float(same.double().mean()), 4)


def measured(name: str, model_name: str, of: Task, inputs: int, held_out: int) -> Iterator[dict[str, Any]]:
    """A row for each rank, of one model and one task."""
    file = Path(model_name) if model_name.endswith(".gguf") else pretrained.gguf(model_name)
    model, tokenizer = tk.load(file)
    told = {"format": WORD_FORMAT} if of.kind == "word" else {}
    most = MAX_NEW_TOKENS[of.kind]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "transmute: .* completions did not end")  # and were cut, as held-out ones
        patch = tk.transmute(
            model, tokenizer, of.instruction, [question for question, _ in of.inputs[:inputs]], max_new_tokens=most,
            written_inputs=0, completions=1, batch_size=BATCH_SIZE, **told,
        )  # fmt: skip
    questions = [question for question, _ in of.held_out[:held_out]]
    trial = Trial(
        model, tokenizer, of.instruction, questions, None, batch_size=BATCH_SIZE, max_new_tokens=most,
        divergences=False, **told,
    )  # fmt: skip
    common = {"model": name, "task": of.name, "inputs": inputs, "held_out": held_out}
    packages = f"llama.cpp of xllamacpp {version('xllamacpp')}; transformers {version('transformers')}"
    for row in Comparison(model, file, trial).rows(patch):
        yield {
            **common, **row, "device": device_name("cpu"), "versions": packages,
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", help="NAME=MODEL:TASK")
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    rows = _read(arguments.output)
    for subject in arguments.subjects:
        name, _, rest = subject.partition("=")
        model, _, what = rest.rpartition(":")
        wanted = {"model": name, "task": what, "inputs": str(arguments.inputs), "held_out": str(arguments.held_out)}
        if any(wanted.items() <= row.items() for row in rows):
            print(f"{subject} stands in {arguments.output} already; delete its rows to measure it again")
            continue
        of = task(what, seed=0, inputs=max(arguments.inputs, arguments.held_out))
        found = list(measured(name, model, of, arguments.inputs, arguments.held_out))
        rows = [row for row in rows if (row["model"], row["task"]) != (name, what)] + found
        _write(arguments.output, rows)
        print(*found, sep="\n", flush=True)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Complete under a temporary name before it takes the old one's place."""
    partial = path.with_name(f".{path.name}")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


if __name__ == "__main__":
    main()
