"""The paper's tables and figure, made again from a study and set beside the printed numbers."""
