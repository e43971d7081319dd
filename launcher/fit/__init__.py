"""What training a model needs before anything is submitted: parameters, FLOPs, memory, time, layouts that fit.

Standard library only. Formulas and their checks: `docs/fit.md`.
"""
