"""A trained model, quantized for inference: block by block or whole, and what it does to each layer."""
