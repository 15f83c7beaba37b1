"""scale="auto" and ridge="auto": chosen by how close the patched model comes to the prompted one, without labels.

A quarter of the examples is held back, every candidate is fitted on the rest, and its KL(prompted ‖ patched) is summed
over the completions of those held back. The chosen values are then used on all examples.

What is held back are first of all examples that hold a token which the others do not, so that a candidate is judged on
symbols or words it was not fitted on too. Of the candidates that differ from the best by less than one standard error,
or by less than a thousandth of the bare model's divergence, the one nearest to the default is taken: a few examples
cannot tell recovered effects of 0.9999 and 0.99999 apart, and the default is what served best on many instructions,
outside the examples' range too (theory §6), where these examples cannot look.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from thought_kernels.models.decoder import Decoder
from thought_kernels.transmute import estimators
from thought_kernels.transmute.fitting import Recipe, Setting, fit_each, sums_of
from thought_kernels.transmute.logprobs import completion_logprobs, divergence
from thought_kernels.transmute.prompt import EncodedExample

AUTO = "auto"
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SCALES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
# For estimators that do not solve for a scale, in units of the least-squares scale of one block: over several blocks
# their effects add up, so smaller ones may be better.
UNSCALED = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)

MIN_EXAMPLES = 4
SHARE, MOST = 0.25, 0.5  # of the examples to hold back, and what a token may raise it to
TIE = 1e-3  # of the bare model's divergence
# However many examples there are, candidates are fitted on and judged by these at most, which bounds the cost.
MAX_FITTED, MAX_VALIDATED = 64, 32
MAX_KEPT_LOGITS = 2**28  # log-probabilities kept for validation, 1 GiB in float32


@dataclass(frozen=True)
class Candidate:
    """One row of the validation table.

    Attributes:
        ridge: ε.
        scale: λ per site.
        kl: Σ KL(prompted ‖ patched) over the tokens of the completions held back, divided by their number; nats. None
            where the estimator refused the sums or the model's answers were not finite.
        standard_error: of kl, over examples.
        recovered: 1 − kl / KL(prompted ‖ bare).
    """

    ridge: float
    scale: dict[str, float]
    kl: float | None
    standard_error: float | None
    recovered: float | None


@dataclass(frozen=True)
class Choice:
    """The chosen setting, and the table it was chosen from as a patch's provenance keeps it."""

    setting: Setting
    record: dict[str, Any]


def reads_ridge(estimator: str) -> bool:
    """Whether an estimator uses a ridge at all: then it refuses one that is not positive."""
    try:
        estimators.check_options(estimator, 1.0, -1.0, "none")
    except ValueError:
        return True
    return False


def check_choosable(estimator: str, scale: Mapping[str, float] | None, ridge: float | None, examples: int) -> None:
    """Raises ValueError where choose would, before anything has been computed; None stands for "auto"."""
    if examples < MIN_EXAMPLES:
        name = "scale" if scale is None else "ridge"
        raise ValueError(
            f"transmute: examples must be at least {MIN_EXAMPLES} for {name} 'auto', got {examples}; a part of "
            "them is held back to choose on: give more, or a number"
        )
    if ridge is None and not reads_ridge(estimator):
        raise ValueError(
            f"transmute: ridge must be a number or left out for estimator {estimator!r}, got 'auto'; "
            "that estimator has no ridge"
        )


