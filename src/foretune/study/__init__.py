"""Grids of scores and fine-tunes, and what the ones say of the others."""
