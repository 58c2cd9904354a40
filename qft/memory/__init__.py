"""Memory, in bytes: what is measured (meter)."""
