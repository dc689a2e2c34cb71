"""Parts that all operations share."""
