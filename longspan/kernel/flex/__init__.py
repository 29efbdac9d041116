"""FlexAttention, and what else takes blocks as lists."""
