"""This room reads trained weights of runs and of Hugging Face, and writes the latter's formats."""
