"""What the methods are held to: matrices, exact solutions and TorchJD's output, in parity.npz."""
