"""scalegpt: a sharding-first GPT trainer in JAX. Importing it touches no device."""

__version__ = "0.1.0"
