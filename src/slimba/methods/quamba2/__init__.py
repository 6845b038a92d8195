"""`slimba compress --method quamba2`: quantisation after training. docs/quamba2.md describes it."""
