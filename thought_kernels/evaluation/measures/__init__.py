"""What is measured of a model: answers, divergences, their intervals, memory."""
