"""One patch by several processes, each with a share of the examples or of the model: on GPUs of a machine, or of many.

    torchrun --nproc-per-node 2 examples/many_processes.py --output sum-patch
    torchrun --nproc-per-node 8 examples/many_processes.py --model DIR --instruction TEXT --examples FILE --output DIR
    torchrun --nproc-per-node 8 examples/many_processes.py --divide-model --model DIR ...

Each process reads the model and all the examples. They share the writing of completions and the rows, and add up their
sums, so that every one of them ends with the patch. With --divide-model, for a model that is too large for one device,
transformers' tensor parallelism gives each process a part of every weight, and all work on every example together.
Stopped, by whatever it is, the same command goes on where all of them were.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT


def main() -> None:
    """Makes the patch and saves it once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=CHECKPOINT)
    parser.add_argument("--instruction", default="Sum the numbers")
    parser.add_argument("--examples", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--divide-model", action="store_true")
    options = parser.parse_args()
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    if options.divide_model:
        parallel = DistributedConfig(tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(options.model, distributed_config=parallel, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer = tk.load(options.model, device=device)
    inputs = options.examples or [f"{a} {b} {a * b % 10}" for a in range(4, 8) for b in range(8)]
    kept = options.output.with_name(f"{options.output.name}.checkpoint")
    first = dist.get_rank() == 0
    patch = tk.transmute(
        model, tokenizer, options.instruction, inputs, distributed=not options.divide_model, checkpoint=kept,
        progress=first,
    )  # fmt: skip
    dist.barrier()  # all have it: what was kept is needed no more once it is saved
    if first:
        patch.save_pretrained(options.output)
        shutil.rmtree(kept)
        print(patch)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
