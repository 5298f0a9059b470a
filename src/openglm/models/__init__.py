"""Networks in plain PyTorch: ``glm130b``, at any size."""
