"""Several processes that a launcher started: who they are, how they share work and fail together."""
