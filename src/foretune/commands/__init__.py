"""The commands: the only room that parses and prints."""
