"""What follows from a pattern: free functions, a pattern in, a fact out."""
