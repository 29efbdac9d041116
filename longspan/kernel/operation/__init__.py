"""Attention as one operation, with a derivative and for torch.compile."""
