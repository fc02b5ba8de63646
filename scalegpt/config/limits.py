"""These numbers hold for configurations, data and programs alike."""

LARGEST = 2**31 - 1  # JAX counts in int32
BEGINS = 1 << 30  # is added to the id of a token that begins a document, where a batch says so
VOID = -(2**31)  # each token of a row that could not be read: its update changes nothing
