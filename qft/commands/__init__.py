"""The work of each command: a Recipe to its Report."""
