"""Steps, draws and decays of a training loop that is not ours: hooks of `torch.optim`, no calls."""
