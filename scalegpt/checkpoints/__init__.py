"""What a run keeps, and whether every byte of it is whole."""
