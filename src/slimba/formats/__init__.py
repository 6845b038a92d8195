"""Weight formats: how one matrix is stored, each with its NumPy reference of pack, unpack and matmul. No torch.

A matrix is a `MatrixLayout` (row segments, each in one format, an optional low-rank correction and an optional second
sign plane) with its arrays.
"""

from slimba.formats.matrix import FORMATS, LowRank, Matrix, MatrixLayout, Plane, Segment

__all__ = ["FORMATS", "LowRank", "Matrix", "MatrixLayout", "Plane", "Segment"]
