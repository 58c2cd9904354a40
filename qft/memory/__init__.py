"""Memory, in bytes: known before (predict), made to fit (fit, offload, chunked_loss), measured (meter), and what grows
from step to step (leaks, census)."""
