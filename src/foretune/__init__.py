"""Know how a fine-tune will go before you run it."""
