"""What a softmax has beside its pairs: merges, sinks, what is not finite, derivatives."""
