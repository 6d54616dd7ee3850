"""The decoder of one autoencoder, seen from one rank: every decode is shared by all ranks, and all have its picture."""

import contextlib

import torch

from ..alike import AlikeModel
from ..calls.schedule import PatchMode
from ..calls.signature import inputs_key, numbers_of
from ..exchange.choice import open_exchange
from ..exchange.engine import described
from ..exchange.errors import ExchangeError
from ..modules import structure
from ..patches.check import ResultCheck
from ..patches.hooks import Hooks
from .place import Place
from .planning import WAY_OUT, config_of, planned, small

# Plans kept for latents seen before.
KEPT_PLANS = 4
# Numbers of a latent that ranks compare, and how far they may be apart, of their spread.
SAMPLE, CLOSE = 256, {torch.float64: 1e-6, torch.float32: 1e-3}
CLOSE_IN_HALF = 2e-2


class Decoder:
    """`plan` is the latest `PatchPlan`, None before the first decode. `close()` undoes everything.

    Args:
        vae: the autoencoder. world: all ranks that share its decodes.
    Raises: ValueError, on every rank alike, if it is known beforehand that it cannot be shared.
    """

    def __init__(self, vae, config, world):
        self.place, self.world, self.config = Place.of(vae), world, config_of(world.size, config.timeout_s)
        self.plan = self.on_refused = self._exchange = self._device = self._structure = None
        self._signature, self._hooks = self.place.signature, Hooks(self.place.module)
        self._ranks, self._model = world.along(world.ranks), AlikeModel(world, self.place.module, "autoencoder")
        self._plans, self._phases, self._checked = {}, 0, set()
        self._inside = self._interrupted = False
        self._undo = self.place.attach(self._call)

    @staticmethod
    def check(vae, num_ranks):
        """Raises: ValueError that names an autoencoder whose decoder is known not to be shared."""
        place = Place.of(vae)
        _refuse_tiles(place)
        example = place.example(num_ranks)
        if example is not None:
            planned(place, config_of(num_ranks), *example)

    # One decode.

    def _call(self, forward, args, kwargs):
        latent = self._signature.latent(args, kwargs)
        # Every rank does a few rows, as of a last tile, by itself.
        if self._inside or latent.shape[-2] < self.world.size or self._needs_gradients(latent):
            return forward(*args, **kwargs)
        self._inside = True
        try:
            _refuse_tiles(self.place)
            self._begin(latent, forward, args, kwargs)
            return self._shared(forward, args, kwargs)
        except BaseException as error:
            self._interrupted = True
            self.world.leave(described(error))
            if isinstance(error, _Refused):
                self.on_refused()
            if not isinstance(error, ExchangeError):
                raise
            raise self.world.explained(error) from None
        finally:
            self._inside = False

    def _begin(self, latent, forward, args, kwargs):
        """All ranks meet, with the same latent. Collective."""
        mine = {
            "latent": (tuple(latent.shape), str(latent.dtype)),
            "sample": latent.detach().flatten()[:: max(1, latent.numel() // SAMPLE)][:SAMPLE].double().tolist(),
            "interrupted": self._interrupted,
            "moved": latent.device != self._device,
            "model": self._model.report(),
        }
        reports = self.world.begin(mine, "the start of a decode")
        interrupted = any(report["interrupted"] for report in reports)
        if interrupted or any(report["moved"] for report in reports):
            self._close_exchange("interrupted" if interrupted else None)
            self._exchange, self._device = open_exchange(self._ranks, latent.device), latent.device
            self._interrupted = False
        for rank, theirs in zip(self.world.ranks, reports, strict=True):
            if not _alike(reports[0], theirs, CLOSE.get(latent.dtype, CLOSE_IN_HALF)):
                raise ValueError(
                    f"every rank must decode the same latent: rank {self.world.ranks[0]} has "
                    f"{reports[0]['latent'][0]}, rank {rank} {theirs['latent'][0]}, and they differ; use the same "
                    "prompt, size and seed on all ranks"
                )
        models = [report["model"] for report in reports]
        self._model.check(models)

        def whole():
            args_of_corner, kwargs_of_corner = small(self._signature, self.config, args, kwargs)
            return forward(*args_of_corner, **kwargs_of_corner)

        self._model.check_hooks(models, whole)

    def _shared(self, forward, args, kwargs):
        now = structure(self.place.module)
        if now != self._structure:
            self._forget()
        dtypes = frozenset(p.dtype for p in self.place.module.parameters())
        named = self._signature.named(args, kwargs)
        kind = inputs_key(args, kwargs)[0], dtypes
        key = inputs_key(args, kwargs), dtypes, numbers_of(named, None)
        if key in self._plans:
            # The last used come last.
            self._plans[key] = self._plans.pop(key)
        else:
            if kind not in self._checked:
                self._compare(forward, *small(self._signature, self.config, args, kwargs))
                self._checked.add(kind)
            self._plans[key] = self._planned(args, kwargs)
            for old in list(self._plans)[:-KEPT_PLANS]:
                self._plans.pop(old).release()
        self._structure = structure(self.place.module)
        patch = self._plans[key]
        self.plan = patch.plan
        return self._on_patch(patch, forward, args, kwargs)

    def _on_patch(self, patch, forward, args, kwargs):
        counted = self._hooks.counted(forward)
        with self._exchange.step():
            return self._hooks.on_patch(
                patch, self._signature, PatchMode.SYNC, lambda a, k: counted(*a, **k), args, kwargs
            )

    def _planned(self, args, kwargs):
        """This rank's patch of a call, bound to its slots. Collective."""
        try:
            plan, patches = planned(self.place, self.config, args, kwargs)
        except ValueError as error:
            raise _Refused(str(error)) from error
        if len(set(self.world.gather(plan.digest(), "the plan of a decoder"))) > 1:
            raise _Refused(f"ranks planned different patches of {type(self.place.vae).__name__}: {WAY_OUT}")
        patch, phase = patches[self.world.rank], f"decoder, plan {self._phases}"
        self._phases += 1
        patch.move(self._device)
        self._hooks.attach_all(plan.modules)
        patch.bind(plan, self._exchange, phase, {})
        patch.bind_result(self._exchange, phase)
        return patch

    def _compare(self, forward, args, kwargs):
        """See that on a small latent all patches together are what the whole decoder gives. Collective."""
        patch = self._planned(args, kwargs)
        check = ResultCheck(self.place.vae, self._signature, self.world, way_out=WAY_OUT)
        expected = check.expect(lambda args, kwargs: forward(*args, **kwargs), args, kwargs)
        joined = self._on_patch(patch, forward, args, kwargs)
        patch.release()
        try:
            check.judge(joined, expected)
        except ValueError as error:
            raise _Refused(str(error)) from error

    def _needs_gradients(self, latent):
        if not torch.is_grad_enabled():
            return False
        return latent.requires_grad or any(p.requires_grad for p in self.place.module.parameters())

    # The end.

    @property
    def exchange_kind(self):
        """How slots travel: "nccl", "shm" or "torch.distributed"; None before the first decode."""
        return self._exchange and self._exchange.kind

    def stats(self):
        """Dict: what the exchange counts, {} before the first decode."""
        return {} if self._exchange is None else self._exchange.stats()

    def clear_stats(self):
        """Begin to count anew."""
        if self._exchange is not None:
            self._exchange.clear_stats()

    def _forget(self, released=False):
        for patch in () if released else self._plans.values():
            patch.release()
        self._plans.clear()
        self._checked.clear()
        self._hooks.remove()

    def _close_exchange(self, why=None):
        exchange, self._exchange = self._exchange, None
        self._forget(released=True)
        if exchange is not None:
            if why:
                exchange.abort(why)
            with contextlib.suppress(ExchangeError) if why else contextlib.nullcontext():
                exchange.close()

    def close(self, why=None):
        """Take every hook off and free every buffer; the autoencoder is as it was. `why` if it ends by a failure."""
        self._hooks.remove()
        self._undo()
        self._close_exchange(why or ("interrupted" if self._interrupted else None))


class _Refused(ValueError):
    """A decoder cannot be shared, as all ranks have found."""


def _refuse_tiles(place):
    if place.whole and place.tiles:
        raise ValueError(
            f"{type(place.vae).__name__} hands what frames leave from tile to tile, so tiles cannot be shared: got "
            "vae=True and enable_tiling(); call disable_tiling(), as every rank has a part of the rows only, or pass "
            "vae=False"
        )


def _alike(one, other, close):
    if one["latent"] != other["latent"]:
        return False
    a, b = (torch.tensor(x["sample"], dtype=torch.float64) for x in (one, other))
    return bool(((a - b).abs().amax() <= close * a.std(correction=0).clamp(min=1e-6)).item()) or bool(
        torch.equal(a.nan_to_num(), b.nan_to_num())
    )
