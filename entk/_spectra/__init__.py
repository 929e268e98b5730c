"""Linear operators: eigenpairs, densities, traces, and how kernels change."""
