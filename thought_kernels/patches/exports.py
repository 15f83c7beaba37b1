"""A patch's doors to the formats of other programs."""

from __future__ import annotations

import os
from typing import Any

from thought_kernels.patches.control_vector import ControlVector, export_control_vector
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.export_gguf_lora import GgufLora, export_gguf_lora
from thought_kernels.patches.export_merged import MergedFolder, export_merged
from thought_kernels.patches.export_peft import PeftFolder, export_peft
from thought_kernels.patches.lora import Accepted


class Exports(PatchData):
    """A patch that can be written for other programs. What a format cannot carry is refused, unless that is accepted;
    the result then says what was lost, and what it does in the patch's place.
    """

    def export_peft(
        self,
        directory: str | os.PathLike[str],
        model: Any,
        *,
        rank: int | None = None,
        energy: float | None = None,
        fold: bool = False,
        drop: bool = False,
        pad: bool = False,
        progress: bool = False,
    ) -> PeftFolder:
        """Writes a PEFT LoRA folder for one model: Δ = U Vᵀ becomes A = Vᵀ and B = W U, and B = U in down_proj.

        peft, transformers (``load_adapter``) and vLLM load it; products are formed in float64 and rounded once, to
        float32 (float64 for a float64 model). A vector becomes the LoRA bias W v (at the down site v), exactly, where
        every such module has a bias, and a residual vector down_proj's as in ``merge_``; vLLM refuses those.

        Args:
            directory: the folder, created if it does not exist; each file is replaced in one step.
            model: the model whose weights W enter B, which the adapter is for. It may be quantised.
            rank: largest rank, which accepts the loss of the singular values beyond it. None: each Δ's own rank, its
                singular values above the rounding of its stored numbers, which loses nothing.
            energy: share of ‖Δ‖_F² that each Δ keeps, in as few singular values as hold it, which accepts the loss of
                the rest. Beside a rank, whichever cuts more.
            fold: where there is no bias, add v āᵀ/‖ā‖² to Δ instead, ā being the fitted rows' mean activation; the
                relative squared error on those rows is logged and kept in the result's ``fold_residuals``.
            drop: leave out the vectors that have no place, which the result names in ``dropped``.
            pad: give every module the largest rank, padded with zeros. llama.cpp's converter divides one lora_alpha by
                each module's own rank, so what it reads must have one rank; ``export_gguf_lora`` needs no such thing.
            progress: show a progress bar on stderr.

        Returns:
            A PeftFolder: ranks, what was lost, and the flags that vLLM needs.

        Raises:
            ValueError: another hidden size or attention width, missing blocks, a bad rank or energy, a nonzero vector
                that can neither become a bias nor may be folded or dropped, no nonzero matrix, NaN, or a path that is
                not a folder. Nothing is written then.
        """
        accepted = Accepted(rank, energy, fold, drop)
        return export_peft(self, directory, model, accepted, pad=pad, progress=progress)

    def export_merged(
        self,
        directory: str | os.PathLike[str],
        model: Any,
        tokenizer: Any = None,
        *,
        fold: bool = False,
        drop: bool = False,
        max_shard_size: str | int = "5GB",
    ) -> MergedFolder:
        """Writes the patched model as a Hugging Face checkpoint in safetensors, which AutoModel and the like read.

        The weights are ``merge_``'s, in the model's dtype. While they are written they are the model's; it is then as
        it was, bit for bit. A model that ``load`` read from a GGUF file becomes a checkpoint of unpacked weights.

        Args:
            directory: a folder that is empty or not there, which takes its name when it is complete.
            model: a transformers model with plain floating weights.
            tokenizer: saved beside it; None for none.
            fold: where there is no bias, add v āᵀ/‖ā‖² to Δ instead, as in ``merge_``.
            drop: leave out the vectors that have no place, which the result names in ``dropped``.
            max_shard_size: largest file, as transformers takes it: "5GB", or bytes.

        Returns:
            A MergedFolder: what was lost beside the rounding.

        Raises:
            ValueError: as ``merge_``, a quantised model or one with adapters, or a folder that holds files. Nothing is
                written then.
        """
        return export_merged(self, directory, model, tokenizer, fold=fold, drop=drop, max_shard_size=max_shard_size)

    def export_gguf_lora(
        self,
        file: str | os.PathLike[str],
        model: Any,
        *,
        rank: int | None = None,
        energy: float | None = None,
        fold: bool = False,
        drop: bool = False,
        progress: bool = False,
    ) -> GgufLora:
        """Writes a LoRA adapter in GGUF, with which llama.cpp serves the patch: ``llama-server -m MODEL --lora FILE``.

        Factors are those of ``export_peft`` in float32. The format has no biases.

        Args:
            file: path of the .gguf file, replaced in one step; its folder is created.
            model: the model whose weights W enter B. ``load`` the GGUF file that will be served, so that they are its.
            rank, energy, fold, drop, progress: as for ``export_peft``.

        Returns:
            A GgufLora: ranks, what was lost, and the flags that llama.cpp needs.

        Raises:
            ValueError: as ``export_peft``, a model type that llama.cpp has no name for, or no gguf package. Nothing is
                written then.
        """
        return export_gguf_lora(self, file, model, Accepted(rank, energy, fold, drop), progress=progress)

    def export_control_vector(self, file: str | os.PathLike[str], model: Any, *, drop: bool = False) -> ControlVector:
        """Writes a control vector in GGUF, which llama.cpp adds to blocks' outputs: ``--control-vector FILE``.

        It carries residual vectors, and the down site's where no norm stands behind down_proj. Beside an adapter by
        ``export_gguf_lora(..., drop=True)`` it carries what that leaves out.

        Args:
            file: path of the .gguf file, replaced in one step; its folder is created.
            model: the model that the patch is for.
            drop: leave out matrices, vectors elsewhere and those of block 0, which the result names in ``dropped``.

        Returns:
            A ControlVector: what it does, and the flags that llama.cpp needs.

        Raises:
            ValueError: a patch that does not fit the model, something that is neither carried nor may be left out,
                nothing to carry, or no gguf package. Nothing is written then.
        """
        return export_control_vector(self, file, model, drop=drop)
