"""Triton kernels, one file per operator: @triton.jit kernels and a launcher named like the operator.

Importable without Triton; fastmerge/_triton.py is the only importer and decides whether they can run. Launchers get
validated arguments (fastmerge/ops checks them) and allocated outputs, and never synchronise with the device.
"""
