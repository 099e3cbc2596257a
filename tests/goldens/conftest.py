"""What writes the goldens needs torch, torchjd, quadprog and cvxpy: no test imports it."""

collect_ignore = [
    "make.py",
    "make_cagrad.py",
    "make_names.py",
    "make_scalarizers.py",
    "matrices.py",
    "oracles.py",
    "originals.py",
]
