"""The run: a stage from its file to its result."""
