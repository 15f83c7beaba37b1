"""What people ask an assistant on any day: the inputs of a patch where its maker gives none."""

from __future__ import annotations

from thought_kernels.prompts.examples import Example
from thought_kernels.prompts.instruction import Instruction

# Short and of many kinds: to explain, to advise, to write, to reckon, to chat. The model's own follow by their example.
EVERYDAY = (
    "How do I get started with running?",
    "Write a two-line poem about the moon.",
    "What is the square root of 144?",
    "I feel a bit lonely today.",
    "Summarise the plot of Hamlet.",
    "Can you help me plan a trip to Portugal?",
    "What does 'procrastinate' mean?",
    "Write a Python function that reverses a string.",
    "Which is healthier, butter or olive oil?",
    "Good morning!",
    "How old is the universe?",
    "Give me three names for a coffee shop.",
    "My neighbour plays loud music every night. What can I do?",
    "Translate 'good night' into Spanish.",
    "Who was Marie Curie?",
    "Explain compound interest.",
    "What is 17 times 6?",
    "Recommend a film for a family evening.",
    "How do I reset my wifi router?",
    "Is it safe to eat raw cookie dough?",
    "Write an e-mail to my landlord about a broken heater.",
    "What should I know before I adopt a cat?",
    "Why does bread rise?",
    "Tell me a joke.",
    "How can I be more confident when I speak in public?",
    "What happened in 1969?",
    "List the steps to change a light bulb.",
    "What is a good gift for a teacher?",
    "Is Pluto a planet?",
    "How do I say no politely?",
    "Suggest a name for my sailing boat.",
    "What are your hobbies?",
)


def everyday(instruction: Instruction) -> tuple[list[Example], bool]:
    """Examples for an instruction that comes without any, and whether a patch is fitted on them themselves.

    Demonstrations show what inputs look like, and the model's own are to be like theirs. No patch is fitted on these,
    since the prompt holds their answers. For any other instruction they are everyday requests.
    """
    turns = [] if isinstance(instruction, str) else instruction
    shown = [turn["content"] for turn in turns if turn.get("role") == "user"]
    texts = shown if len(shown) > 1 else EVERYDAY
    return [Example(({"role": "user", "content": text},), None) for text in texts], texts is EVERYDAY
