"""Methods choose the numbers of a packed model; each has recipe.py (settings), layers.py and run.py."""
