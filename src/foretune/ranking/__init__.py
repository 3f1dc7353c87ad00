"""Ranking: which adapter placements there are, what they cost, and how to find the best of them."""
