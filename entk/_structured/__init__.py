"""The fast strategy: products with parameters, factored and contracted."""
