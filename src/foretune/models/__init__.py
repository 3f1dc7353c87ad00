"""Models with adapters: loaded, checked, placed."""
