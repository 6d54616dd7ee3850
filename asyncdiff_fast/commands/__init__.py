"""The command `asyncdiff-fast` and what its subcommands do.

May import everything below it; nothing imports it but the shell. Begin with `cli.py`.
"""
