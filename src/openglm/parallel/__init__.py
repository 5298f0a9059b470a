"""Parallelism, applied to a plain network from outside."""
