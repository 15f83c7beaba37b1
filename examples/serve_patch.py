"""A patched model behind an OpenAI-style server: a merged checkpoint, served by `transformers serve` and asked there.

    pip install 'transformers[serving]'
    python examples/serve_patch.py --output sum-model
    python examples/serve_patch.py --model DIR --instruction TEXT --examples FILE --ask TEXT --output DIR

The server loads whichever folder a request names. So one server answers thrice: by the model without the instruction,
with it, and by the patched model without it. It needs no code of this package, and is ended afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT

SECONDS = 300  # for the server to start, and for it to load a model and answer
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is here, behind no proxy


def main() -> None:
    """Makes the checkpoint, serves it and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder")
    parser.add_argument("--instruction", default="Sum the numbers")
    parser.add_argument("--examples", type=Path)
    parser.add_argument("--ask", default="4 7 2")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = tk.load(options.model)
    inputs = options.examples or [f"{a} {b} {a * b % 10}" for a in range(4, 8) for b in range(8)]
    patch = tk.transmute(model, tokenizer, options.instruction, inputs)
    patch.export_merged(options.output, model, tokenizer)
    told = f"{options.instruction}\n{options.ask}"
    with served(options.port) as server:
        for name, folder, text in (
            ("bare", options.model, options.ask),
            ("told", options.model, told),
            ("patched", options.output, options.ask),
        ):
            print(f"{name:8} {answer(server, folder, text)}", flush=True)


@contextmanager
def served(port: int) -> Iterator[str]:
    """The address of a server that knows folders only, and asks no hub."""
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", port)) == 0:
            raise SystemExit(f"port must be free, got {port}, where something answers; give another --port")
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        address = f"http://127.0.0.1:{port}"
        _await(process, f"{address}/health")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def answer(server: str, folder: Path, text: str) -> str:
    """What the model of a folder answers to a user's message."""
    body = {"model": str(folder.resolve()), "messages": [{"role": "user", "content": text}], "max_tokens": 32}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with DIRECT.open(request, timeout=SECONDS) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def _await(process: subprocess.Popen[bytes], address: str) -> None:
    """Returns once the server answers at its address, and raises if it ends or takes too long."""
    end = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            DIRECT.open(address, timeout=SECONDS).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit("transformers serve must have started, got no answer; what it printed says why")


if __name__ == "__main__":
    main()
