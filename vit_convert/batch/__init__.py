"""Many conversions by one command: what to convert, on which processes or machines, and what became of each."""
