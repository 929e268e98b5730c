"""Per-example Jacobians, kernels and gradient moments."""
