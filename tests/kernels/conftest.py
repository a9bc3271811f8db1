"""Kernels in Triton's interpreter need TRITON_INTERPRET=1 before Triton is imported, which a process can not change
later: the tests in triton_interpreted/ are collected only there. test_triton.py runs that process and counts."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton_interpreted"]
