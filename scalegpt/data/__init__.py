"""From text to token files to the windows of a step, f(seed, step). NumPy, no device."""
