"""`thought-kernels verify`: the exactness theorem on a model's own weights."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from thought_kernels.cli import options

# Worst relative error that passes, by arithmetic: rounding carried through all blocks, with room to spare, and far
# below what the unpatched model shows (0.1 to 10).
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


def verify(
    instruction: options.RequiredInstruction = None,
    example: Annotated[str, typer.Option("--example", "-e", help="The user's text.")] = "3 1 4",
    completion: Annotated[str | None, typer.Option(help="The answer, compared too.")] = None,
    demonstrations: options.Demonstrations = None,
    system: options.System = None,
    model: options.Model = options.DEFAULT_MODEL,
    site: Annotated[
        str, typer.Option(help="Where the patches act: attention, or mlp, the paper's own, with the block's output.")
    ] = "attention",
    tolerance: Annotated[
        float | None, typer.Option(help="Worst relative error that passes; by dtype if not given.")
    ] = None,
    separator: options.Separator = options.DEFAULT_SEPARATOR,
    without: options.Without = None,
    format: options.Format = None,
    dtype: options.Dtype = "float64",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Replace an instruction by per-token patches at every block, and compare with the prompted model.

    Exact but for rounding: exits with 1 if an error is above the tolerance, or not well below the unpatched control.
    """
    from thought_kernels.models import describe
    from thought_kernels.pairing.batches import Group
    from thought_kernels.pairing.replay import REPLAYED, replay_group
    from thought_kernels.prompts.prompt import encode

    if site not in REPLAYED:
        raise typer.BadParameter(f"--site must be {' or '.join(REPLAYED)}, got {site!r}")
    told = options.read_instruction(instruction, demonstrations, system)
    found, tokenizer = options.load_model(model, dtype, device, offline)
    row = encode(
        tokenizer, told, options.with_completion(example, completion), **options.prompting(separator, format, without)
    )
    report = replay_group(describe(found), Group.of(row), row.tokens, site)

    arithmetic = str(found.dtype).removeprefix("torch.")
    allowed = TOLERANCES[arithmetic] if tolerance is None else tolerance
    worst = int(report.block_error.argmax())
    block_error = float(report.block_error[worst])
    table = Table(box=None, pad_edge=False, show_header=False)
    replaced = f", I° {len(row.replaced)}" if row.replaced else ""
    table.add_row("tokens", f"H {len(row.header)}, I {len(row.instruction)}{replaced}, e {len(row.tokens)}")
    table.add_row("site", site)
    table.add_row("arithmetic", arithmetic)
    table.add_row("worst block error", f"{block_error:.2e} (block {worst} of {len(report.block_error)}, 0-based)")
    table.add_row("logit error", f"{report.logit_error:.2e}")
    table.add_row("logit error without patches", f"{report.control_error:.2e}")
    table.add_row("tolerance", f"{allowed:.1e}")
    options.out.print(table)
    # Written so that NaN fails.
    if not (block_error <= allowed and report.logit_error <= allowed):
        options.complain(
            f"verify: the replay must agree to {allowed:.1e}, got {max(block_error, report.logit_error):.2e}"
        )
        raise typer.Exit(1)
    if not report.logit_error < report.control_error:
        options.complain(
            f"verify: the unpatched control must err more than the replay, got {report.control_error:.2e}; "
            "the instruction changes nothing here, so nothing was shown"
        )
        raise typer.Exit(1)
    options.out.print("exact to rounding")
