"""DF-SSM done right: sign scaffold with row and column scales, int8 low-rank correction, trained jointly by distillation."""
