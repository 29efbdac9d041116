"""Evaluation: perplexity by context length, passkey retrieval by length and depth, and their report."""
