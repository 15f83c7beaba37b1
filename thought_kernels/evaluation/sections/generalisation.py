"""Beyond the examples: other symbols, other wordings, longer inputs, a chat that has gone on for a turn."""

from __future__ import annotations

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.evaluation.sections.subject import Inputs, Intervention, Subject
from thought_kernels.prompts.prompt import Example, Instruction

CHAT_INPUTS = 64


def generalisation(subject: Subject, section: Section) -> None:
    """Each case with its own bare and prompted reference."""
    _case(subject, section, "like the examples", subject.sweep, subject.patch)
    if subject.outside is not None:
        _outside(subject, section)
    else:
        section.note("No inputs outside the examples' range were given.")
    _paraphrases(subject, section)
    if subject.longer is not None:
        trial = subject.new_trial(subject.instruction, subject.longer.first(subject.sweep_inputs))
        _case(subject, section, "longer inputs", trial, subject.patch)
        if subject.longer.answers is None:
            section.note("Longer inputs have no right answers here: what the prompted model says counts as right.")
    else:
        section.note("No longer inputs were given.")
    _chat(subject, section)


def _case(subject: Subject, section: Section, name: str, trial: Trial, change: Intervention) -> None:
    score = subject.measure(change, trial)
    section.add(name, "bare", trial.base, inputs=len(trial))
    section.add(name, "prompted", trial.prompted, inputs=len(trial))
    subject.report(section, name, score, trial)


def _outside(subject: Subject, section: Section) -> None:
    outside = subject.outside
    assert outside is not None
    patch = subject.patch
    if outside.examples is not None:
        patch = subject.fit(subject.instruction, outside.examples)
        section.note(
            f"Outside: a second patch, made in the same way from {len(outside.examples)} other examples, on inputs "
            "none of whose symbols or words they hold."
        )
    _case(subject, section, "outside the examples", subject.new_trial(subject.instruction, outside.inputs), patch)


def _paraphrases(subject: Subject, section: Section) -> None:
    few = subject.held_out.first(subject.sweep_inputs)
    amounts = subject.amounts
    for index, wording in enumerate(subject.paraphrases[: amounts.paraphrases]):
        trial = subject.new_trial(wording, few)
        _case(subject, section, f"against “{wording}”", trial, subject.patch)
        if index < amounts.paraphrase_patches and len(subject.examples) >= 2:
            examples = [one._replace(completion=None) for one in subject.examples]
            _case(subject, section, f"patch of “{wording}”", trial, subject.fit(wording, examples))
    if subject.paraphrases:
        section.note(
            "“against”: this patch, compared with the model told another wording; “patch of”: a patch of that wording."
        )
    else:
        section.note("No paraphrase of the instruction was given.")


def _chat(subject: Subject, section: Section) -> None:
    """The question as the second turn of a chat whose first the prompted model has answered."""
    questions = subject.held_out.questions
    count = min(CHAT_INPUTS, subject.sweep_inputs, len(questions))
    chats, answers = [], subject.held_out.first(count).answers
    texts = subject.trial.prompted_texts
    for index in range(count):
        earlier = (index + 1) % len(questions)
        turn = {"role": "assistant", "content": texts[earlier] or "…"}
        chats.append(Example((*questions[earlier].messages, turn, *questions[index].messages), None))
    if any(example.messages[0]["role"] == "system" for example in questions):
        section.note("Held-out inputs with a system message cannot follow a chat turn; that case was left out.")
        return
    instruction: Instruction = subject.instruction
    trial = subject.new_trial(instruction, Inputs(chats, answers))
    _case(subject, section, "after a chat turn", trial, subject.patch)
    section.note(
        "After a chat turn: the held-out input follows another one that the prompted model has answered, so the bare "
        "model sees one demonstration; “prompted” has the instruction at the start of the chat. "
        "Where a patch does not hold there, chats among its examples may help (tk.write_chats)."
    )
