"""Prompt compilation on real models: long system prompts as patches; writes results/compilation*.csv.

    python benchmarks/real/compilation.py --models smol=DIR
    python benchmarks/real/compilation.py --models qwen=DIR --prompts ferry hotel

Each prompt of system_prompts.toml becomes a patch of the default recipe, and is asked its held-out inputs; so are its
beginnings (--lengths, in tokens, cut at sentence ends), the sums with other prompts' patches, the second and third turn
of a chat that the prompted model wrote, chats with another system message, everyday requests and long inputs. Beside it
stands the patch of the same inputs and chats of them (tk.write_chats), and a contrast pair is measured. compilation.csv
has a row for each, compilation_answers.csv the answers, and compilation_rules.csv what the rules in system_rules/ say
of them.

A model is a folder or a .gguf file. Rows that are in compilation.csv are kept: delete some to measure them again.
Another device or other weights under the same name make other rows. Patches are kept too (--patches); delete the
folder after a change of the package. Without --models nothing is measured, and compilation_rules.csv is made anew.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import compilation_cases as cases
import torch
from compilation_jobs import CHATS, CONTRAST, FIT, FULL, OWN, TEXT, TIMES, Job, added, jobs
from compilation_times import request_times
from measure import BATCH_SIZE, fitted
from results import Results, Row
from rules import rules, survival
from tasks import Task, names, task
from tqdm import tqdm

from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.evaluation.measures.intervals import recovered_interval
from thought_kernels.evaluation.measures.trial import Score, Trial
from thought_kernels.evaluation.records.digests import data_hash, fingerprint
from thought_kernels.evaluation.records.files import write_csv
from thought_kernels.models.load import load
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import encode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
from harness import device_name

TURNS = 3  # of the longest chats that a patch is fitted on
ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "benchmarks" / "results" / "compilation.csv"
KEY = ("model", "weights", "device", "prompt", "cut", "case", "patch", "inputs", "held_out", "answer_tokens")
COLUMNS = (
    *KEY, "reserved", "prompt_tokens", "chats", "recovered", "low", "high", "tokens", "kl_bare", "kl_patched",
    "same_bare", "same_patched", "drift", "tokens_prompted", "tokens_bare", "prefill_prompted_ms",
    "prefill_prompted_cached_ms", "prefill_bare_ms", "prefill_bare_cached_ms", "token_prompted_ms", "token_bare_ms",
    "seconds", "generation", "peak_mib", "threads", "torch", "transformers", "date",
)  # fmt: skip
# A side's _cut: whether the limit of tokens cut its answer.
ANSWERS = (*KEY, "question", "bare", "prompted", "patched", "bare_cut", "prompted_cut", "patched_cut")


class Compilation:
    """The jobs of one model.

    Args:
        name: of the model, for the rows.
        model, tokenizer: as loaded.
        prompts: whose patches are added.
        options: the command line's.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, prompts: Sequence[Task], options: argparse.Namespace):
        self._name, self._model, self._tokenizer = name, model, tokenizer
        self._prompts, self._options = prompts, options
        self.results = Results(options.output, KEY, COLUMNS)
        self.answers = Results(beside(options.output, "answers"), KEY, ANSWERS)
        self._drift, self._weights = Drift(model, tokenizer), fingerprint(model)

    def missing(self, job: Job) -> list[str]:
        """The patches of a job that have no row yet."""
        return [patch for patch in job.patches if self._key(job, patch) not in self.results]

    def do(self, job: Job) -> None:
        """Measures what is missing of a job."""
        if job.case == TIMES:
            requests = [encode(self._tokenizer, job.of.instruction, text) for text, _ in job.of.held_out]
            self._add(job, OWN, request_times(self._model, requests))
            return
        trial = self._trial(job) if job.case not in (FIT, TEXT) else None
        for patch in self.missing(job):
            made = self._patch(job, patch)  # where it is not kept this writes the row of the fit
            if job.case == TEXT:
                with made.applied(self._model):
                    self._add(job, patch, {"drift": round(self._drift.read(self._model).divergence, 6)})
            if trial is not None:
                with made.applied(self._model):
                    score = trial.score(self._model)
                self._keep(job, patch, trial, score)

    def _keep(self, job: Job, patch: str, trial: Trial, score: Score) -> None:
        """Writes the answers of a trial, and then its row."""
        questions = map(cases.question, trial.questions)
        cut = ([not one for one in ended] for ended in (trial.base_ended, trial.prompted_ended, score.ended))
        texts = zip(questions, trial.base_texts, trial.prompted_texts, score.texts, *cut, strict=True)
        key, columns = self._key(job, patch), ANSWERS[len(KEY) :]
        self.answers.extend({**key, **dict(zip(columns, line, strict=True))} for line in texts)
        self._add(job, patch, scored(trial, score))

    def _trial(self, job: Job) -> Trial:
        """The situation's trial; half as many chats where it is not the held-out inputs alone."""
        alone = job.case in (cases.HELD_OUT, cases.CONTRARY)
        count = self._options.held_out if alone else max(self._options.held_out // 2, 1)
        said = {cases.TURN_2: (cases.HELD_OUT,), cases.TURN_3: (cases.HELD_OUT, cases.TURN_2)}.get(job.case, ())
        asked = cases.case(job.case, job.of, count, [self._said(job, turn) for turn in said])
        return Trial(
            self._model, self._tokenizer, asked.instruction, asked.questions, None, without=asked.without,
            batch_size=BATCH_SIZE, max_new_tokens=self._options.answer_tokens,
        )  # fmt: skip

    def _said(self, job: Job, turn: str) -> cases.Answers:
        """What the prompted model answered in an earlier turn."""
        key = {name: str(value) for name, value in self._key(Job(job.of, FULL, turn, (OWN,)), OWN).items()}
        found = {row["question"]: row["prompted"] for row in self.answers.rows() if key.items() <= row.items()}
        if not found:
            path = beside(self._options.output, "answers")
            raise SystemExit(
                f"compilation: {path} must hold the answers of {job.of.name}, {turn}, got none; delete "
                f"the row of that case in {self._options.output} to measure it again"
            )
        return list(found.items())

    def _patch(self, job: Job, patch: str) -> ThoughtPatch:
        """One patch, or the sum of several."""
        if patch in (OWN, CHATS, CONTRAST):
            return self._fitted(job, patch)
        total = self._fitted(job, OWN)
        for other in self._prompts:
            if other.name in added(patch):
                total = total + self._fitted(Job(other, FULL, cases.HELD_OUT, (OWN,)), OWN)
        return total

    def _fitted(self, job: Job, patch: str) -> ThoughtPatch:
        """The patch of the default recipe, from the folder of patches where it is there."""
        options = self._options
        row = Job(job.of, job.cut, FIT, (patch,))
        made_of = data_hash([self._key(row, patch), job.of.instruction, job.of.inputs])
        place = options.patches / f"{self._name}-{job.of.name}-{job.cut}-{patch}-{made_of}"
        if (place / "thought_patch.json").is_file() and not self.missing(row):
            return ThoughtPatch.from_pretrained(place)
        recipe = {"max_new_tokens": options.answer_tokens}
        if patch == CONTRAST:
            recipe["without"] = cases.CONTRASTS[job.of.name][1]
        made, found = fitted(
            self._model, self._tokenizer, job.of, options.inputs, recipe, turns=TURNS if patch == CHATS else 1
        )
        made.save_pretrained(place)
        if self.missing(row):
            self._add(row, patch, found)
        return made

    def _key(self, job: Job, patch: str) -> Row:
        return {
            "model": self._name, "weights": self._weights, "device": device_name(self._options.device),
            "prompt": job.of.name, "cut": job.cut, "case": job.case, "patch": patch, "inputs": self._options.inputs,
            "held_out": self._options.held_out, "answer_tokens": self._options.answer_tokens,
        }  # fmt: skip

    def _add(self, job: Job, patch: str, found: Row) -> None:
        row = {
            **self._key(job, patch), "reserved": job.of.reserved,
            "prompt_tokens": cases.length(self._tokenizer, job.of), **found, "threads": torch.get_num_threads(),
            "torch": version("torch"), "transformers": version("transformers"),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        self.results.add(row)
        shown = ("prompt", "cut", "case", "patch", *found)
        tqdm.write("  ".join(f"{name} {row[name]}" for name in shown), file=sys.stderr)


def scored(trial: Trial, score: Score) -> Row:
    """A row's figures: the recovered effect with its interval over chats, divergences a token, tokens of a request."""
    sums = [[float(one.double().sum()) for one in rows] for rows in (score.divergences, trial.bare_divergences)]
    tokens = score.effect.tokens
    interval = recovered_interval(*sums, seed=0)
    follows = {"same_bare": trial.bare_follows, "same_patched": score.follows}
    requests = {"tokens_prompted": trial.prompts, "tokens_bare": trial.bare_prompts}
    return {
        "chats": len(trial), **dict(zip(("recovered", "low", "high"), (round(x, 5) for x in interval), strict=True)),
        "tokens": tokens, "kl_bare": round(sum(sums[1]) / tokens, 5), "kl_patched": round(sum(sums[0]) / tokens, 5),
        **{name: round(float(sum(row.sum() for row in rows)) / tokens, 5) for name, rows in follows.items()},
        **{name: round(fmean(map(len, rows)), 1) for name, rows in requests.items()},
    }  # fmt: skip


def beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.stem}_{what}{output.suffix}")


def write_rules(output: Path) -> None:
    """What the rules say of all answers of whole prompts, in a file made anew."""
    groups: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in Results(beside(output, "answers"), KEY, ANSWERS).rows():
        groups.setdefault(tuple(row[name] for name in KEY), {})[row["question"]] = row  # of two the later one
    lines = []
    for key, rows in groups.items():
        of = dict(zip(KEY, key, strict=True))
        if of["cut"] == FULL:
            found = survival(rules(of["prompt"]), list(rows.values()), everyday=of["case"] == cases.UNRELATED)
            lines += [{**of, **line} for line in found]
    if lines:
        write_csv(lines, beside(output, "rules"))


def run(options: argparse.Namespace, name: str, path: str) -> None:
    """Measures what is missing of one model."""
    model, tokenizer = load(path, device=options.device)
    prompts = [task(prompt, seed=0, inputs=options.inputs) for prompt in options.prompts]
    compilation = Compilation(name, model, tokenizer, prompts, options)
    todo = [job for job in jobs(tokenizer, prompts, options.lengths) if compilation.missing(job)]
    for job in tqdm(todo, desc=name):
        compilation.do(job)
        write_rules(options.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--prompts", nargs="+", choices=names("system"), default=names("system"))
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 200, 400], help="of beginnings, in tokens")
    parser.add_argument("--inputs", type=int, default=32, help="to fit on")
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=64, help="where answers are cut")
    parser.add_argument("--patches", type=Path, default=ROOT / "build" / "compilation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    for entry in options.models:
        if not all(entry.partition("=")):
            parser.error(f"models must be NAME=PATH, got {entry!r}")
    for entry in options.models:
        run(options, *entry.split("=", 1))
    write_rules(options.output)


if __name__ == "__main__":
    main()