def choose(
    model: Any,
    decoder: Decoder,
    recipe: Recipe,
    examples: Sequence[EncodedExample],
    *,
    scale: Mapping[str, float] | None,
    ridge: float | None,
    usual_ridge: float,
    seed: int = 0,
    progress: bool = False,
) -> Choice:
    """Chooses the scale, the ridge, or first the ridge and then the scale.

    Cost: one fit per candidate (one for all where Recipe.solved_once) on three quarters of the examples, 64 at most,
    and one forward per candidate over the quarter held back, 32 at most. There are 7 ridges, and 6 or 7 scales.

    Args:
        model: the transformers model that `decoder` describes.
        decoder: the described model.
        recipe: how patches are fitted.
        examples: encoded, with completions.
        scale: λ per site, None for automatic.
        ridge: ε, None for automatic.
        usual_ridge: the default, a candidate too and the preferred one.
        seed: of the split.
        progress: show a bar.

    Returns:
        A Choice.

    Raises:
        ValueError: fewer than MIN_EXAMPLES examples, an automatic ridge for an estimator without one, or no candidate
            that gives finite answers.
    """
    check_choosable(recipe.estimator, scale, ridge, len(examples))
    fitted, held, tokens = split(examples, seed, _vocabulary(model))
    unit = natural_scales(decoder, recipe, fitted) if scale is None else dict(scale)
    factors = SCALES if all(value == 1.0 for value in unit.values()) else UNSCALED
    ridges = sorted({*RIDGES, usual_ridge})
    with tqdm(
        total=(ridge is None) * len(ridges) + (scale is None) * len(factors), desc="transmute: choosing",
        unit="candidate", disable=not progress, leave=False,
    ) as bar:  # fmt: skip
        validation = _Validation(model, decoder, recipe, fitted, held, bar)
        table: list[Candidate] = []
        chosen = Setting(unit, usual_ridge if ridge is None else ridge)
        if ridge is None:
            judged = validation.judge([replace(chosen, ridge=epsilon) for epsilon in ridges])
            chosen = replace(chosen, ridge=ridges[nearest(judged, ridges, usual_ridge, TIE * validation.bare)])
            table += judged
        if scale is None:
            tried = [replace(chosen, scales={site: f * unit[site] for site in unit}) for f in factors]
            judged = validation.judge(tried)
            chosen = tried[nearest(judged, factors, 1.0, TIE * validation.bare)]
            table += judged
    record = {
        "chosen": [name for name, value in (("ridge", ridge), ("scale", scale)) if value is None],
        "seed": seed,
        "fitted_on": len(fitted),
        "validated_on": len(held),
        "validated_tokens": validation.tokens,
        "held_out_token_ids": tokens,
        "kl_bare": validation.bare,
        "rule": f"nearest to the default within one standard error, or {TIE} of kl_bare, of the smallest kl",
        "table": [vars(row) for row in table],
    }
    return Choice(chosen, record)


def split(
    examples: Sequence[EncodedExample], seed: int, vocabulary: int
) -> tuple[list[EncodedExample], list[EncodedExample], list[int]]:
    """Examples to fit on and to judge on, and the token ids that only the latter hold.

    Tokens are drawn in random order, and all examples that hold one are held back together, until they are SHARE of all
    examples; tokens that would make them more than MOST are passed over, and what is missing then is drawn freely.

    Args:
        examples: at least MIN_EXAMPLES.
        seed: of the draw.
        vocabulary: size of a row of log-probabilities, which bounds how many examples can be judged on.
    """
    rng = random.Random(seed)
    wanted = max(1, round(SHARE * len(examples)))
    owners: dict[int, set[int]] = {}
    for index, example in enumerate(examples):
        for token in example.tokens:
            owners.setdefault(token, set()).add(index)
    held: set[int] = set()
    chosen = []
    for token in rng.sample(sorted(owners), len(owners)):
        if len(held | owners[token]) <= max(wanted, MOST * len(examples)):
            held |= owners[token]
            chosen.append(token)
        if len(held) >= wanted:
            break
    rest = [index for index in range(len(examples)) if index not in held]
    held |= set(rng.sample(rest, max(0, wanted - len(held))))
    fitted = [index for index in range(len(examples)) if index not in held]
    judged = rng.sample(sorted(held), len(held))[:MAX_VALIDATED]
    kept: list[int] = []
    room = MAX_KEPT_LOGITS // vocabulary
    for index in judged:
        room -= len(examples[index].tokens) - examples[index].answer_start
        if room >= 0 or not kept:
            kept.append(index)
    fitted = sorted(rng.sample(fitted, min(len(fitted), MAX_FITTED)))
    return [examples[i] for i in fitted], [examples[i] for i in sorted(kept)], sorted(chosen)


