"""What a model with weights says: how likely a text is, and what comes next."""
