"""DF-SSM done right: signs with row and column scales and an int8 low-rank correction, distilled jointly."""
