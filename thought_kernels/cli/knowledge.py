"""`thought-kernels experiment knowledge`: facts as the instruction, questions about them as the test."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from thought_kernels.cli import options, scoring
from thought_kernels.demo.tasks import TASKS, held_out, split_by_symbols
from thought_kernels.evaluation.experiments.knowledge import FACTS, QUESTIONS, KnowledgeReport, run_knowledge
from thought_kernels.evaluation.experiments.pairs import Pair, read_pairs, split_pairs
from thought_kernels.evaluation.records.files import write_csv, write_json


def knowledge(
    model: options.Model = options.DEFAULT_MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("experiment-knowledge"),
    facts: Annotated[
        str | None, typer.Option(help="The paragraph, or a file that holds it (default one about a made-up town).")
    ] = None,
    demonstrations: options.Demonstrations = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="jsonl of questions and answers; half are fitted on, half asked."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of that split.")] = 0,
    match: scoring.Match = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 48,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Turn a paragraph of facts into a patch and ask about them.

    With --demonstrations the turns of that file are the instruction instead. Where a model cannot answer with the facts
    in its prompt, the figures say so. The shipped model reads no prose: without facts of your own it is also asked for
    the facts it does hold, its lexicon, by a patch of "Translate to French" that has seen half of the words.
    """
    options.check_folder(output)
    told = read_facts(facts) if demonstrations is None else options.read_instruction(facts, demonstrations)
    if questions is None and (facts is not None or demonstrations is not None):
        raise typer.BadParameter("give --questions FILE.jsonl with facts of your own")
    pairs = list(QUESTIONS) if questions is None else read_pairs(questions)
    count = max(1, len({pair.question for pair in pairs}) // 2)
    split = split_pairs(pairs, steps=len(pairs), inputs=count, seed=seed)
    ask = split.fresh + split.validation
    fit = split.fit
    scorer = scoring.read_scorer(match or "contains", "Answer the question.", device, offline)
    found, tokenizer = options.load_model(model, dtype, device, offline)
    with options.err.status(f"{len(fit)} questions fitted, {len(ask)} asked"):
        report = run_knowledge(
            found, tokenizer, told, fit, ask, match=scorer, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    reports = {"facts": report}
    if model == options.DEFAULT_MODEL and questions is None:
        reports["lexicon"] = lexicon(found, tokenizer, seed, batch_size)
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        {name: {**asdict(one), "verdict": one.verdict} for name, one in reports.items()}, output / "results.json"
    )
    rows = [{"part": name, **row} for name, one in reports.items() for row in one.rows]
    write_csv(rows, output / "answers.csv")
    for name, one in reports.items():
        show(name, one)
    options.out.print(f"results in {output}", markup=False, soft_wrap=True)


def read_facts(text: str | None) -> str:
    """The paragraph itself, or what a file of that name holds."""
    if text is None:
        return FACTS
    path = Path(text)
    found = path.read_text(encoding="utf-8").strip() if len(text) < 256 and path.is_file() else text
    if not found:
        raise typer.BadParameter(f"--facts must hold a text, got the empty file {text}")
    return found


def lexicon(model: Any, tokenizer: Any, seed: int, batch_size: int) -> KnowledgeReport:
    """The nearest thing for a model that reads no prose: words it was trained on, those asked for in no example."""
    task = TASKS["translate"]
    near, far = split_by_symbols(task)
    rng = random.Random(f"knowledge {seed}")
    fit, ask = (
        [Pair(text, task.answer(text)) for text in rng.sample(texts, 16)]
        for texts in (near, [text for text in far if held_out(text)])
    )
    return run_knowledge(model, tokenizer, task.instruction, fit, ask, match="exact", batch_size=batch_size)


def show(name: str, report: KnowledgeReport) -> None:
    """Prints the answers and the verdict."""
    table = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("question", "answer", "bare", "prompted", "patched"):
        table.add_column(name, overflow="fold", max_width=40)
    for row in report.rows:
        cells = [Text(row["question"]), Text(row["answer"])]
        for name in ("bare", "prompted", "patched"):
            cells.append(Text(row[name], style="green" if row[f"{name}_grade"] > 0.5 else ""))
        table.add_row(*cells)
    options.out.print(table)
    recovered = "-" if report.recovered is None else f"{report.recovered:.3f}"
    options.out.print(
        f"\n{report.verdict}\nFitted on {report.fitted} questions, of which the patch answers {report.seen:.1%}; asked "
        f"{report.asked} others. Recovered effect {recovered}.",
        markup=False, soft_wrap=True,
    )  # fmt: skip
