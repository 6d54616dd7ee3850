"""What the patches of a call tell each other while their sites run, as events."""

import math

from ..calls.schedule import PatchMode, patch_mode
from ..patches.sites import NORM
from .events import Compute, Post, Wait


class SiteTable:
    """Messages of a plan's sites and groups of sites, known once for all ranks: {target patch: bytes} by source."""

    def __init__(self, plan):
        self.plan, self.num_patches = plan, len(plan.rows.held)
        self._sent, self._groups = {}, {}

    def of_site(self, i):
        """[{target: bytes}] of a site, by source."""
        if i not in self._sent:
            site = self.plan.sites[i]
            self._sent[i] = [
                {t: sum(map(math.prod, shapes)) * site.item for t, shapes in site.sent(p).items()}
                for p in range(self.num_patches)
            ]
        return self._sent[i]

    def groups(self, met):
        """[([site], [{target: bytes}] by source)] of what displaced steps post together, of the sites that are met."""
        if met not in self._groups:
            found = []
            for group in self.plan.groups(met):
                sent = [{} for _ in range(self.num_patches)]
                for i in group:
                    for mine, one in zip(sent, self.of_site(i), strict=True):
                        for t, n in one.items():
                            mine[t] = mine.get(t, 0) + n
                found.append((group, sent))
            self._groups[met] = found
        return self._groups[met]


class Sites:
    """The sites of one patch on one rank.

    Args:
        ranks: of the patches.
        patch: this one.
        met: the sites that displaced steps meet here.
    """

    def __init__(self, table, config, ranks, patch, met):
        self._table, self._config, self._ranks, self._patch = table, config, ranks, patch
        self._groups = table.groups(met)
        self._first_of = {group[0]: g for g, (group, _) in enumerate(self._groups)}
        self._last_of = {group[-1]: g for g, (group, _) in enumerate(self._groups)}
        self._posted = {}
        # Whether the call under way reads nothing that an earlier one has made.
        self.exact = False

    def run(self, step, seconds, sites):
        """Events of so many seconds of work, in which some sites come at even distances."""
        mode = PatchMode.SYNC if self.exact else patch_mode(self._config, step)
        piece = seconds / (len(sites) + 1)
        yield Compute(piece)
        for i in sites:
            yield from self._at(i, step, mode)
            yield Compute(piece)

    def result(self, step):
        """Events of the end of a call: all patches get the whole result."""
        others = len(self._ranks) - 1
        if others:
            n = self._table.plan.sent_result_bytes(self._patch) // others
            yield from self._all(("result", step), [dict.fromkeys(range(others + 1), n)] * (others + 1))

    def _at(self, i, step, mode):
        site = self._table.plan.sites[i]
        if not site.exchanges or mode in (PatchMode.LOCAL, PatchMode.FROZEN):
            return
        if mode is PatchMode.SYNC or (site.kind == NORM and self._config.group_norm == "sync"):
            yield from self._all(("site", i, step), self._table.of_site(i))
            return
        if i in self._first_of and self._first_of[i] in self._posted:
            g = self._first_of[i]
            yield from self._waits(("sites", g, self._posted[g]), self._groups[g][1])
        if i in self._last_of:
            g = self._last_of[i]
            yield self._post(("sites", g, step), self._groups[g][1])
            self._posted[g] = step

    def _all(self, key, sent):
        yield self._post(key, sent)
        yield from self._waits(key, sent)

    def _post(self, key, sent):
        targets = sent[self._patch].items()
        return Post(key, tuple((self._ranks[t], n) for t, n in targets if t != self._patch))

    def _waits(self, key, sent):
        for source, mine in enumerate(sent):
            if source != self._patch and self._patch in mine:
                yield Wait(key, self._ranks[source])


class PatchCalls:
    """The calls of a rank whose patch is not shared any further."""

    def __init__(self, table, config, ranks, patch, seconds):
        self._all = tuple(range(len(table.plan.sites)))
        self._sites, self._seconds = Sites(table, config, ranks, patch, self._all), seconds

    def call(self, step, exact=False):
        """Events of one call."""
        self._sites.exact = exact
        yield from self._sites.run(step, self._seconds, self._all)
        yield from self._sites.result(step)
