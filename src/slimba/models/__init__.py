"""The networks. This package imports nothing, so that `models.spec` is usable without torch."""
