"""The demonstration on a real pretrained model, Gemma 3 270M: eight demonstrations of a task become a weight update.

The model is fetched once, a quarter of a gigabyte, into a cache (pretrained.py says where).
"""

from __future__ import annotations

import sys

from measure import Measurement
from pretrained import NotAvailable, folder
from tasks import DEMONSTRATIONS, task
from tqdm import tqdm

from thought_kernels.models.load import load

TASKS = ("antonym", "present-past")  # each takes 40 s on two cores
INPUTS, SAMPLES = 32, 2
LINE = "{:<16} {:>5} {:>9} {:>8} {:>10} {:>8}"


def main() -> None:
    try:
        place = folder("gemma-3-270m")
        model, tokenizer = load(place)
    except NotAvailable as error:
        sys.exit(f"demo-gemma: Gemma 3 270M cannot be had here; {error}\n`make demo` needs no network.")
    print(
        f"Gemma 3 270M, a base model. Each task is {DEMONSTRATIONS} demonstrations in the prompt. A patch is made of\n"
        f"{INPUTS} other words and more that the model writes, with completions of its own. Accuracy on other words:\n"
    )
    print(LINE.format("task", "bare", "prompted", "patched", "recovered", "seconds"))
    samples = []
    for name in tqdm(TASKS, leave=False, disable=None):
        measurement = Measurement(model, tokenizer, task(name, seed=0, inputs=INPUTS))
        patch, times = measurement.fit(INPUTS, {})
        held_out = measurement.held_out
        with patch.applied(model):
            score = held_out.score(model)
        accuracies = (f"{value:.2f}" for value in (held_out.base, held_out.prompted, score.accuracy))
        tqdm.write(LINE.format(name, *accuracies, f"{score.effect.recovered:.2f}", f"{times['seconds']:.1f}"))
        lines = (held_out.base_texts, held_out.prompted_texts, score.texts)
        for question, *texts in list(zip(held_out.questions, *lines, strict=True))[:SAMPLES]:
            bare, prompted, patched = (text.partition("\n")[0] for text in texts)
            samples.append(f"{question} -> bare {bare!r}, prompted {prompted!r}, patched {patched!r}")
    print(f"\nThe first {SAMPLES} words of each:", *samples, sep="\n  ")
    print("\nrecovered: 1 - KL(prompted || patched) / KL(prompted || bare)")
    print("seconds: of tk.transmute but for writing inputs and completions")
    print(f"the model: {place}")


if __name__ == "__main__":
    main()
