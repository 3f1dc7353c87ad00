"""The tangent kernel of the adapters: gradients, kernel, spectrum, bounds, kernel regression."""
