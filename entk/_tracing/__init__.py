"""Functions as programs: their jaxprs, read, walked and compared."""
