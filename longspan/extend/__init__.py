"""Extend a pretrained model to a longer context: the recipe, the windows it trains on, and the checkpoint."""

import logging

# peft imports bitsandbytes wherever it is installed, which then tells that there is no faster kernel than its own.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
