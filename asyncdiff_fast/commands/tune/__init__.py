"""`asyncdiff-fast tune`: which way to share a pipeline is best on these devices, measured.

`main` starts the ranks; `session` says what is drawn next, on rank 0; `drawing` draws, on all; `sets` and `choosing`
are pure: what may be tried, and what is best of it; `prospects` is what the simulation says of it; `record` is kept on
disk; `page` and `sheet` show it.
"""
