"""Trials: real fine-tunes on few rows, bought with a share of the cost of one full run."""
