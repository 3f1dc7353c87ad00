"""Real fine-tuning on the Hugging Face Trainer and peft, of exactly the configuration that is scored."""
