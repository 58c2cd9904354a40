"""Memory, in bytes: what is measured (meter), and what grows from step to step (leaks, census)."""
