"""Bundled data: `demo-teacher` (a float16 Mamba-2, see docs/demo-teacher.md) and `demo-text` (public-domain text)."""
