"""The parts of the report: each sees a subject and gives figures."""
