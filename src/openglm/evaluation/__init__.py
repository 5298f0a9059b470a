"""Measuring what a model knows, and how fast it is."""
