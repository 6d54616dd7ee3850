"""The command line, run by a rank whose every message takes long: `python slow_exchange.py SECONDS ARGUMENTS…`."""

import sys
import time

from asyncdiff_fast.commands import cli
from asyncdiff_fast.exchange.engine import Engine
from asyncdiff_fast.exchange.over_torch import TorchExchange


def delay(kind, seconds):
    """Every wait for a slot takes so much longer."""
    wait = kind.wait

    def late(self, slot, lag=0):
        time.sleep(seconds)
        return wait(self, slot, lag)

    kind.wait = late


if __name__ == "__main__":
    for exchange in (Engine, TorchExchange):
        delay(exchange, float(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
