"""PyTorch's flash attention on CUDA."""
