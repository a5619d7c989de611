"""The main job: a transformer that completes Latin squares and solves KenKen puzzles.

The data side needs numpy and numba alone (`alphabets`, `streams`, `latin`, `exact`,
`cages`, `symmetry`, `puzzles`, `drawing`, `dataset`).
"""
