"""The score of one adapter configuration: its kernel's spectrum, bounds and kernel regression."""
