"""GPT-2 weights from and to Hugging Face's format (being written)."""
