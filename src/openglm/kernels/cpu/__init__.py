"""Quantized products and whole decode steps in plain C, chosen for the processor when the library is loaded."""
