"""Extend a pretrained model to a longer context: the recipe, the windows it trains on, and the checkpoint."""
