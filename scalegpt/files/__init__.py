"""Files that are there whole or not at all, on a disk or behind a URL. No JAX."""
