"""Trained weights, from and to Hugging Face's formats and runs."""
