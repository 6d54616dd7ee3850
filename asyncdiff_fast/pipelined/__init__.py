"""Patches that pass through the stages one after another (PipeFusion): micro-steps, and what they keep for each other.

Stands on `stages` (units and their division) and `patches` (rows and sites), and may import what they may. Begin with
`calls.py` for a call's path and with `order.py` for the rule.
"""
