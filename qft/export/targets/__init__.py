"""One file a target: what it writes, and how it is loaded again."""
