"""How a layer is held in few bits (hold/), and ways to get there (engines/)."""
