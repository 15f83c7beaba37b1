"""llama.cpp itself, by the C functions of the library that the package xllamacpp (MIT) brings: logits of token ids.

pip install xllamacpp
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thought_kernels.patches.control_vector import read_control_vector


class _Options(ctypes.Structure):
    """llama_model_params or llama_context_params, whose layout grows from version to version: room enough for both.

    Such structures are returned and passed in memory, of which the library reads and writes what it knows.
    """

    _fields_ = (("first", ctypes.c_uint32 * 4), ("rest", ctypes.c_char * 1008))


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_POINTER, _INT, _FLOATS = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_float)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # result, arguments
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_POINTER, _POINTER]),
    "llama_model_default_params": (_Options, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _Options]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_n_embd": (_INT, [_POINTER]),
    "llama_model_n_layer": (_INT, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_context_default_params": (_Options, []),
    "llama_init_from_model": (_POINTER, [_POINTER, _Options]),
    "llama_set_n_threads": (None, [_POINTER, _INT, _INT]),
    "llama_free": (None, [_POINTER]),
    "llama_adapter_lora_init": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "llama_set_adapters_lora": (_INT, [_POINTER, ctypes.POINTER(_POINTER), ctypes.c_size_t, _FLOATS]),
    "llama_set_adapter_cvec": (_INT, [_POINTER, _FLOATS, ctypes.c_size_t, _INT, _INT, _INT]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits_ith": (_FLOATS, [_POINTER, _INT]),
}  # fmt: skip
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)(lambda *_: None)


def available() -> bool:
    """Whether the package is installed."""
    return find_spec("xllamacpp") is not None


@cache
def library() -> Any:
    """The library, with its functions declared."""
    spec = find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None, "pip install xllamacpp"
    found = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(ctypes.cast(_SILENT, _POINTER), None)
    found.llama_backend_init()
    return found


class LlamaCpp:
    """A GGUF model in llama.cpp on the CPU, with an adapter and a control vector or without.

    Args:
        model: the GGUF file.
        lora: a GGUF LoRA adapter.
        control_vector: a GGUF control vector.
        context: most tokens of a prompt and its answer.
        threads: of one decode.
    """

    def __init__(
        self,
        model: Path,
        *,
        lora: Path | None = None,
        control_vector: Path | None = None,
        context: int = 1024,
        threads: int = 1,
    ) -> None:
        self._library = library()
        options = self._library.llama_model_default_params()
        self._model = self._loaded(self._library.llama_model_load_from_file(str(model).encode(), options), model)
        settings = self._library.llama_context_default_params()
        settings.first[:3] = (context, context, context)  # n_ctx, n_batch, n_ubatch
        self._most = context
        self._context = self._loaded(self._library.llama_init_from_model(self._model, settings), model)
        self._library.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        if lora is not None:
            adapter = self._loaded(self._library.llama_adapter_lora_init(self._model, str(lora).encode()), lora)
            scale = (ctypes.c_float * 1)(1.0)
            assert not self._library.llama_set_adapters_lora(self._context, (_POINTER * 1)(adapter), 1, scale)
        if control_vector is not None:
            self._steer(control_vector)

    def _loaded(self, pointer: Any, path: Path) -> Any:
        if not pointer:
            raise ValueError(f"LlamaCpp: llama.cpp must load the file, got its refusal: {path}")
        return pointer

    def _steer(self, path: Path) -> None:
        """Adds a control vector as llama.cpp's own tools do: rows of a table from block 1 on."""
        entries, _ = read_control_vector(path)
        width = self._library.llama_model_n_embd(self._model)
        blocks = self._library.llama_model_n_layer(self._model)
        table = np.zeros((blocks - 1, width), dtype=np.float32)
        for (layer, _), entry in entries.items():
            assert entry.vector is not None and layer > 0
            table[layer - 1] = entry.vector.numpy()
        pointer = table.ctypes.data_as(_FLOATS)
        assert not self._library.llama_set_adapter_cvec(self._context, pointer, table.size, width, 1, blocks)

    def logits(self, ids: list[int], last: int) -> Tensor:
        """What the last so many of the ids predict, float32 [last, vocabulary]."""
        if not 0 < last <= len(ids) <= self._most:
            raise ValueError(f"LlamaCpp: ids must be {last} to {self._most} tokens, got {len(ids)}")
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = place >= len(ids) - last
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
            assert not self._library.llama_decode(self._context, batch)
            rows = [self._row(place) for place in range(len(ids) - last, len(ids))]
        finally:
            self._library.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def _row(self, place: int) -> np.ndarray:
        pointer = self._library.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,)).copy()  # the next decode writes over it

    def logprobs(self, prompt: list[int], answer: list[int]) -> Tensor:
        """Natural log-probabilities at each token of an answer, [n_answer, vocabulary]."""
        return torch.log_softmax(self.logits([*prompt, *answer], len(answer) + 1)[:-1].double(), dim=-1)

    def answer(self, prompt: list[int], most: int, ends: set[int]) -> list[int]:
        """A greedy answer: up to so many tokens, or the first of those that end it, which is its last."""
        found: list[int] = []
        while len(found) < most and not (found and found[-1] in ends):
            found.append(int(self.logits([*prompt, *found], 1)[0].argmax()))
        return found

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
