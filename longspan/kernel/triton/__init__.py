"""Programs of our own in Triton's language."""
