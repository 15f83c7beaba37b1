"""Patches beside quantised weights, and beside the float32 weights of the same model; writes results/quantised.csv.

    pip install torchao bitsandbytes
    python benchmarks/real/quantised.py smol=smollm2-135m-instruct:french --inputs 8 --held-out 8

The argument is a name for the rows, the model (benchmarks/real/pretrained.py fetches it, or a folder of float32
weights) and a task. transformers quantises the linear modules as it loads them. `recovered` is
1 − Σ KL(prompted ‖ patched) / Σ KL(prompted ‖ bare) of one quantised model, for the patch that was fitted to it, and
for the one that was fitted to the float32 weights. `kl_quantised` is how far quantising alone moves the prompted model
from the float32 one, in nats a token.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pretrained
import torch
from measure import MAX_NEW_TOKENS
from tasks import WORD_FORMAT, Task, task
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import thought_kernels as tk
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.generation.logprobs import completion_logprobs, divergence

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
from harness import device_name

OUTPUT = Path(__file__).parents[1] / "results" / "quantised.csv"
BATCH_SIZE = 8


def _torchao(name: str, **options: Any) -> Any:
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)(**options))


def _torchao_four_bits() -> Any:
    from torchao.quantization.granularity import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))


WEIGHTS: dict[str, Callable[[], Any]] = {
    "float32": lambda: None,
    "torchao, 8 bits": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao, 4 bits": _torchao_four_bits,
    "bitsandbytes, 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, 4 bits": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def measured(folder: Path, of: Task, inputs: int, held_out: int) -> Iterator[dict[str, Any]]:
    """A row for each kind of weights, the float32 ones first."""
    plain, tokenizer = tk.load(folder)
    told: dict[str, Any] = {"format": WORD_FORMAT} if of.kind == "word" else {}
    told |= {"max_new_tokens": MAX_NEW_TOKENS[of.kind], "batch_size": BATCH_SIZE}
    asked = [question for question, _ in of.inputs[:inputs]]
    questions = [question for question, _ in of.held_out[:held_out]]
    first: Any = None
    for name, quantisation in WEIGHTS.items():
        start, model = time.monotonic(), plain
        if name != "float32":
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, quantization_config=quantisation(), local_files_only=True
            ).eval()
        patch = tk.transmute(model, tokenizer, of.instruction, asked, written_inputs=0, completions=1, **told)
        trial = Trial(model, tokenizer, of.instruction, questions, None, **told)
        first = first or (patch, trial)
        found = {}
        for which, one in (("recovered", patch), ("recovered_float32_patch", first[0])):
            with one.applied(model):
                found[which] = round(trial.effect(model).recovered, 4)
        # All read the answers of the float32 model, so that they are asked the same.
        prompts, written = first[1].prompts, first[1].written
        rows = completion_logprobs(model, prompts, written, batch_size=BATCH_SIZE)
        apart = torch.cat(divergence(first[1].prompted_logprobs, rows))
        yield {
            "weights": name, **found, "kl_quantised": round(float(apart.mean()), 5), "tokens": len(apart),
            "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", help="NAME=MODEL:TASK")
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each product that it casts to float16
    warnings.filterwarnings("ignore", "transmute: .* completions did not end")  # and were cut, as held-out ones
    name, _, rest = arguments.subject.partition("=")
    model, _, what = rest.rpartition(":")
    of = task(what, seed=0, inputs=max(arguments.inputs, arguments.held_out))
    folder = Path(model) if Path(model).is_dir() else pretrained.folder(model)
    packages = "; ".join(f"{package} {version(package)}" for package in ("transformers", "torchao", "bitsandbytes"))
    rows = []
    for row in measured(folder, of, arguments.inputs, arguments.held_out):
        print(row, flush=True)
        rows.append({
            "model": name, "task": what, "inputs": arguments.inputs, "held_out": arguments.held_out, **row,
            "device": device_name("cpu"), "versions": packages, "date": datetime.date.today().isoformat(),
        })  # fmt: skip
    partial = arguments.output.with_name(f".{arguments.output.name}")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(arguments.output)


if __name__ == "__main__":
    main()
