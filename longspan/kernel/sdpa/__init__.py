"""PyTorch's flash attention on CPU."""
