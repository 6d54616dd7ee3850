"""What a value of the step before stands for now: carried on by its last change, and how far that was from the truth.

May import `calls`, `exchange` and `config`. Begin with `trend.py`.
"""
