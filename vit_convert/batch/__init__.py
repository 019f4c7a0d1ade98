"""Many conversions with one command: what to convert, on which processes or machines, and how each one ended."""
