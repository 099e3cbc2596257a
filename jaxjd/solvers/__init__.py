"""Exact solvers of the small problems behind the methods, given a Gramian of the rows.

One file per problem: `dual_cone`, `min_norm`, `worst_case` (CAGrad), `primary` (PCD), `fairness`
and `simplex`. The first four are nonnegative quadratic programs, which `nonnegative_qp` solves.
`solution` has the record of an answer, and `residuals` tells how far an answer is from the right
one. The names that users need are those of `jaxjd.linalg`.
"""
