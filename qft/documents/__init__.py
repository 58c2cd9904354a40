"""Every document that is written, as pydantic models with units."""
