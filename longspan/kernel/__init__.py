"""How attention over a pattern is computed: the parts of a pattern, the kernels that take them, and the plan."""
