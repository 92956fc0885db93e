"""GPU kernels for reinforcement learning on language models, each with a PyTorch reference."""
