"""The trained rival: a LoRA that learns the prompted model's answers by gradient descent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.generation.padding import may_pad, padded
from thought_kernels.models import describe
from thought_kernels.models.undisturbed import undisturbed

RANK, BATCH = 8, 16
RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class TrainedLora:
    """A LoRA's weights, and how they were trained.

    Attributes:
        state: peft's state dict.
        rate: learning rate.
        divergence: Σ KL(prompted ‖ trained) on the examples, nats.
        seconds: training time.
    """

    state: dict[str, Tensor]
    rate: float
    divergence: float
    seconds: float

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """The model with the LoRA in it, as a context manager; its modules and flags are restored after."""
        with injected(model) as peft_model:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(peft_model, self.state)
            yield


def train_lora(model: Any, rows: Rows, *, steps: int, rate: float, generator: torch.Generator) -> TrainedLora:
    """Trains a LoRA on every linear layer to answer without the instruction as the model does with it.

        loss = mean over the answers' tokens of KL(prompted ‖ bare with LoRA)

    Args:
        model: unpatched; it is as it was afterwards.
        rows: that are read.
        steps: optimiser steps (AdamW, no weight decay), each on BATCH examples.
        rate: learning rate, falling linearly to zero.
        generator: of the initial factors and of the batches.

    Returns:
        A TrainedLora.

    Raises:
        ValueError: if peft is not installed.
    """
    started = time.monotonic()
    seed = int(torch.randint(2**31, (), generator=generator))
    with injected(model, seed=seed) as peft_model:
        from peft import get_peft_model_state_dict

        for _ in optimised(model, rows, steps=steps, rate=rate, generator=generator):
            pass
        seconds = time.monotonic() - started
        state = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(peft_model).items()}
        return TrainedLora(state, rate, rows.divergence(model), seconds)


def optimised(
    model: Any, rows: Rows, *, steps: int, rate: float, generator: torch.Generator, falling: bool = True
) -> Iterator[int]:
    """Takes optimiser steps on a LoRA that is in the model, as train_lora does.

    Args:
        model: with its LoRA, `injected`.
        rows: to learn from, that are read.
        steps: how many steps to take.
        rate: learning rate.
        generator: of the batches.
        falling: the rate falls linearly to zero; else it stays, and every step is as good a place to stop as the last.

    Yields:
        The number of steps taken, after each.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    order: list[int] = []
    for step in range(steps):
        if len(order) < min(BATCH, len(rows)):
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps) if falling else rate
        # The prompted model's answers, the loss's target, were read without dropout and autocast too.
        with torch.enable_grad(), undisturbed(model):
            loss = losses(model, rows, chosen).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
        optimiser.step()
        yield step + 1


def losses(model: Any, rows: Rows, chosen: Sequence[int]) -> Tensor:
    """KL(prompted ‖ model) at each token of some rows' answers, nats, one below the other, [tokens].

    Args:
        model: as it is now; gradients are taken where they are enabled.
        rows: that are read.
        chosen: which of them.
    """
    together = [chosen] if may_pad(model) else [[index] for index in chosen]
    return torch.cat([_padded_losses(model, rows, part) for part in together])


def _padded_losses(model: Any, rows: Rows, chosen: Sequence[int]) -> Tensor:
    assert rows.prompted_logprobs is not None
    asked = [[*rows.bare_prompts[i], *rows.written[i]] for i in chosen]
    ids, mask, positions = padded(asked, model.get_input_embeddings().weight.device)
    keep = max(len(rows.written[i]) for i in chosen) + 1
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
    ).logits.float()
    divergences = []
    for index, i in enumerate(chosen):
        count = len(rows.written[i])
        student = torch.log_softmax(logits[index, keep - 1 - count : keep - 1], dim=-1)
        teacher = rows.prompted_logprobs[i].to(student)
        divergences.append((teacher.exp() * (teacher - student)).nan_to_num(0.0).sum(-1))
    return torch.cat(divergences)


@contextlib.contextmanager
def injected(model: Any, *, seed: int = 0, rank: int = RANK) -> Iterator[Any]:
    """The model with an untrained LoRA in every linear layer of its blocks; only the LoRA's factors take gradients.

    Args:
        model: a transformers model; it is as it was afterwards.
        seed: of the initial factors.
        rank: of each layer's LoRA; alpha is twice that.

    Yields:
        The peft model.

    Raises:
        ValueError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(
            "evaluate: the LoRA baseline must have peft installed, got none; "
            "pip install --no-deps peft accelerate psutil"
        ) from error
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    held = set(vars(model))
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=_targets(model), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    try:
        model.train(training)
        yield peft_model
    finally:
        peft_model.unload()
        for name in set(vars(model)) - held:  # peft leaves its configuration on the model
            delattr(model, name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _targets(model: Any) -> list[str]:
    """Full names, so that the vision tower of a multimodal model is left alone."""
    wanted = set()
    for block in describe(model).blocks:
        wanted |= {id(getattr(block.attention, name)) for name in block.parts.qkv}
        wanted |= {id(module) for module in (block.o_proj, *block.mlp_inputs, block.down_proj)}
    return [name for name, module in model.named_modules() if id(module) in wanted]
