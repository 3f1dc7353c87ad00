"""What a data set asks for: its columns, labels and rows, and the outputs that answer."""
