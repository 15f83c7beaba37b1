"""What patches cost a model that writes: one for all rows of a batch, and eight in one batch, each with its own.

python benchmarks/measure/bench_mixed.py                            Gemma 3 270M's shape, 8 rows, 16 tokens, 5 rounds

Weights and patches are random, of rank 64 at the attention and down sites of every block. A run is `generate` behind
prompts of 64 tokens; the peer is the same without a patch. Before anything is timed each provider's logits at the
prompts' ends are compared with those of patches applied one by one, in float64.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import harness
import torch
from bench_transmute import IDS, build
from harness import Case, Provider
from torch import Tensor

import thought_kernels as tk
from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch

ROWS, PROMPT, TOKENS, RANK = 8, 64, 16, 64
NAMES = [f"patch{row}" for row in range(ROWS)]


def patch_of(model: Any, seed: int) -> ThoughtPatch:
    """A random patch whose Δ is about a third of the identity's size."""
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for block in describe(model).blocks:
        d, a, f = describe(model).hidden_size, block.attention_width, block.mlp_width or 0
        for site, d_out, d_in in (("attention", a, a), ("down", d, f)):
            left, right = (torch.randn(width, RANK, generator=generator) for width in (d_out, d_in))
            entries[block.index, site] = SitePatch(factors=(0.3 * left / (d_in * RANK) ** 0.5, right / d_out**0.5))
    return ThoughtPatch(entries)


class Serving:
    """One model, a patch for each row, and the ways to serve them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.patches = {name: patch_of(model, seed) for seed, name in enumerate(NAMES)}
        self.dense = ThoughtPatch({key: SitePatch(one.dense()) for key, one in self.patches[NAMES[0]].entries.items()})
        self.ids = torch.randint(3, IDS, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
        self.mixed = tk.MixedPatches(model, self.patches)
        self.mixed.choose(NAMES)
        self.adapters = self._adapters()

    def _adapters(self) -> Any:
        """The same patches in a copy of the model, as peft has them."""
        from peft import PeftModel

        base, wrapped = copy.deepcopy(self.model), None
        with tempfile.TemporaryDirectory() as folder:
            for name, patch in self.patches.items():
                patch.export_peft(f"{folder}/{name}", self.model)
                if wrapped is None:
                    wrapped = PeftModel.from_pretrained(base, f"{folder}/{name}", adapter_name=name)
                else:
                    wrapped.load_adapter(f"{folder}/{name}", adapter_name=name)
        assert wrapped is not None
        return wrapped.eval()

    @torch.no_grad()
    def write(self, model: Any = None, ids: Tensor | None = None, **options: Any) -> Tensor:
        """The tokens that a model writes behind the prompts."""
        ids = self.ids if ids is None else ids
        return (model or self.model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
            do_sample=False, pad_token_id=0, **options,
        )  # fmt: skip

    @torch.no_grad()
    def logits(self, model: Any = None, ids: Tensor | None = None, **options: Any) -> Tensor:
        """Those at the prompts' ends."""
        return (model or self.model)(input_ids=self.ids if ids is None else ids, **options).logits[:, -1]

    def providers(self) -> list[Provider]:
        """The peer first."""

        def under(patch: Any, call: Any) -> Any:
            with patch:
                return call()

        def in_turn(call: Any) -> Tensor:
            return torch.cat([
                under(patch.applied(self.model), lambda row=row: call(ids=self.ids[row : row + 1]))
                for row, patch in enumerate(self.patches.values())
            ])  # fmt: skip

        one = self.patches[NAMES[0]]
        mixed = {"adapter_names": NAMES}
        return [
            Provider("no patch", self.write, lambda: {"bare": self.logits()}),
            Provider(
                "one patch, dense", lambda: under(self.dense.applied(self.model), self.write),
                lambda: {"one": under(self.dense.applied(self.model), self.logits)},
            ),
            Provider(
                f"one patch, rank {RANK}", lambda: under(one.applied(self.model), self.write),
                lambda: {"one": under(one.applied(self.model), self.logits)},
            ),
            Provider(
                f"{ROWS} patches in one batch", lambda: under(self.mixed, self.write),
                lambda: {"each": under(self.mixed, self.logits)},
            ),
            Provider(
                f"{ROWS} patches one after the other", lambda: in_turn(self.write),
                lambda: {"each": in_turn(self.logits)},
            ),
            Provider(
                f"peft, {ROWS} adapters in one batch", lambda: self.write(self.adapters, **mixed),
                lambda: {"each": self.logits(self.adapters, **mixed)},
            ),
        ]  # fmt: skip

    def truth(self) -> dict[str, Tensor]:
        """Logits with no patch, with the first, and with each row's."""
        found: dict[str, list[Tensor]] = {"bare": [], "one": [], "each": []}
        for row, patch in enumerate(self.patches.values()):
            ids = self.ids[row : row + 1]
            found["bare"].append(self.logits(ids=ids))
            for name, chosen in (("one", self.patches[NAMES[0]]), ("each", patch)):
                with chosen.applied(self.model):
                    found[name].append(self.logits(ids=ids))
        return {name: torch.cat(logits) for name, logits in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="270m", help="a shape of bench_transmute.py")
    parser.add_argument("--blocks", type=int, default=0, help="fewer, for a quick look")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    serving = Serving(build(options.model, options.blocks or None, IDS))
    plain = serving.truth()
    serving.model.double()
    truth = {name: logits.double() for name, logits in serving.truth().items()}
    serving.model.float()
    case = Case("serve", f"{ROWS} rows, {PROMPT} + {TOKENS} tokens", options.model, "float32")
    harness.measure(case, serving.providers(), truth, plain, seconds=options.seconds, rounds=(5, 30))


if __name__ == "__main__":
    main()
