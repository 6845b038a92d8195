"""The engines, one file each: `cpu` (C++) and `reference` (torch). `runtime/load.py` chooses."""
