"""What every rank does when: ranges in torch's profiler, put together to one trace, a picture and a table.

Stands above all wings whose work it names, and is not known to any of them: methods are wrapped while a profile is
made, and are their own before and after. Begin with `session.py`; `ranges.py` says what is named. `intervals.py`,
`turns.py` and `account.py` are pure.
"""
