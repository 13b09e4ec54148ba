"""The variable of the environment by which cuBLAS gives the same bits every time."""

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Values of that variable of the environment with which cuBLAS gives the same bits every time."""
