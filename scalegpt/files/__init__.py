"""This room reads and writes files, on a disk or behind a URL, whole or not at all; no JAX."""
