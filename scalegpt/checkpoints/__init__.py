"""This room writes and reads what a run keeps, and tells whether every byte of it is whole."""
