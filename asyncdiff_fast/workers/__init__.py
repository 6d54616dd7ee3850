"""One process in front of others: a notebook or a web server calls, worker processes share the work.

May import `patching` and `commands` (folders of pipelines, how many processes options take); nothing imports it. Begin
with `front.py`, which lives in the caller's process, as `team.py` does; `process.py` is what a worker runs, and
`messages.py` what they tell each other.
"""
