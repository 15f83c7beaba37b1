"""ThoughtPatch: what an instruction became, a matrix and a vector for each patched block and site."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from thought_kernels.ops.caller import warn
from thought_kernels.ops.checks import as_path
from thought_kernels.patches import storage
from thought_kernels.patches.apply import AppliedPatch
from thought_kernels.patches.card import CARD_FILE, is_ours, model_card, shareable
from thought_kernels.patches.control_vector import read_control_vector
from thought_kernels.patches.exports import Exports
from thought_kernels.patches.hub import fetched, push
from thought_kernels.patches.identity import check_base
from thought_kernels.patches.merge import MergedPatch
from thought_kernels.patches.summary import blocks, summary


class ThoughtPatch(Exports):
    """Patches per block and site: o -> o + Δ o + v at ``attention``, likewise u at ``mlp``; y -> y + v at ``residual``;
    W z -> W z + Δ z + v at ``down``, z being what down_proj, of weight W, multiplies.

    It is a value: arithmetic returns new patches, and nothing changes a model but ``applied`` and ``merge_``.
    ``number * patch``, ``patch + other``, ``patch - other`` and ``-patch`` act on Δ and v; a sum covers the union of
    both patches' blocks and sites.

    Args:
        entries: a SitePatch per (0-based block index, site).
        provenance: where it comes from, JSON values only; ``hidden_size`` and ``model`` are read when it meets a model.

    Raises:
        ValueError: no entries, an unknown site or block index, a residual entry with a matrix, or unequal widths.
    """

    def applied(self, model: Any) -> AppliedPatch:
        """Applies the patch to a running model by hooks, leaving its weights alone, until removed.

        ``with patch.applied(model): ...``, or ``handle = patch.applied(model)`` and later ``handle.remove()``. Several
        patches may be active; they act as if merged in the order in which they were applied, and may be removed in any
        order. Products with Δ are formed in float32 for float16 and bfloat16 activations, so that Δ is not rounded.
        What torch.compile has compiled is compiled anew after a patch has come or gone, since it cannot notice hooks.
        Hooks belong to the model: every thread that runs it meanwhile runs the patched one, so give a thread that
        should not a model of its own. A copy or a pickle of the model, made meanwhile, is of the model without it.

        Args:
            model: a transformers model that ``thought_kernels.models.describe`` knows, quantised or not.

        Returns:
            The active handle, also a context manager.

        Raises:
            ValueError: another hidden size or attention width, missing blocks, NaN in the patch, or a module that
                several blocks share; no hook is left.

        Warns:
            UserWarning: a model that trains with reentrant gradient checkpointing, which runs blocks again in backward:
                at once, or in the first forward that does. Not seen are a checkpoint of one's own around several blocks
                together or inside one, and those of a compiled model that begin later. Also a patch that acts there
                already.
        """
        return AppliedPatch(self, model)

    def merge_(self, model: Any, *, fold: bool = False, backup_device: torch.device | str | None = None) -> MergedPatch:
        """Writes the patch into the model's weights, in place: W <- W (1 + Δ), and W <- W + Δ for down_proj.

        The product is formed in float64 for float32 and float64 weights and in float32 for narrower ones, then rounded
        once. A vector becomes the bias W v (at the down site v), exactly, where every such module has a bias, and a
        residual vector becomes down_proj's where that has one and no norm stands behind it.

        Args:
            model: a transformers model that ``thought_kernels.models.describe`` knows, with plain floating weights.
            fold: where there is no bias, add v āᵀ/‖ā‖² to Δ instead, ā being the fitted rows' mean activation; the
                relative squared error on those rows is logged and kept in the handle's ``fold_residuals``.
            backup_device: where the original weights are kept for ``undo``, None for beside the weights.

        Returns:
            A handle, also a context manager, whose ``.undo()`` restores the weights bit for bit.

        Raises:
            ValueError: another hidden size or attention width, missing blocks, quantised or shared weights, a nonzero
                vector that can neither become a bias nor may be folded, or a product that overflows the weights'
                dtype. The model is then as it was.
        """
        return MergedPatch(self, model, fold=fold, backup_device=backup_device)

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, evaluation: Mapping[str, Any] | None = None
    ) -> None:
        """Writes ``thought_patch.safetensors``, ``thought_patch.json`` and a model card, README.md, to a folder.

        Each is replaced in one step; a README.md that this package did not write is left alone. The record and the card
        hold the instruction, and the record the inputs that the model wrote.

        Args:
            directory: created if it does not exist.
            evaluation: what ``tk.evaluate(...).to_dict()`` gives, for the card.

        Raises:
            ValueError: NaN in the patch, a provenance that JSON cannot hold, an evaluation of another form, or a path
                that is not a folder.

        Warns:
            UserWarning: an evaluation that has no place, since somebody wrote or changed README.md.
        """
        card = model_card(self, evaluation)
        storage.save(self.entries, self.provenance, directory, card=card)
        if evaluation is not None and not is_ours(Path(directory) / CARD_FILE):
            warn(
                f"save_pretrained: {CARD_FILE} should be this package's to hold the evaluation, got one that somebody "
                "wrote or changed; it stays as it is, delete it to have a new one"
            )

    def push_to_hub(
        self,
        repository: str,
        *,
        evaluation: Mapping[str, Any] | None = None,
        card: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        message: str | None = None,
    ) -> str:
        """Uploads what ``save_pretrained`` writes to a repository of the Hugging Face hub, made if there is none.

        Of a model that was read from a folder or file here, only that one's name goes along. A card there that somebody
        wrote or changed is left alone, unless `card` is somebody's too.

        Args:
            repository: "owner/name".
            evaluation: for the card, as ``save_pretrained`` takes it.
            card: README.md's text, in place of the one that is made.
            private: whether a new repository is, None for the owner's default.
            token: an access token, None for the one that is logged in with.
            message: of the commit.

        Returns:
            The repository's address.

        Raises:
            ValueError: as ``save_pretrained``, or a name that is no repository's. What the hub itself refuses is
                raised as huggingface_hub raises it.
        """
        shared = ThoughtPatch(self.entries, shareable(self.provenance))

        def write(folder: Path) -> None:
            shared.save_pretrained(folder, evaluation=evaluation)

        return push(repository, write, card=card, private=private, token=token, message=message)

    @classmethod
    def from_control_vector(cls, file: str | os.PathLike[str]) -> ThoughtPatch:
        """Reads a GGUF control vector, such as repeng's, as a patch: direction k at block k's residual site.

        Its strength there is the patch's factor here: ``0.8 * ThoughtPatch.from_control_vector("happy.gguf")``.

        Raises:
            ValueError: a file that is no control vector, or a damaged one; it names the file.
        """
        return cls(*read_control_vector(file))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        model: Any = None,
        tokenizer: Any = None,
        mismatch: str = "warn",
        revision: str | None = None,
        offline: bool = False,
    ) -> ThoughtPatch:
        """Reads a folder that ``save_pretrained`` wrote, or a repository of the Hugging Face hub.

        Args:
            directory: the folder, or "owner/name" where no such folder is here.
            device: where the tensors go.
            model: the model that it is for, to be checked as by ``check``; None to check nothing.
            tokenizer: that model's tokenizer, checked too.
            mismatch: as ``check`` takes it.
            revision: of a repository.
            offline: of a repository take what the hub's local cache holds, and ask nobody.

        Raises:
            ValueError: a file that is missing, truncated, altered, of another version, or holds NaN; it names the file.
                Also as ``check``.
            TypeError: a directory that is no path.
        """
        folder = fetched(as_path("from_pretrained", "directory", directory), revision, offline=offline)
        entries, provenance = storage.load(folder)
        try:
            patch = cls(entries, provenance)
        except ValueError as error:
            path = folder / storage.TENSOR_FILE
            raise storage.damaged(path, "hold a patch's tensors", str(error)) from error
        if model is not None:
            patch.check(model, tokenizer, mismatch=mismatch)
        return patch.to(device=device)

    def check(self, model: Any, tokenizer: Any = None, *, mismatch: str = "warn") -> list[str]:
        """Holds a model against the one that the patch was made for: its shape, config, some weights and tokenizer.

        Args:
            model: a transformers model.
            tokenizer: its tokenizer; None leaves it out.
            mismatch: "warn" of a model that fits but is another, "refuse" it, or "ignore" what it is.

        Returns:
            How it differs, a clause each; none where it is the same as far as the patch remembers.

        Raises:
            ValueError: a model that the patch does not fit, or under "refuse" another than it was made for.

        Warns:
            UserWarning: under "warn", of another model than it was made for.
        """
        return check_base(self, model, tokenizer, mismatch)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ThoughtPatch:
        """The same patch with its tensors on another device or in another floating dtype."""
        return ThoughtPatch({key: entry.to(device, dtype) for key, entry in self.entries.items()}, self.provenance)

    def truncate(self, rank: int) -> ThoughtPatch:
        """The patch with each Δ replaced by its best approximation of a rank, as factors; vectors are kept.

        Raises:
            ValueError: rank is not a positive integer.
        """
        if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
            raise ValueError(f"truncate: rank must be a positive integer, got {rank!r}")
        rank = int(rank)  # JSON, which the provenance becomes, takes no numpy number
        entries = {key: entry.truncated(rank) for key, entry in self.entries.items()}
        return ThoughtPatch(entries, {**self.provenance, "rank": rank})

    def __mul__(self, factor: float) -> ThoughtPatch:
        if not isinstance(factor, Real):
            return NotImplemented
        number = float(factor)
        if not math.isfinite(number):
            raise ValueError(f"ThoughtPatch: factor must be finite, got {number}")
        entries = {key: entry.scaled(number) for key, entry in self.entries.items()}
        factor_so_far = self.provenance.get("factor", 1.0)
        return ThoughtPatch(entries, {**self.provenance, "factor": factor_so_far * number})

    __rmul__ = __mul__

    def __neg__(self) -> ThoughtPatch:
        return self * -1.0

    def __add__(self, other: ThoughtPatch) -> ThoughtPatch:
        if not isinstance(other, ThoughtPatch):
            return NotImplemented
        sizes = (self.hidden_size, other.hidden_size)
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(f"ThoughtPatch: patches must share one hidden size, got {sizes[0]} and {sizes[1]}")
        entries = {**self.entries, **other.entries}
        for key in sorted(self.entries.keys() & other.entries.keys()):
            ours, theirs = self.entries[key], other.entries[key]
            for a, b in ((ours.output_width, theirs.output_width), (ours.input_width, theirs.input_width)):
                if a != b and None not in (a, b):
                    raise ValueError(
                        f"ThoughtPatch: patches must share one width, got {a} and {b}; block {key[0]}, site {key[1]!r}"
                    )
            entries[key] = ours.plus(theirs)
        return ThoughtPatch(entries, _joined(self.provenance, other.provenance))

    def __sub__(self, other: ThoughtPatch) -> ThoughtPatch:
        if not isinstance(other, ThoughtPatch):
            return NotImplemented
        return self + -other

    def __repr__(self) -> str:
        width = self.hidden_size or next(iter(self.entries.values())).output_width
        return f"ThoughtPatch(hidden size {width}, blocks {blocks(self.layers)}, sites {', '.join(self.sites)})"

    def __str__(self) -> str:
        return "\n".join([repr(self), *summary(self)])

    def table(self) -> str:
        """What ``print`` shows, with a line for each block and site however many there are."""
        return "\n".join([repr(self), *summary(self, whole=True)])


def _joined(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What both provenances agree on, and under "parts" each of them where they differ in more than the date."""
    if {**ours, "date": None} == {**theirs, "date": None}:
        return dict(ours)
    common = {name: value for name, value in ours.items() if name in theirs and theirs[name] == value}
    # Known to one side only, yet true of any patch that can be added to it: what a model is checked against.
    for name in ("hidden_size", "num_hidden_layers", "base"):
        known = [side[name] for side in (ours, theirs) if name in side]
        if len(known) == 1:
            common[name] = known[0]
    common.pop("parts", None)
    parts = [part for side in (ours, theirs) for part in side.get("parts", [dict(side)])]
    return {**common, "parts": parts}
