"""A patch under lm-evaluation-harness, as a LoRA beside the untouched model, in a task file of one's own.

    pip install lm_eval peft
    python examples/lm_eval_patch.py --output sum-lora

The harness loads the LoRA folder itself (`--model_args pretrained=MODEL,peft=FOLDER`) and knows nothing of patches. It
is run twice on lm_eval_sum.yaml beside this file, without the patch and with it; it prints its table each time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.demo.tasks import TASKS

HERE = Path(__file__).parent
ROWS = 16


def main() -> None:
    """Makes the LoRA and has the harness evaluate the model without it and with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = tk.load(CHECKPOINT)
    inputs = [f"{a} {b} {a * b % 10}" for a in range(4, 8) for b in range(8)]
    patch = tk.transmute(model, tokenizer, TASKS["sum"].instruction, inputs)
    patch.export_peft(options.output, model)
    for peft in ("", f",peft={options.output}"):
        subprocess.run([
            sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={CHECKPOINT}{peft}",
            "--tasks", "sum", "--include_path", str(HERE), "--apply_chat_template", "--device", "cpu",
            "--batch_size", str(ROWS),
        ], check=True)  # fmt: skip


def rows(**_: object) -> dict[str, Any]:
    """The task's rows: inputs that the patch was not made from, with the right answers."""
    from datasets import Dataset  # which the harness needs, and this package does not

    questions = [f"{a} {b} {(3 * a + b) % 4}" for a in range(4) for b in range(ROWS // 4)]
    answers = [TASKS["sum"].answer(question) for question in questions]
    return {"test": Dataset.from_dict({"question": questions, "answer": answers})}


if __name__ == "__main__":
    main()
