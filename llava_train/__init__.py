"""Trains LLaVA models in two stages: first the projector, then the projector and the language model."""

__version__ = "0.1.0"
