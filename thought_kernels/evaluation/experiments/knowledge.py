"""Knowledge as the instruction: a paragraph of facts becomes a patch, and questions about it are the test.

The patch is fitted on some questions, whose answers the prompted model writes itself, and asked others. What the model
cannot answer with the facts in its prompt it cannot answer with the patch either, so the prompted accuracy comes first
and the patch is also judged on the questions that the prompted model answers right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thought_kernels.evaluation.experiments.composition import finite
from thought_kernels.evaluation.experiments.curves import own_examples
from thought_kernels.evaluation.experiments.pairs import Pair, check_context
from thought_kernels.evaluation.measures.trial import Score, Trial
from thought_kernels.fitting.recipe import Recipe
from thought_kernels.fitting.transmute import transmute
from thought_kernels.models import describe
from thought_kernels.prompts.prompt import Instruction

# A made-up place, so that no model knows it; several questions for each fact, so that some can be held out.
FACTS = (
    "The harbour town of Vellmar was founded in 1632 by the botanist Ilse Dorn. It lies on the river Tamm and has "
    "8,400 inhabitants. Its lighthouse is painted green, and its best-known dish is plum soup. The mayor is Oskar "
    "Brandt, and the football club is the Herons. Every October the people hold a kite festival."
)
_ASKED = {
    "Ilse Dorn": ("Who founded Vellmar?", "Which botanist started Vellmar?", "Name the founder of Vellmar."),
    "1632": ("When was Vellmar founded?", "In which year did Vellmar begin?", "Name the year of Vellmar's founding."),
    "Tamm": ("Which river does Vellmar lie on?", "What is Vellmar's river called?", "Name Vellmar's river."),
    "8,400": ("How many people live in Vellmar?", "What is the population of Vellmar?", "How big is Vellmar?"),
    "green": ("What colour is Vellmar's lighthouse?", "How is Vellmar's lighthouse painted?",
              "Which colour does the lighthouse in Vellmar have?"),
    "plum soup": ("What is Vellmar's best-known dish?", "What food is Vellmar known for?", "Name a dish of Vellmar."),
    "Oskar Brandt": ("Who is the mayor of Vellmar?", "What is Vellmar's mayor called?", "Who governs Vellmar?"),
    "Herons": ("What is Vellmar's football club called?", "Which team plays football for Vellmar?",
               "Name Vellmar's football club."),
    "October": ("In which month is Vellmar's kite festival?", "When do people fly kites in Vellmar?",
                "Which month brings the kite festival to Vellmar?"),
}  # fmt: skip
QUESTIONS = tuple(Pair(question, answer) for answer, questions in _ASKED.items() for question in questions)


@dataclass(frozen=True)
class KnowledgeReport:
    """What a patch of some facts answers; accuracies are fractions.

    Attributes:
        facts: the instruction.
        fitted, asked: how many questions the patch was fitted on and how many were asked.
        base, prompted, patched: accuracy without the facts, with them, and under the patch.
        answerable: how many of the questions asked the prompted model answers right.
        patched_answerable: share of those that the patched model answers right; None where there are none.
        recovered: 1 − ΣKL(prompted‖patched)/ΣKL(prompted‖bare) over the prompted model's answers.
        seen: share right of the questions that the patch was fitted on, under the patch.
        rows: each question asked with its right answer and what the bare, the prompted and the patched model say.
    """

    facts: Instruction
    fitted: int
    asked: int
    base: float
    prompted: float
    patched: float
    answerable: int
    patched_answerable: float | None
    recovered: float | None
    seen: float
    rows: list[dict[str, Any]]

    @property
    def verdict(self) -> str:
        """One sentence that says what was shown, and what was not."""
        if self.prompted <= self.base or not self.answerable:
            return (
                f"The model does not answer better when it is told ({self.prompted:.1%} right) than when it is not "
                f"({self.base:.1%}), so nothing about knowledge can be shown with it."
            )
        return (
            f"Told in its prompt the model answers {self.prompted:.1%}, not told {self.base:.1%}, with the patch "
            f"instead of being told {self.patched:.1%}; of {self.answerable} questions that it can answer, "
            f"{self.patched_answerable:.1%}."
        )


def run_knowledge(
    model: Any,
    tokenizer: Any,
    facts: Instruction,
    fit: Sequence[Pair],
    ask: Sequence[Pair],
    *,
    recipe: Recipe | None = None,
    match: Any = "contains",
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> KnowledgeReport:
    """Transmutes facts on some questions and asks others.

    Args:
        model: a transformers causal language model, unpatched.
        tokenizer: its tokenizer.
        facts: a paragraph, or chat turns.
        fit: questions that the patch is fitted on; their answers are used for `seen` only.
        ask: other questions.
        recipe: of the patch, None for the default one; fitted on the prompted model's likeliest answers alone.
        match, max_new_tokens, batch_size: as Trial takes them.

    Returns:
        A KnowledgeReport.

    Raises:
        ValueError: no question to fit on or to ask, one question in both, or one longer than the model's context.
    """
    if not fit or not ask:
        raise ValueError(
            f"run_knowledge: fit and ask must each hold a question at least, got {len(fit)} and {len(ask)}"
        )
    shared = {pair.question for pair in fit} & {pair.question for pair in ask}
    if shared:
        raise ValueError(f"run_knowledge: ask must hold other questions than fit, got {sorted(shared)[0]!r} in both")
    model = describe(model).model  # a compiled one would be compiled anew for each patch
    check_context(model, tokenizer, facts, [*fit, *ask])
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    asked, seen = (
        Trial(
            model, tokenizer, facts, [pair.question for pair in pairs], [pair.answer for pair in pairs], match=match,
            divergences=pairs is ask, **options,
        )
        for pairs in (ask, fit)
    )  # fmt: skip
    # Without completions transmute would write more questions, and what is asked afterwards might be among these.
    patch = transmute(
        model, tokenizer, facts, own_examples([pair.question for pair in fit], seen.prompted_texts), **options,
        **(recipe or Recipe()),
    )  # fmt: skip
    with patch.applied(model):
        score = asked.score(model)
        seen_accuracy, _ = seen.answer(model)
    able = [index for index, grade in enumerate(asked.prompted_grades) if grade > 0.5]
    return KnowledgeReport(
        facts=facts, fitted=len(fit), asked=len(ask), base=asked.base, prompted=asked.prompted, patched=score.accuracy,
        answerable=len(able),
        patched_answerable=sum(score.grades[index] for index in able) / len(able) if able else None,
        recovered=finite(score.effect.recovered), seen=seen_accuracy, rows=_rows(ask, asked, score),
    )  # fmt: skip


def _rows(pairs: Sequence[Pair], trial: Trial, score: Score) -> list[dict[str, Any]]:
    """Each question with its right answer, and what the bare, the prompted and the patched model say to it."""
    said = {"bare": trial.base_texts, "prompted": trial.prompted_texts, "patched": score.texts}
    graded = {"bare": trial.base_grades, "prompted": trial.prompted_grades, "patched": score.grades}
    return [
        {"question": pair.question, "answer": pair.answer}
        | {name: texts[index] for name, texts in said.items()}
        | {f"{name}_grade": grades[index] for name, grades in graded.items()}
        for index, pair in enumerate(pairs)
    ]
