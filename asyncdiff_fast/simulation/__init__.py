"""How long a call takes on any mesh, without running it: events of computing, posting and waiting, over the plans and
schedules that run. Pure: may import plans and schedules (`stages`, `patches`, `pipelined`, `steps`, `calls`), neither
process groups nor exchanges. Begin with `simulate.py`; `events.py` is the clockwork, `cluster.py` the links, and one
file for each way to share says what a rank does.
"""
