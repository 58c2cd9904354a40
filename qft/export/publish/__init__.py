"""Where an artifact goes from here: a registry, the hub."""
