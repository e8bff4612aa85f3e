"""Guidance: wrappers `Denoiser -> Denoiser` that change what is sampled. They nest."""
