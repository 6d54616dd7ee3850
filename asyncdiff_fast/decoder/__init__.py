"""The decoder of a pipeline's autoencoder, its rows shared out between all ranks as exact patches.

May import `patches` and what lies beneath it; knows nothing of how the denoiser is shared. Begin with `calls.py`;
`place` says what of an autoencoder is shared, `planning` plans it without computing anything.
"""
