"""Where in the denoiser a call on a patch is, and that it meets the sites of its plan in turn."""


class Way:
    """The way of one call through modules and sites.

    `displaced` is the order in which displaced calls meet the plan's sites, None until the first of them is over: `met`
    are the sites that it has met.
    """

    def __init__(self):
        self.displaced, self.met = None, []
        self.restart()

    def restart(self):
        """A forward begins: the calls of its modules are counted from here."""
        self._calls, self._stack, self._cursor = {}, [], 0

    def enter(self, name):
        """A module with sites is called; `leave` ends it. True if it lies in no other such module."""
        call = self._calls[name] = self._calls.get(name, -1) + 1
        # Its sites, its joins and its sums are counted apart.
        self._stack.append([(name, call), -1, -1, -1])
        return len(self._stack) == 1

    def leave(self):
        """Ends the module call entered last."""
        self._stack.pop()

    @property
    def key(self):
        """(name, number of its call) of the module entered last."""
        return self._stack[-1][0]

    def at_site(self):
        """(key, place) of the next site of the module entered last."""
        self._stack[-1][1] += 1
        return self.key, self._stack[-1][1]

    def at_join(self):
        """(key, place) of its next join."""
        self._stack[-1][2] += 1
        return self.key, self._stack[-1][2]

    def at_sum(self):
        """(key, place) of its next call of a function that may sum over rows."""
        self._stack[-1][3] += 1
        return self.key, f"sum {self._stack[-1][3]}"

    def ahead(self, name):
        """(key, place) of the first site that a module's next call will meet."""
        return (name, self._calls.get(name, -1) + 1), 0

    def follow(self, index, expected, label):
        """A site of the plan is met. `expected`: all indices in order, None where they are learnt; `label`: of it.

        Raises: Lost if another site's turn has come.
        """
        if expected is None:
            self.met.append(index)
        elif self._cursor >= len(expected) or expected[self._cursor] != index:
            lost(f"{label} was called out of turn")
        self._cursor += 1

    def end(self, expected):
        """Raises: Lost if the call is over and not all sites were met."""
        if self._cursor != len(expected):
            lost(f"{len(expected) - self._cursor} sites were not met")


class Lost(RuntimeError):
    """A call does not go as the first did."""


def lost(what):
    """Raises: `Lost`."""
    raise Lost(
        f"the denoiser took another way than at its first call: {what}; what switches modules on or off within a "
        "generation needs num_stages=1 beside num_patches, or unpatch() before it"
    )
