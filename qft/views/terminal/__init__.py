"""Documents as rich tables."""
