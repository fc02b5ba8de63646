"""This room turns text into token files, and those into the windows of a step; NumPy, no device."""
