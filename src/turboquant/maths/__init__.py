"""The paper as code: pure torch, any device, unpacked integers. Kernels are optimisations of what stands here."""
