"""What a model path holds: found, its skeleton on the meta device, its weights by name."""
