"""Triton kernels of the training path; each computes what a plain PyTorch function in `models/` computes.

Nothing here is needed to train: without Triton or a GPU the plain functions run. `mixer.usable` says when these do.
"""
