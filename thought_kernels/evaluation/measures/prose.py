"""Ordinary text of many kinds, on which a patch should change nothing: no chat, no request, no instruction."""

from __future__ import annotations

# Written for this package. One kind each: what a patch moves in a letter it may leave alone in a table.
PROSE = {
    "encyclopedia": (
        "The common swift is a bird of the open air. It sleeps, eats and drinks on the wing, and a young swift that "
        "has left its nest may not touch the ground again for two or three years. It feeds on insects and on spiders "
        "that drift at the end of their threads, and gathers them in its throat until it has a ball of several hundred."
    ),
    "story": (
        "When the ferry had gone, the boy was still standing on the pier with the letter in his hand. He had meant to "
        "give it to her at breakfast, then at the gate, then on the gangway. The gulls had settled again. He folded "
        "the paper once more, put it in his shoe, where nobody would look for it, and walked home along the water."
    ),
    "news": (
        "The city council voted on Tuesday evening to close the old bridge to lorries from the first of October. "
        "Engineers had found cracks in two of its five piers in the spring. Cars and buses may go on using it until "
        "the new crossing is opened, which according to the mayor will not be before the summer of the year after next."
    ),
    "letter": (
        "Dear Ms Hoffmann, thank you for your message of 3 March and for the photographs. We are sorry to hear that "
        "the second shelf arrived with a broken corner. A new one will be sent to you this week at no charge, and you "
        "need not return the old one. Please keep the receipt for our records. Yours sincerely, the service team"
    ),
    "manual": (
        "Switch the pump off and close both valves before you open the housing. Loosen the four screws crosswise, a "
        "quarter of a turn at a time, and lift the lid straight up. The seal may be used again if it shows no cracks. "
        "Rinse the filter under running water, never with a brush, and let it dry before you put it back."
    ),
    "science": (
        "We measured the growth of seedlings under red, blue and white light of equal intensity. After twelve days the "
        "plants under red light were 31 % taller than those under white light (n = 48), but their leaves held less "
        "chlorophyll. The difference disappeared when the lamps were exchanged on the sixth day, which suggests that "
    ),
    "recipe": (
        "Melt the butter in a heavy pan and stir in the flour. Pour on the warm milk little by little, beating all the "
        "time, and let the sauce simmer for five minutes. Season with salt, pepper and a little nutmeg. Layer the "
        "sliced potatoes in a dish, cover them with the sauce, and bake them at 190 degrees for about fifty minutes."
    ),
    "speech": (
        "“You said nine o'clock.” “I said about nine.” “It's a quarter to ten, and the soup is cold.” She put down her "
        "bag and laughed. “Then we'll have it cold. Is there any bread left?” “There was.” He pointed at the dog, who "
        "looked at the wall. “Your friend here came on time.” “He lives here,” she said. “He has no train to catch.”"
    ),
    "law": (
        "The tenant shall keep the premises in good order and shall give notice of any damage without delay. The "
        "landlord may enter the premises after notice of at least twenty-four hours, except in an emergency. Where "
        "rent is more than thirty days overdue, the landlord may terminate this agreement in writing. Section 7 applies"
    ),
    "code": (
        "def moving_average(values, width):\n"
        '    """The mean of each run of `width` neighbours."""\n'
        "    total = sum(values[:width])\n"
        "    means = [total / width]\n"
        "    for i in range(width, len(values)):\n"
        "        total += values[i] - values[i - width]\n"
        "        means.append(total / width)\n"
        "    return means\n"
    ),
    "table": (
        "| city | population | founded |\n| --- | --- | --- |\n| Lisbon | 545,000 | 1200 BC |\n"
        "| Rotterdam | 656,000 | 1270 |\n| Tallinn | 457,000 | 1248 |\n| Zagreb | 767,000 | 1094 |\n"
        "| Bergen | 291,000 | 1070 |\n| Ghent | 267,000 | 650 |\n"
    ),
    "verse": (
        "The river takes its time today,\nit has no sea in mind;\nit turns a leaf, it wets a stone,\nit leaves the "
        "mill behind.\nAnd we, who had so far to go\nand had so much to do,\nsat down beside it with our bread\nand "
        "let the morning through.\n"
    ),
}
