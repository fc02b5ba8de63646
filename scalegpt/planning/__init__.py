"""The arithmetic of machines: what a run needs of a chip's memory, how long an update takes on it,
and which mesh suits it. No device is touched."""
