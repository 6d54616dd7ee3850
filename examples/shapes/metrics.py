"""How close pictures are to others: one by one (PSNR, SSIM), as a set (Frechet distance), and how sure that is.

Intervals hold for other prompts and seeds, so the pictures of one prompt are drawn or left out together. Those of means
are percentile bootstraps, those of the Frechet distance, which grows when pictures repeat, jackknives.
"""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

PSNR_CAP_DB = 100.0
RESAMPLES = 2000


def psnr(pictures, exact):
    """PSNR of each picture in dB, at most 100, which stands for equality.

    Args:
        pictures, exact: (n, 3, h, w) float arrays in 0..1.
    """
    with np.errstate(divide="ignore"):
        pairs = zip(exact, pictures, strict=True)
        return np.array([min(PSNR_CAP_DB, peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in pairs])


def ssim(pictures, exact):
    """SSIM of each picture, with the window of Wang et al. (2004): Gaussian, sigma 1.5 pixels. Arguments as above."""
    options = {"channel_axis": 0, "data_range": 1.0, "gaussian_weights": True, "use_sample_covariance": False}
    return np.array([structural_similarity(a, b, sigma=1.5, **options) for a, b in zip(exact, pictures, strict=True)])


def frechet(features, mean, covariance):
    """Frechet distance of the features' Gaussian from another one (Dowson and Landau, 1982).

    Args:
        features: (n, d). With few pictures it comes out too large; compare only sets of one size.
        mean, covariance: (d,) and (d, d) of the other set.
    """
    ours = np.cov(features, rowvar=False)
    # The eigenvalues of a product of two covariances are real and not negative; rounding may say otherwise.
    eigenvalues = np.linalg.eigvals(ours @ covariance).real.clip(min=0)
    distance = ((features.mean(0) - mean) ** 2).sum()
    return float(distance + np.trace(ours) + np.trace(covariance) - 2 * np.sqrt(eigenvalues).sum())


def resampled_prompts(num_prompts, num_seeds, resamples=RESAMPLES):
    """(resamples, num_prompts * num_seeds) picture indices; picture p * num_seeds + s is prompt p with seed s."""
    prompts = np.random.default_rng(0).integers(0, num_prompts, (resamples, num_prompts))
    return (prompts[:, :, None] * num_seeds + np.arange(num_seeds)).reshape(resamples, -1)


def mean_with_interval(values, picked):
    """{"mean", "low", "high"} of one value per picture; `picked` is from `resampled_prompts`."""
    values = np.asarray(values, dtype=float)
    low, high = np.percentile(values[picked].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def share_with_interval(right):
    """{"mean", "low", "high"}: the share of True and its interval after Wilson (1927), pictures taken as independent.

    Unlike a bootstrap's it has a width where all are right.
    """
    n, share, z = len(right), float(np.mean(right)), 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return {"mean": share, "low": float(max(0, centre - half)), "high": float(min(1, centre + half))}


def without_each_prompt(num_prompts, num_seeds):
    """(num_prompts, (num_prompts - 1) * num_seeds) picture indices: row p leaves prompt p out."""
    pictures = np.arange(num_prompts * num_seeds)
    return np.stack([pictures[pictures // num_seeds != prompt] for prompt in range(num_prompts)])


def jackknife(value, values_without):
    """{"mean", "low", "high"}: a statistic and its 95 % interval from its values with one prompt left out."""
    values_without = np.asarray(values_without)
    half = 1.96 * np.sqrt((len(values_without) - 1) * values_without.var())
    return {"mean": float(value), "low": float(value - half), "high": float(value + half)}
