"""The tables of docs/compilation.md, from the rows of real/compilation.py."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from markdown_table import markdown
from real_tables import MODELS

RESULTS = Path(__file__).resolve().parents[1] / "results"
KEY = ("model", "prompt", "cut", "case", "patch")
MEASURED = {"inputs": "32", "held_out": "32", "answer_tokens": "64"}
TARGETS = ((400, 0.90), (1000, 0.85))  # prompts of up to so many tokens, and the least to be recovered of them
SITUATIONS = ("held-out", "turn 2", "turn 3", "other system message", "unrelated requests", "long inputs")
SAMPLES, SHOWN = 3, 160  # answers, and characters of each
NOTHING = "Not measured yet."
ALWAYS, SOME, ALL = "(rules for all inputs)", "(rules for some inputs)", "(all rules)"  # groups in the place of a rule
SIDES = ("bare", "prompted", "patched")
SHARES = ("times asked", "cut", *SIDES, "survival", "where bare breaks it")

Row = dict[str, str]


def read(what: str = "", **fields: str) -> list[Row]:
    """Rows of a file with the given fields; of rows that were written twice the later ones.

    The rows of a prompt and its beginning are of the device and the weights that were measured last, and are not mixed
    with others.
    """
    path, fields = RESULTS / f"compilation{what}.csv", MEASURED | fields
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if row["patch"] != "chats"]  # which is measured beside a prompt's own patch
    last = {patched(row): (row["weights"], row["device"]) for row in [*rows, *chosen]}
    rows = [
        row for row in rows if fields.items() <= row.items() and last[patched(row)] == (row["weights"], row["device"])
    ]
    names = (*KEY, *({"_rules": ("rule",), "_answers": ("question",)}.get(what, ())))
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def patched(row: Row) -> tuple[str, ...]:
    """What one patch is of."""
    return row["model"], row["prompt"], row["cut"]


def first(**fields: str) -> Row:
    """The row with the given fields; an empty one where there is none."""
    return next(iter(read(**fields)), {})


def shown(row: Row, name: str, digits: int = 3) -> str:
    return f"{float(row[name]):.{digits}f}" if row.get(name) else "–"


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    lines = [list(line) for line in lines]
    return markdown(list(head), lines) if lines else NOTHING


def ordered(rows: Iterable[Row]) -> list[Row]:
    """By model, shorter prompts first."""
    return sorted(rows, key=lambda row: (list(MODELS).index(row["model"]), int(row["prompt_tokens"]), row["prompt"]))


def name(row: Row) -> str:
    return row["prompt"] + (r" \*" if row["reserved"] == "True" else "")


def interval(row: Row) -> str:
    return f"{float(row['low']):.3f} to {float(row['high']):.3f}"


def prompts() -> list[Row]:
    """The rows of whole prompts on held-out inputs, those of the contrast pair aside."""
    rows = read(cut="full", case="held-out", patch="own")
    pairs = {row["prompt"] for row in read(patch="contrast")}
    return ordered(row for row in rows if row["prompt"] not in pairs)


def effect() -> str:
    """Each whole prompt: what is recovered, beside the target for its length."""
    lines = []
    for row in prompts():
        fit = first(model=row["model"], prompt=row["prompt"], cut="full", case="fit", patch="own")
        least = next(least for most, least in TARGETS if int(row["prompt_tokens"]) <= most)
        lines.append((
            MODELS[row["model"]], name(row), row["prompt_tokens"], shown(row, "recovered"), interval(row),
            f"{least:.2f}", "yes" if float(row["recovered"]) >= least else "no",
            *(shown(row, of) for of in ("kl_bare", "kl_patched", "same_bare", "same_patched")),
            *(shown(fit, of, 0) for of in ("seconds", "generation")),
        ))  # fmt: skip
    head = (
        "model", "prompt", "tokens", "recovered", "95 % interval", "target", "reached", "KL, bare", "KL, patched",
        "same token, bare", "same token, patched", "seconds", "writing",
    )  # fmt: skip
    return table(head, lines)


def lengths() -> str:
    """Beginnings of the prompts."""
    lines = []
    for whole in prompts():
        of = {"model": whole["model"], "prompt": whole["prompt"], "case": "held-out", "patch": "own"}
        rows = sorted(read(**of), key=lambda row: int(row["prompt_tokens"]))
        if len(rows) > 1:
            lines += [
                (MODELS[row["model"]], name(row), row["prompt_tokens"], shown(row, "recovered"), interval(row),
                 shown(row, "kl_bare"), shown(row, "kl_patched"))
                for row in rows
            ]  # fmt: skip
    return table(("model", "prompt", "tokens", "recovered", "95 % interval", "KL, bare", "KL, patched"), lines)


def situations() -> str:
    """What each patch recovers in each situation, with KL(prompted ‖ bare) a token, and drift."""
    lines = []
    for whole in prompts():
        for patch, fitted_on in (("own", "inputs alone"), ("chats", "chats too")):
            of = {"model": whole["model"], "prompt": whole["prompt"], "cut": "full", "patch": patch}
            rows = {row["case"]: row for row in read(**of)}
            cells = (
                f"{shown(rows[case], 'recovered')} ({shown(rows[case], 'kl_bare', 2)})" if case in rows else "–"
                for case in SITUATIONS
            )
            if rows:
                drift = shown(rows.get("ordinary text", {}), "drift")
                lines.append((MODELS[whole["model"]], name(whole), fitted_on, *cells, drift))
    return table(("model", "prompt", "fitted on", *SITUATIONS, "drift"), lines)


def times() -> str:
    """Tokens and milliseconds of a request."""
    lines = []
    for row in ordered(read(case="times")):
        told, bare = (float(row[f"tokens_{of}"]) for of in ("prompted", "bare"))
        read_ms, cached_ms = (
            [float(row[f"prefill_{of}{how}_ms"]) for of in ("prompted", "bare")] for how in ("", "_cached")
        )
        token_ms = [float(row[f"token_{of}_ms"]) for of in ("prompted", "bare")]
        lines.append((
            MODELS[row["model"]], name(row), f"{told:.0f}", f"{bare:.0f}", *saved(read_ms, 0), *saved(cached_ms, 0),
            *saved(token_ms, 1),
        ))  # fmt: skip
    head = (
        "model", "prompt", "tokens, prompted", "patched", "ms to the first token, prompted", "patched", "saved",
        "behind a cache, prompted", "patched", "saved", "ms a later token, prompted", "patched", "saved",
    )  # fmt: skip
    return table(head, lines)


def saved(milliseconds: list[float], digits: int) -> list[str]:
    """The prompted model's time, the patched one's, and the share between them."""
    prompted, patched = milliseconds
    return [f"{prompted:.{digits}f}", f"{patched:.{digits}f}", f"{1 - patched / prompted:.0%}"]


def shares(row: Row) -> list[str]:
    """How a rule or a group of them fares; what is cut is left out of the shares."""
    cut = [row[f"{of}_cut"] for of in SIDES]
    return [
        row["asked"], ", ".join(cut) if any(count != "0" for count in cut) else "–",
        *(shown(row, of, 2) for of in SIDES), survived(row), gained(row),
    ]  # fmt: skip


def survived(row: Row) -> str:
    return share_of(row, "kept", "survival", "low", "high")


def gained(row: Row) -> str:
    """The survival of what the bare model does not keep."""
    return share_of(row, "gained", "gained_survival", "gained_low", "gained_high")


def share_of(row: Row, count: str, *figures: str) -> str:
    """A share with its interval, and of how many."""
    if row.get(count, "0") == "0":
        return "–"
    share, low, high = (shown(row, figure, 2) for figure in figures)
    return f"{share} of {row[count]} ({low} to {high})"


def rules_in_all() -> str:
    """The rules of each prompt taken together: those that hold always, and those for some inputs."""
    lines = []
    for whole in prompts():
        of = {"model": whole["model"], "prompt": whole["prompt"], "case": "held-out", "patch": "own"}
        for kind in (ALWAYS, SOME):
            for row in read("_rules", rule=kind, **of):
                lines.append((
                    MODELS[whole["model"]], name(whole), kind.strip("()"), row["rules"], row["not_asked"], *shares(row),
                ))  # fmt: skip
    return table(("model", "prompt", "rules", "how many", "not asked", *SHARES), lines)


def rules_by_situation() -> str:
    """The survival of all rules of a prompt that the bare model breaks, in each situation."""
    lines = []
    for whole in prompts():
        of = {"model": whole["model"], "prompt": whole["prompt"], "patch": "own", "rule": ALL}
        found = [read("_rules", case=case, **of) for case in SITUATIONS]
        lines.append((MODELS[whole["model"]], name(whole), *(gained(rows[0]) if rows else "–" for rows in found)))
    return table(("model", "prompt", *SITUATIONS), lines)


def each_rule(model: str) -> str:
    """Every rule of the reserved prompts on one model."""
    lines = []
    for whole in prompts():
        if whole["model"] == model and whole["reserved"] == "True":
            for row in read("_rules", model=model, prompt=whole["prompt"], case="held-out", patch="own"):
                if row["rule"] not in (ALWAYS, SOME, ALL):
                    asked = shares(row) if row["asked"] != "0" else ["not asked", *["–"] * (len(SHARES) - 1)]
                    lines.append((name(whole), row["rule"], *asked))
    return table(("prompt", "rule", *SHARES), lines)


def sums() -> str:
    """Patches of several prompts in one model, each on its own held-out inputs."""
    lines = []
    for whole in prompts():
        rows = read(model=whole["model"], prompt=whole["prompt"], cut="full", case="held-out")
        rows = [row for row in rows if row["patch"] != "chats"]
        if len(rows) > 1:
            lines += [
                (MODELS[row["model"]], name(row), row["patch"], shown(row, "recovered"), interval(row)) for row in rows
            ]
    return table(("model", "prompt", "patches", "recovered", "95 % interval"), lines)


def contrast() -> str:
    """The patch of an instruction, and that of it against its contrary."""
    lines = []
    for pair in {row["prompt"] for row in read(patch="contrast")}:
        for row in read(prompt=pair):
            if row["recovered"]:
                text = first(model=row["model"], prompt=pair, case="ordinary text", patch=row["patch"])
                lines.append((
                    MODELS[row["model"]], pair, "nothing" if row["case"] == "held-out" else "the contrary",
                    {"own": "plain"}.get(row["patch"], row["patch"]), shown(row, "recovered"), interval(row),
                    shown(row, "kl_bare"), shown(row, "kl_patched"), shown(text, "drift"),
                ))  # fmt: skip
    head = (
        "model", "instruction", "the other side is told", "patch", "recovered", "95 % interval", "KL, unpatched",
        "KL, patched", "drift",
    )  # fmt: skip
    return table(head, sorted(lines))


def answers() -> str:
    """A few answers of each side of the contrast pair."""
    lines = []
    of = {"case": "held-out", "cut": "full"}
    for row in read("_answers", patch="contrast", **of):
        if sum(line[0] == MODELS[row["model"]] for line in lines) == SAMPLES:
            continue
        same = {name: row[name] for name in ("model", "prompt", "question")}
        texts = [row["bare"], row["prompted"], *(one["patched"] for one in read("_answers", patch="own", **of, **same))]
        lines.append((MODELS[row["model"]], row["question"], *map(cut, [*texts, row["patched"]])))
    return table(("model", "asked", "bare", "told", "plain patch", "contrast patch"), lines)


def cut(text: str) -> str:
    """The beginning of an answer on one line of a table."""
    line = " ".join(text.split()).replace("|", r"\|")
    return line if len(line) <= SHOWN else f"{line[:SHOWN]} …"


COMPILATION: dict[str, Callable[[], str]] = {
    "compilation effect": effect,
    "compilation lengths": lengths,
    "compilation situations": situations,
    "compilation times": times,
    "compilation rules": rules_in_all,
    "compilation rules by situation": rules_by_situation,
    "compilation each rule smol": partial(each_rule, "smol"),
    "compilation each rule qwen": partial(each_rule, "qwen"),
    "compilation sums": sums,
    "compilation contrast": contrast,
    "compilation answers": answers,
}
