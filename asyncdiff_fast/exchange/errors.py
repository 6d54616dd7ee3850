"""The one error of everything that goes wrong between ranks."""


class ExchangeError(RuntimeError):
    """Another rank died, hung, or did something else than this one; the message names it.

    `ended`: it has ended the generation under way, in good order, and this rank has not.
    """

    def __init__(self, *args, ended=False):
        super().__init__(*args)
        self.ended = ended
