"""How far pictures are from the reference ones, and how well they show what their captions ask for.

Needs examples/shapes on `sys.path`, as `quality.py` puts it there.
"""

import judge
import metrics
import numpy as np
import torch
from render import render
from sampling import to_bytes

ASPECTS = ("all", "colour", "shape", "background")
NUM_RENDERED = 4096


class Ruler:
    """Measures pictures against the reference pictures and against rendered truth."""

    def __init__(self, exact, captions, num_seeds):
        self.exact, self.captions = exact, captions
        num_prompts = len(captions) // num_seeds
        self.picked = metrics.resampled_prompts(num_prompts, num_seeds)
        self.without = metrics.without_each_prompt(num_prompts, num_seeds)
        self.judge = judge.load()
        rendered = render(captions * -(-NUM_RENDERED // len(captions)), seed=0)
        truth = torch.cat([self.judge.features(judge.to_pixels(part)) for part in rendered.split(256)]).double().numpy()
        self.mean, self.covariance = truth.mean(0), np.cov(truth, rowvar=False)
        self.exact_obeyed, self.exact_features = self._read(exact)

    def _read(self, pictures):
        drawn = to_bytes(torch.from_numpy(pictures))
        obeyed = judge.verdicts(self.judge, drawn, self.captions)
        features = self.judge.features(judge.to_pixels(drawn)).double().numpy()
        return {name: obeyed[name].numpy() for name in ASPECTS}, features

    def closeness(self, pictures):
        """PSNR, SSIM and obedience of one configuration; `pictures` is (n, 3, 64, 64) in 0..1."""
        return self._closeness(pictures, self._read(pictures)[0])

    def row(self, pictures):
        """All figures of one configuration."""
        obeyed, features = self._read(pictures)
        return {
            **self._closeness(pictures, obeyed),
            "obeyed_by_exact_only": metrics.share_with_interval(self.exact_obeyed["all"] & ~obeyed["all"]),
            "frechet": self._frechet_row(features),
        }

    def _closeness(self, pictures, obeyed):
        psnr, ssim = metrics.psnr(pictures, self.exact), metrics.ssim(pictures, self.exact)
        return {
            "psnr_db": {**metrics.mean_with_interval(psnr, self.picked), **_spread(psnr)},
            "ssim": {**metrics.mean_with_interval(ssim, self.picked), **_spread(ssim)},
            "obedience": {name: metrics.share_with_interval(obeyed[name]) for name in ASPECTS},
        }

    def pair(self, ours, theirs):
        """How much closer one set of pictures is to the exact ones than another, in dB, picture by picture."""
        gain = metrics.psnr(ours, self.exact) - metrics.psnr(theirs, self.exact)
        return {**metrics.mean_with_interval(gain, self.picked), "closer": float(np.mean(gain > 0))}

    def _frechet_row(self, features):
        def distances(kept):
            return [metrics.frechet(f[kept], self.mean, self.covariance) for f in (features, self.exact_features)]

        ours, exact = distances(slice(None))
        without = np.array([distances(kept) for kept in self.without])
        change = metrics.jackknife(ours - exact, without[:, 0] - without[:, 1])
        return {**metrics.jackknife(ours, without[:, 0]), "minus_exact": change}


def _spread(values):
    return {"median": float(np.median(values)), "worst": float(values.min()), "each": values.round(4).tolist()}
