"""Which engine loads which format, and an environment judged by it."""
