"""The papers' experiments: curves over recipes, composition, knowledge."""
