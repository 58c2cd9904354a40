"""A training's work (session), the Trainer watched (trainer), its held-out rows, and what it measures (recorder)."""
