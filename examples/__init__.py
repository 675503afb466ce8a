"""Examples that configs/ and the documentation refer to."""
