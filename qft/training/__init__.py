"""The Hugging Face Trainer, watched."""
