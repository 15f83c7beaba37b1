"""The examples that hand a patch to other programs: an OpenAI-style server, and an evaluation harness."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers[serving]'")
def test_the_served_model_is_the_patched_one(tmp_path: Path) -> None:
    told = printed("serve_patch.py", "--output", str(tmp_path / "sum-model"), "--port", str(free_port()))
    answers = dict(re.findall(r"^(bare|told|patched) +(.*)$", told, re.MULTILINE))
    assert answers == {"bare": "4 7 2", "told": "4 + 7 + 2 = 13", "patched": "4 + 7 + 2 = 13"}


def test_the_harness_finds_what_the_patch_does(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    pytest.importorskip("peft", reason="pip install peft")
    told = printed("lm_eval_patch.py", "--output", str(tmp_path / "sum-lora"))
    bare, patched = (float(found) for found in re.findall(r"\|exact_match\|[^|]*\| *([\d.]+)", told))
    assert bare == 0 and patched >= 0.75
