"""A folder of weights as one GGUF file, its weights read back, and llama.cpp running it."""
