"""Data of causal language models: texts, prompts with completions and conversations, and the tokens that carry loss."""
