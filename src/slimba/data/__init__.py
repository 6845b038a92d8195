"""Text in, token windows out: sources, tokenising, packing, deterministic batches."""
