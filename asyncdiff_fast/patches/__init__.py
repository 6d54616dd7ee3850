"""The picture's rows shared out between ranks (DistriFusion): which rows belong to whom, and who needs whose.

May import `fused`, `exchange`, `tracing`, `prediction`, `calls` and `kernels`; no other way of sharing. Begin with
`calls.py` for a call's path and with `layout.py` for the rule.
"""
