"""Ordinary text that a patch is to leave as it is, where its maker asks for that; drift is measured on other text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thought_kernels.prompts.chat import text_tokenizer
from thought_kernels.prompts.prompt import EncodedExample

# Written for this package, of many kinds: what a patch moves in a letter it may leave alone in a table.
ORDINARY = (
    "Basalt is a dark volcanic rock that forms when lava cools quickly at the surface. It covers most of the ocean "
    "floor. Where it cooled slowly and evenly it often cracked into columns with five or six sides, such as those on "
    "the coast of Antrim. It is crushed for roads and railway beds, and spun into fibres that bear great heat.",
    "Marta counted the steps again as she climbed: fifty-one, fifty-two. The lamp at the top had gone out in the "
    "storm, and the keeper had not answered all night. When she pushed the door open, the room was warm, the kettle "
    "stood on the stove, and a chair lay on its side under the window. Nobody was there.",
    "Shares in the airline fell by six per cent on Monday after it said that fuel had cost more than expected in the "
    "third quarter. The company still hopes to carry forty million passengers this year. Analysts had been waiting "
    "for news about the two routes to Asia, which were suspended in April and have not been opened since.",
    "Hi Tom, just a short note about Saturday. We are eleven now, so I have booked the long table by the stairs. Bring "
    "the photos if you can find them, and don't worry about the cake, my sister has it in hand. Parking is free after "
    "six behind the station. See you there, and give my love to the girls. Anna",
    "To replace the battery, remove the two screws on the back and slide the cover towards the cable. Note which way "
    "the old battery lies. Insert the new one with the positive pole up, close the cover, and hold the button for five "
    "seconds. If the light stays red, charge the device for an hour before you try again.",
    "The committee shall meet at least four times a year. A member who is absent from three meetings in a row without "
    "good reason ceases to be a member. Decisions are taken by a majority of those present; where votes are equal, the "
    "chair decides. Minutes shall be sent to all members within fourteen days of each meeting.",
    "“Is it far?” “Two hours, if the road is dry.” The old man looked up at the clouds. “And if it isn't?” “Then we "
    "shall talk for longer,” said the driver, and started the engine. “You brought something to eat, I hope?” "
    "“Apples.” “Good. The last one brought nothing but questions.”",
    "class Counter:\n    def __init__(self):\n        self.counts = {}\n\n    def add(self, key, number=1):\n        "
    "if number < 0:\n            raise ValueError(\"number must not be negative\")\n        self.counts[key] = "
    "self.counts.get(key, 0) + number\n\n    def most_common(self):\n        return max(self.counts, "
    "key=self.counts.get)\n",
    "item,price,stock\nlamp,24.90,112\nchair,59.00,38\ndesk,210.00,7\nshelf,34.50,64\nrug,88.00,15\nmirror,41.25,29\n",
    "Wind over the stubble field,\nthe gate is hanging free;\nwho left it open, and for whom,\nhas not been told to me."
    "\nThe crows go up, the crows come down,\nthe light goes down the lane;\nI'll close it when the year comes round\n"
    "and open it again.\n",
)  # fmt: skip


def ordinary_rows(
    tokenizer: Any, rows: Sequence[EncodedExample], weight: float, context: int | None
) -> list[EncodedExample]:
    """The passages as examples that no instruction stands before: what the model makes of them bare is wanted of them.

    A passage's first token, where there is one the beginning of all text, is the header H; the rest is e, and P = P° =
    H. Every token of e weighs the same. In the first blocks δ is 0; where earlier blocks are patched already, δ takes
    back what they do to the text.

    Args:
        tokenizer: a fast transformers tokenizer.
        rows: the examples that they stand beside.
        weight: of all passages together, relative to that of the examples.
        context: the model's longest input, None for any; longer passages are cut.

    Raises:
        ValueError: a tokenizer without tokens for the passages.
    """
    if not weight:
        return []
    words = text_tokenizer(tokenizer)
    ids = [list(words(text)["input_ids"])[:context] for text in ORDINARY]
    known = [one for one in ids if len(one) > 1 and words.unk_token_id not in one]
    if not known:
        raise ValueError(
            f"transmute: text_weight must be 0 where the tokenizer has no tokens for ordinary text, got {weight}"
        )
    each = weight * sum(row.share for row in rows) / sum(len(one) - 1 for one in known)
    place = "the ordinary text"
    return [EncodedExample(one[:1], [], one[1:], 0, place, share=each * (len(one) - 1)) for one in known]