def natural_scales(decoder: Decoder, recipe: Recipe, examples: Sequence[EncodedExample]) -> dict[str, float]:
    """λ around which each site's scale is looked for: 1 for the estimators that solve for it.

    `mean`: the λ of least squared error Σ ‖λ C a − δ‖², ‖C‖² / tr(C Z Cᵀ), and 1/Ω for a vector; `second_order`:
    1 / λ_max(Z), where its series begins to converge. The median over blocks, of sums that need no solution.
    """
    if recipe.estimator not in ("mean", "second_order"):
        return dict.fromkeys(recipe.sites, 1.0)
    found = {}
    for site in sorted(recipe.sites):
        alone = replace(recipe, sites=frozenset({site}), pairing="two_pass")
        sums = sums_of(decoder, alone, examples)
        values = []
        for layer in sorted(recipe.layers):
            held = sums.sums(layer, site)
            assert held is not None
            if held.cross is None or held.gram is None:
                values.append(1 / float(held.moments[0]) if recipe.estimator == "mean" else 1.0)
                continue
            cross, gram = held.cross.double(), held.gram.double()
            if recipe.estimator == "mean":
                energy, change = float(cross.square().sum()), float(((cross @ gram) * cross).sum())
                values.append(energy / change if change > 0 else 1.0)
            else:
                largest = float(torch.linalg.eigvalsh(gram)[-1])
                values.append(1 / largest if largest > 0 else 1.0)
        found[site] = statistics.median(values)
    return found


class _Validation:
    """The examples held back, and what the prompted model thinks of their completions."""

    def __init__(
        self, model: Any, decoder: Decoder, recipe: Recipe, fitted: Sequence[EncodedExample],
        held: Sequence[EncodedExample], bar: Any,
    ) -> None:  # fmt: skip
        self._model, self._decoder, self._recipe, self._fitted, self._bar = model, decoder, recipe, fitted, bar
        self._answers = [example.tokens[example.answer_start :] for example in held]
        self._plain = [[*example.header, *example.tokens[: example.answer_start]] for example in held]
        prompts = [[*example.header, *example.instruction, *example.tokens[: example.answer_start]] for example in held]
        self._reference = list(self._logprobs(prompts))
        self.tokens = sum(map(len, self._answers))
        self.bare = float(self._divergences().sum()) / self.tokens

    def judge(self, settings: Sequence[Setting]) -> list[Candidate]:
        """A row for each setting, fitted on the examples that are not held back."""
        rows: list[Candidate] = []
        refusal: ValueError | None = None
        for setting, patch in zip(settings, fit_each(self._decoder, self._recipe, self._fitted, settings), strict=True):
            sums: Tensor | None = None
            if isinstance(patch, ValueError):
                refusal = refusal or patch
            else:
                with patch.applied(self._model):
                    sums = self._divergences()
            self._bar.update()
            rows.append(self._row(setting, sums))
        if all(row.kl is None for row in rows):
            raise ValueError(
                f"transmute: scale and ridge must be given as numbers here, got 'auto'; none of {len(rows)} candidates "
                f"gave finite answers{'' if refusal is None else f', the first because: {refusal}'}"
            ) from refusal
        return rows

    def _row(self, setting: Setting, sums: Tensor | None) -> Candidate:
        if sums is None or not bool(sums.isfinite().all()):
            return Candidate(setting.ridge, dict(setting.scales), None, None, None)
        kl = float(sums.sum()) / self.tokens
        count = len(sums)
        error = float(sums.std()) * math.sqrt(count) / self.tokens if count > 1 else 0.0
        recovered = 1 - kl / self.bare if self.bare > 0 else None
        return Candidate(setting.ridge, dict(setting.scales), kl, error, recovered)

    def _divergences(self) -> Tensor:
        """Σ over tokens of KL(prompted ‖ model as it is now), [examples]."""
        found = divergence(self._reference, self._logprobs(self._plain))
        return torch.stack([kl.double().sum().cpu() for kl in found])

    def _logprobs(self, prompts: list[list[int]]) -> Iterator[Tensor]:
        return completion_logprobs(self._model, prompts, self._answers, batch_size=self._recipe.batch_size)


def nearest(rows: Sequence[Candidate], values: Sequence[float], usual: float, tie: float) -> int:
    """The index of the value nearest to the usual one, by ratio, among rows that are as good as the best.

    Args:
        rows: judged candidates, at least one with a kl.
        values: what they differ in, positive, in the same order.
        usual: the value to stay near.
        tie: differences in kl up to this do not count, nor do those up to the best row's standard error.
    """
    finite = [(row.kl, row.standard_error or 0.0, index) for index, row in enumerate(rows) if row.kl is not None]
    smallest, error, _ = min(finite)
    good = [index for kl, _, index in finite if kl <= smallest + max(error, tie)]
    return min(good, key=lambda index: abs(math.log(values[index] / usual)))


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
