"""The gate: does a variant still give the original's answers, on every shape it will serve?"""
