"""Grids of scores and fine-tunes: makes the cells, judges nothing."""
