"""The engine: load a checkpoint, prefill, decode, sample, stream. No torch except in backends/reference.py."""
