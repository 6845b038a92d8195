"""The packaged recipes (YAML, a comment above every key)."""
