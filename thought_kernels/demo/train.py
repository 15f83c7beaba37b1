"""Trains the shipped model: `python -m thought_kernels.demo.train --output DIR`.

Next-token loss on the answer tokens, nothing else: training knows nothing of patches. One sequence in six has no
instruction, and its answer is the input. Held-out inputs (tasks.held_out) are never sampled. Settings, time and final
figures go to training.json beside the weights. `--start DIR` goes on from a trained folder with a fresh optimizer and
schedule, and keeps that folder's record under "earlier".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from .tasks import RESERVED_FOR_FINAL_STUDY, TASKS, Task, held_out, inputs
from .tokenizer import build_tokenizer

SHAPES = {
    "main": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32},
    "small": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 6,
              "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip
# The slow tasks get a larger share of the batches; the rest share equally.
SHARE = {"multiply": 4.0, "sum": 2.0, "translate": 2.0, "sort": 1.5, "sort_down": 1.5}
BARE_SHARE = 1 / 6


def build_model(tokenizer: PreTrainedTokenizerFast, shape: str) -> Gemma3ForCausalLM:
    """A randomly initialised Gemma 3 of one of SHAPES, every third block with full attention."""
    layers = SHAPES[shape]["num_hidden_layers"]
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), **SHAPES[shape], query_pre_attn_scalar=SHAPES[shape]["head_dim"],
        max_position_embeddings=512, sliding_window=64,
        layer_types=["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(layers)],
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def chat(instruction: str, text: str, answer: str) -> tuple[str, str]:
    """The rendered prompt and completion; equal to the chat template's, which a test asserts."""
    content = f"{instruction}\n{text}" if instruction else text
    return (
        f"<bos><start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
        f"{answer}<end_of_turn>",
    )


def sample_batch(
    tokenizer: PreTrainedTokenizerFast, pool: dict[str, list[str]], size: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [size, T] and labels [size, T], -100 on everything but the answers."""
    names = list(TASKS)
    weights = [SHARE.get(name, 1.0) for name in names]
    pairs = []
    for name in rng.choices(names, weights, k=size):
        task, text = TASKS[name], rng.choice(pool[name])
        bare = rng.random() < BARE_SHARE
        pairs.append(chat("" if bare else rng.choice(task.wordings), text, text if bare else task.answer(text)))
    prompts = tokenizer([p for p, _ in pairs], add_special_tokens=False).input_ids
    answers = tokenizer([a for _, a in pairs], add_special_tokens=False).input_ids
    # Lengths in steps of eight keep the number of shapes small.
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    length = -(-length // 8) * 8
    ids = torch.full((size, length), tokenizer.pad_token_id)
    labels = torch.full((size, length), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


@torch.no_grad()
def accuracy(
    model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, wording: str, texts: list[str]
) -> float:
    """Share of texts whose greedy completion is the answer exactly; an empty wording asks for the bare repetition."""
    answers = [task.answer(text) if wording else text for text in texts]
    prompts = [chat(wording, text, "")[0] for text in texts]
    batch = tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    longest = max(len(ids) for ids in tokenizer(answers, add_special_tokens=False).input_ids) + 1
    out = model.generate(**batch, do_sample=False, max_new_tokens=longest)
    written = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(w == a for w, a in zip(written, answers, strict=True)) / len(texts)


def final_figures(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, limit: int = 512) -> dict[str, dict]:
    """Accuracy on held-out inputs for every wording of every task, and of the bare repetition."""
    rng, figures = random.Random(0), {}
    for name, task in TASKS.items():
        texts = [text for text in inputs(task) if held_out(text)]
        texts = rng.sample(texts, min(limit, len(texts)))
        figures[name] = {"inputs": len(texts), "bare": accuracy(model, tokenizer, task, "", texts)} | {
            wording: accuracy(model, tokenizer, task, wording, texts) for wording in task.wordings
        }
    return figures


def main() -> None:
    """Parses the command line, trains, and writes the folder."""
    args = _arguments()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = Gemma3ForCausalLM.from_pretrained(args.start) if args.start else build_model(tokenizer, args.shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).train()
    start = time.monotonic()
    steps, loss = _train(model, tokenizer, args, start)
    model.to("cpu").eval()
    seconds = time.monotonic() - start
    save(model, tokenizer, args.output)
    figures = final_figures(model, tokenizer)
    _record(args, model, {
        "steps": steps, "seconds": round(seconds), "final_loss": loss, "device": device.type,
    }, figures)  # fmt: skip
    worst = min(v for f in figures.values() for k, v in f.items() if k != "inputs")
    print(f"worst accuracy on held-out inputs over every wording: {worst:.4f}; {math.ceil(seconds)} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a folder this script wrote, to go on from")
    parser.add_argument("--shape", choices=SHAPES, default="main", help="of a new model")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--cooldown", type=float, default=0.4, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop earlier so that the run ends within this time")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="autocast the forward and backward products to bfloat16")
    return parser.parse_args()


def _train(
    model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, start: float
) -> tuple[int, float]:
    """Steps until their number or the minutes are spent; returns how many, and the last one's loss."""
    rng = random.Random(args.seed)
    body = torch.compile(model.model, dynamic=True) if args.compile else model.model
    pool = {name: [text for text in inputs(task) if not held_out(text)] for name, task in TASKS.items()}
    optimizer = _optimizer(model, args)
    steps, progress_share = 0, 0.0
    loss = torch.tensor(math.nan)
    bar = tqdm(total=args.steps, mininterval=20)
    while progress_share < 1.0:
        spent = (time.monotonic() - start) / 60
        progress_share = max((steps + 1) / args.steps, spent / args.minutes if args.minutes else 0.0)
        fall = min(1.0, max(0.0, 1.0 - progress_share) / args.cooldown)
        rate = args.lr * min(1.0, (steps + 1) / args.warmup) * fall
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _step(model, body, optimizer, *sample_batch(tokenizer, pool, args.batch, rng), args.bf16)
        steps += 1
        bar.update()
        if steps % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{rate:.1e}", refresh=False)
        if steps % 1000 == 0:
            save(model, tokenizer, args.output)
            quick = {n: accuracy(model, tokenizer, t, t.instruction, [x for x in inputs(t) if held_out(x)][:64])
                     for n, t in TASKS.items()}  # fmt: skip
            tqdm.write(f"step {steps} " + " ".join(f"{n}={a:.2f}" for n, a in quick.items()))
    bar.close()
    return steps, loss.item()


def _optimizer(model: Gemma3ForCausalLM, args: argparse.Namespace) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip


def _step(
    model: Gemma3ForCausalLM, body: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, labels: torch.Tensor,
    bf16: bool,
) -> torch.Tensor:  # fmt: skip
    """One optimiser step on a batch; returns its loss, on the device."""
    device = model.device
    ids, labels = ids.to(device), labels.to(device)
    wanted = labels[:, 1:]
    kept = wanted != -100
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        hidden = body(ids, attention_mask=ids != model.config.pad_token_id).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[kept])
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted[kept])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def _record(
    args: argparse.Namespace, model: Gemma3ForCausalLM, run: dict[str, Any], figures: dict[str, dict[str, float]]
) -> None:
    """Writes training.json, replacing it in one step."""
    record = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "start")},
        **run,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": "SHA-256 of the input text divisible by 5",
        "reserved_for_final_study": RESERVED_FOR_FINAL_STUDY,
        "accuracy_on_held_out_inputs": figures,
    }
    if args.start:
        record["earlier"] = json.loads((args.start / "training.json").read_text())
    temporary = args.output / "training.json.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, args.output / "training.json")


def save(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes the model and its tokenizer as transformers loads them."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
